"""tree: what is below what, how deep, and what a node may look at."""

import random

import pytest

from selfspec.model.tree import Tree

#        0
#      /   \
#     1     2
#    / \    |
#   3   4   5
BUSHY = Tree([9, 7, 8, 7, 8, 7], [-1, 0, 0, 1, 1, 2])


def test_a_chain() -> None:
    chain = Tree.chain((4, 5, 6))
    assert (chain.tokens, chain.parents, len(chain)) == ([4, 5, 6], [-1, 0, 1], 3)
    assert chain.is_chain and chain.depths() == [0, 1, 2] and chain.drawn_from is None
    assert chain.ancestors() == [0b1, 0b11, 0b111]


def test_a_root_alone_is_a_chain() -> None:
    assert Tree.chain([3]).is_chain and Tree.chain([3]).depths() == [0] and Tree.chain([3]).child(0, 3) is None


def test_a_tree_that_grows() -> None:
    tree = Tree.chain([9])
    assert [tree.add(*node) for node in ((0, 7), (0, 8), (1, 7), (1, 8), (2, 7))] == [1, 2, 3, 4, 5]
    assert (tree.tokens, tree.parents) == (BUSHY.tokens, BUSHY.parents)


def test_depths_are_distances_from_the_root() -> None:
    assert not BUSHY.is_chain and BUSHY.depths() == [0, 1, 1, 2, 2, 2]


def test_a_child_is_found_by_its_token_below_its_own_parent() -> None:
    found = {(node, token): BUSHY.child(node, token) for node in range(6) for token in (7, 8, 9)}
    assert {key: child for key, child in found.items() if child is not None} == {
        **{(0, 7): 1, (0, 8): 2},
        **{(1, 7): 3, (1, 8): 4},
        **{(2, 7): 5},
    }


def test_of_children_that_say_the_same_the_first_counts() -> None:
    assert Tree([1, 5, 5, 6], [-1, 0, 0, 2]).child(0, 5) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_node_looks_at_its_ancestors_and_itself(seed: int) -> None:
    rng = random.Random(seed)
    tree = Tree.chain([0])
    for _ in range(rng.randrange(12)):
        tree.add(rng.randrange(len(tree)), rng.randrange(5))
    for node, seen in enumerate(tree.ancestors()):
        above, at = set(), node
        while at >= 0:
            above.add(at)
            at = tree.parents[at]
        assert {i for i in range(len(tree)) if seen >> i & 1} == above
        assert tree.depths()[node] == len(above) - 1
    assert tree.is_chain == (tree.depths() == list(range(len(tree))))


def test_two_trees_do_not_share_their_signals() -> None:
    one, other = Tree.chain([1]), Tree.chain([1])
    one.signals.append(0.5)
    assert other.signals == []
