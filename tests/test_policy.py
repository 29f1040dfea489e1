"""policy: which drafted tokens stand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfspec.axes import POLICY, PolicyOptions
from selfspec.model.tree import Tree
from selfspec.speculation.policy import rejection
from selfspec.speculation.policy.base import Choice, Policy, Verdict
from selfspec.speculation.policy.longest_prefix import LongestPrefix, longest_prefix
from selfspec.speculation.policy.rejection import Rejection
from selfspec.speculation.sampling import Purpose, distribution, draw, uniform
from selfspec.types import GREEDY, Sampling

RELAXED = {
    "conf_threshold": POLICY.new("conf_threshold", threshold=0.25),
    "topk_agree": POLICY.new("topk_agree", k=2),
    "typical": POLICY.new("typical", epsilon=0.3, delta=0.5),
}
STRICT = [LongestPrefix(), Rejection(), *(RELAXED[name].make() for name in ("conf_threshold", "typical"))]
STRICT.append(POLICY.new("topk_agree", k=1).make())
"""Those that let nothing but the argmax stand where the target is certain of it."""
ANY = Choice(GREEDY, 0)


def bush() -> Tree:
    """Root 9; its children 1 (node 1) and 2 (node 2); node 1's: 3 (3) and 4 (4); node 2's: 3 (5); node 4's: 5 (6)."""
    return Tree([9, 1, 2, 3, 4, 3, 5], [-1, 0, 0, 1, 1, 2, 4])


def wants(*tokens: int) -> Tensor:
    """Logits ``[nodes, 10]`` by which the target is all but certain of one token after each node."""
    return 20 * F.one_hot(torch.tensor(tokens), 10).float()


@pytest.mark.parametrize(
    ("drafted", "wanted", "accepted"),
    [
        ([], [7], 0),
        ([3], [3, 7], 1),
        ([3], [4, 7], 0),
        ([3, 5, 2], [3, 5, 2, 7], 3),
        ([3, 5, 2], [3, 5, 4, 7], 2),
        ([3, 5, 2], [4, 5, 2, 7], 0),  # what comes after a wrong token never stands
        ([3, 5, 2], [3, 4, 2, 7], 1),
        ([3, 3, 3], [3, 3, 7, 3], 2),
        ([0, 0], [0, 0, 0], 2),
    ],
)
@pytest.mark.parametrize("judge", STRICT)
def test_of_a_chain_all_policies_take_the_prefix_the_target_is_certain_of(
    judge: Policy, drafted: list[int], wanted: list[int], accepted: int
) -> None:
    (verdict,) = judge([Tree.chain([8, *drafted])], wants(*wanted), [ANY])
    assert verdict == Verdict([*range(accepted + 1)], wanted[accepted])
    assert isinstance(verdict.token, int)


@pytest.mark.parametrize(
    ("wanted", "verdict"),
    [
        ([0, 7, 7, 7, 7, 7, 7], ([0], 0)),
        ([1, 4, 7, 7, 5, 7, 6], ([0, 1, 4, 6], 6)),
        ([1, 3, 7, 8, 5, 7, 6], ([0, 1, 3], 8)),
        ([2, 7, 3, 7, 7, 4, 7], ([0, 2, 5], 4)),  # not node 3, which holds the same token under another parent
        ([2, 3, 4, 7, 7, 4, 7], ([0, 2], 4)),
    ],
)
@pytest.mark.parametrize("judge", STRICT)
def test_of_a_tree_all_policies_take_the_path_the_target_is_certain_of(
    judge: Policy, wanted: list[int], verdict: tuple[list[int], int]
) -> None:
    assert judge([bush()], wants(*wanted), [ANY]) == [verdict]


@pytest.mark.parametrize("judge", STRICT)
def test_every_row_is_judged_by_its_own_logits(judge: Policy) -> None:
    trees = [bush(), Tree.chain([4]), Tree.chain([1, 3, 5, 2]), bush()]
    logits = wants(2, 7, 3, 7, 7, 4, 7, 6, 3, 5, 4, 7, 1, 4, 7, 7, 5, 7, 6)
    together = judge(trees, logits, [ANY] * 4)
    assert together == [([0, 2, 5], 4), ([0], 6), ([0, 1, 2], 4), ([0, 1, 4, 6], 6)]


@pytest.mark.parametrize("judge", [LongestPrefix(), Rejection()])
def test_of_equal_logits_the_first_is_wanted_as_in_plain_decoding(judge: Policy) -> None:
    logits = torch.zeros(2, 8)
    logits[:, [2, 5]] = 1
    assert judge([Tree.chain([0, 2])], logits, [ANY]) == [([0, 1], 2)]
    assert judge([Tree.chain([0, 5])], logits, [ANY]) == [([0], 2)]


def test_rejection_draws_each_token_by_its_positions_own_number() -> None:
    tree, logits = bush(), torch.randn(7, 10, generator=torch.Generator().manual_seed(3))
    logits[:, :6] += 2
    lengths = set()
    for seed in range(60):
        sampling = Sampling(0.8, top_k=6, top_p=0.95, seed=seed)
        (verdict,) = Rejection()([tree], logits, [Choice(sampling, 17)])
        drawn = [*(tree.tokens[node] for node in verdict.path[1:]), verdict.token]
        for depth, (node, token) in enumerate(zip(verdict.path, drawn, strict=True)):
            number = uniform(seed, 17 + depth, Purpose.target)
            assert token == draw(distribution(logits[node], sampling), number)
        assert tree.child(verdict.path[-1], verdict.token) is None
        lengths.add(len(verdict.path))
    assert lengths == {1, 2, 3, 4}


def test_rows_of_a_batch_are_sampled_each_in_its_own_way() -> None:
    trees, logits = [bush()] * 4, torch.randn(28, 10, generator=torch.Generator().manual_seed(4))
    samplings = [Sampling(1.0, seed=5), GREEDY, Sampling(1.0, seed=6), Sampling(2.0, top_k=3, seed=5)]
    choices = [Choice(sampling, 3 + i) for i, sampling in enumerate(samplings)]
    alone = [Rejection()([bush()], logits[7 * i : 7 * i + 7], [choices[i]])[0] for i in range(4)]
    assert Rejection()(trees, logits, choices) == alone
    assert LongestPrefix()([bush()], logits[7:14], [ANY]) == [alone[1]]


def drafted(q: Tensor, *tokens: int) -> Tree:
    tree = Tree.chain([0, *tokens])
    tree.drawn_from = q.expand(len(tokens), -1)
    return tree


def test_a_token_drawn_from_q_stands_with_probability_p_over_q() -> None:
    p, q = torch.tensor([0.1, 0.6, 0.3]), torch.tensor([0.4, 0.2, 0.4])
    logits = p.log().expand(2, -1)
    seeds = range(400)
    choices = [Choice(Sampling(1.0, seed=seed), 5) for seed in seeds]
    for token, ratio in enumerate([0.25, 1, 0.75]):
        verdicts = [Rejection()([drafted(q, token)], logits, [choice])[0] for choice in choices]
        stood = [len(verdict.path) == 2 for verdict in verdicts]
        assert stood == [uniform(seed, 5, Purpose.accept) < ratio for seed in seeds]
        # Only token 1 is drafted less often than the target wants it.
        assert all(verdict.token == 1 for verdict, stands in zip(verdicts, stood, strict=True) if not stands)


def test_a_token_that_the_target_rules_out_never_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "uniform", lambda *where: 0.0)
    logits, q = torch.tensor([0.0, -torch.inf]).expand(2, -1), torch.tensor([0.5, 0.5])
    assert Rejection()([drafted(q, 1)], logits, [Choice(Sampling(1.0), 5)]) == [([0], 0)]


def test_a_draft_that_is_the_target_always_stands() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(8))
    for seed in range(50):
        sampling = Sampling(0.9, top_p=0.8, seed=seed)
        q = torch.stack([distribution(row, sampling) for row in logits[:3]])
        tree = Tree.chain([0, *(draw(q[i], uniform(seed, 5 + i, Purpose.draft, i)) for i in range(3))])
        tree.drawn_from = q
        assert Rejection()([tree], logits, [Choice(sampling, 5)])[0].path == [0, 1, 2, 3]


def test_at_temperature_zero_what_a_draft_was_drawn_from_is_of_no_interest() -> None:
    q = torch.full((10,), 0.1)
    assert Rejection()([drafted(q, 3, 5, 2)], wants(3, 5, 4, 7), [ANY]) == [([0, 1, 2], 4)]


@pytest.mark.parametrize("sampled", [False, True])
def test_distributions_are_computed_for_visited_nodes_only(monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    seen: list[Tensor] = []

    def counting(logits: Tensor, sampling: Sampling) -> Tensor:
        seen.append(logits)
        return distribution(logits, sampling)

    monkeypatch.setattr(rejection, "distribution", counting)
    logits = wants(3, 5, 4, 7, 7, 7)
    tree = drafted(torch.full((10,), 0.1), 3, 5, 2, 1, 1) if sampled else Tree.chain([8, 3, 5, 2, 1, 1])
    (verdict,) = Rejection()([tree], logits, [Choice(Sampling(0.5), 9)])
    assert verdict == ([0, 1, 2], 4)
    assert [logits.tolist() for logits in seen] == logits[:3].tolist()


# p = .5, .3, .1, .1 at every node. The argmax is 0; the others are allowed or not.
MILD = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (POLICY.new("conf_threshold", threshold=0.4), {0}),
        (POLICY.new("conf_threshold", threshold=0.29), {0, 1}),
        (POLICY.new("conf_threshold", threshold=0.09), {0, 1, 2, 3}),
        (POLICY.new("topk_agree", k=1), {0}),
        (POLICY.new("topk_agree", k=2), {0, 1}),
        (POLICY.new("topk_agree", k=3), {0, 1, 2, 3}),  # 2 and 3 are equally likely
        (POLICY.new("topk_agree", k=1000), {0, 1, 2, 3}),
        (POLICY.new("typical", epsilon=0.29, delta=1.0), {0, 1}),  # exp(-H) = 0.3109
        (POLICY.new("typical", epsilon=0.31, delta=1.0), {0}),
        (POLICY.new("typical", epsilon=1.0, delta=0.97), {0}),  # 0.97 exp(-H) = 0.3015
        (POLICY.new("typical", epsilon=1.0, delta=0.96), {0, 1}),  # 0.2984
        (POLICY.new("typical", epsilon=1.0, delta=0.3), {0, 1, 2, 3}),
        (POLICY.new("typical", epsilon=0.05, delta=1.0), {0, 1, 2, 3}),
    ],
)
def test_a_relaxed_policy_lets_stand_what_it_says(asked: PolicyOptions, allowed: set[int]) -> None:
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.1, 0.1))
    assert math.exp(-entropy) == pytest.approx(0.3109, abs=1e-4)
    logits = (MILD + 3).expand(3, -1)
    for token in range(4):
        (verdict,) = asked.make()([Tree.chain([7, token, token])], logits, [ANY])
        assert verdict == ([0, 1, 2] if token in allowed else [0], 0), token


@pytest.mark.parametrize("name", RELAXED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_several_allowed_children_the_argmax_comes_first_then_the_drafts_order(
    name: str, dtype: torch.dtype
) -> None:
    judge = RELAXED[name].make()

    def path(*tokens: int) -> list[int]:
        tree = Tree([7, *tokens], [-1, *[0] * len(tokens)])
        logits = torch.tensor([0.40, 0.31, 0.31, 0.01]).log().expand(len(tree), -1)
        return judge([tree], logits.to(dtype), [ANY])[0].path

    assert path(3, 2, 1, 0) == [0, 4]
    assert path(3, 2, 1) == [0, 2]
    assert path(1, 3, 2) == [0, 1]
    assert path(3) == [0]


def test_a_relaxed_policy_goes_on_below_what_it_let_stand() -> None:
    logits = wants(0, 0, 3, 0, 0, 6, 0)
    logits[0] = torch.tensor([0.5, 0.1, 0.4, *[1e-9] * 7]).log()  # the argmax, 0, was not drafted; 2 is allowed
    for asked in RELAXED.values():
        assert asked.make()([bush()], logits, [ANY]) == [([0, 2, 5], 6)]


def test_the_target_is_asked_for_no_more_than_the_path() -> None:
    assert longest_prefix(Tree.chain([8, 3, 5]), [4]) == ([0], 4)


def test_they_are_what_they_say_they_are() -> None:
    assert isinstance(POLICY.new("longest_prefix").make(), LongestPrefix)
    assert isinstance(POLICY.new("rejection", temperature=0.5).make(), Rejection)
    assert {name for name, option in POLICY.options.items() if option.lossy} == set(RELAXED)
