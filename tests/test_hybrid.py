"""The hybrid: two drafts side by side in a batch, each with a memory of its own, and nothing lost."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import caches
import pytest
import torch
from torch import Tensor

from selfspec.axes import DRAFT, GATE
from selfspec.engine.torch.session import Scheduler
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft import hybrid
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.draft.hybrid import Hybrid, merged
from selfspec.speculation.fit import split, trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Cycle, Request

pytestmark = pytest.mark.usefixtures("inference")

EXIT = 3
NGRAM = DRAFT.new("hybrid", exit_layer=EXIT, lookup="ngram", learned="layerskip", max_match=4, min_match=2)
SUFFIX = DRAFT.new("hybrid", exit_layer=EXIT, lookup="suffix", learned="layerskip", max_match=4, min_match=1, width=3)
HYBRIDS = {
    "ngram or layerskip": NGRAM,
    "ngram and layerskip": replace(NGRAM, budget=9),
    "suffix or layerskip": replace(SUFFIX, min_match=2),
    "suffix and layerskip": replace(SUFFIX, budget=9),
}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Llama:
    """Late layers matter more than in the file, and no token ends a text."""
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    for layer in model.layers[EXIT:]:
        layer.out *= 8
        layer.down *= 8
    return model


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(6)
    return [Request(tuple(rng.choices(range(80), k=n)), 40, ignore_eos=True) for n in (3, 12, 30, 7)]


def decoded(
    draft: Draft, requests: Sequence[Request], k: int, rows: int, doubts: Gate | None = None
) -> list[Completion]:
    model = draft.model
    target = Target(model, model.shape.layers, model.norm)
    cache = model.new_cache(30 + 40 + draft.nodes(k), rows, draft.layers)
    evict = cache.evict

    def checked(row: int) -> None:
        caches.check(cache, model.shape.layers)
        evict(row)

    cache.evict = checked  # type: ignore[method-assign]
    speculation = Speculation(target, draft, doubts or Gate(), Controller(k), LongestPrefix())
    return Scheduler(speculation, cache).run(requests)


@pytest.fixture(scope="module")
def plain(model: Llama, requests: list[Request]) -> list[Completion]:
    return decoded(Draft(model), requests, 0, 1)


@pytest.mark.parametrize("gate_name", ["none", "maxp"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("name", HYBRIDS)
def test_tokens_are_those_of_plain_decoding(
    model: Llama, requests: list[Request], plain: list[Completion], name: str, k: int, rows: int, gate_name: str
) -> None:
    draft = HYBRIDS[name].make(model, None)
    got = decoded(
        draft, requests, k, rows, GATE.new(gate_name, **({"threshold": 0.5} if gate_name != "none" else {})).make()
    )
    assert [c.tokens for c in got] == [c.tokens for c in plain]
    cycles: list[Cycle] = [cycle for completion in got for cycle in completion.cycles]
    assert 0 < sum(c.accepted for c in cycles) < sum(c.proposed for c in cycles), "else nothing is proven"
    assert all(c.depth <= c.k_asked and c.proposed < draft.nodes(k) for c in cycles)
    if gate_name == "maxp":
        asked = [c for c in cycles if c.signals]
        assert asked and (len(asked) < len([c for c in cycles if c.k_asked])) == (draft.budget is None)


class Told(Draft):
    """Proposes a given tree for each row, and keeps count of what it is told."""

    def __init__(self, model: Llama, trees: Sequence[Tree] = ()) -> None:
        super().__init__(model)
        self.trees, self.asked = list(trees), list[list[int]]()

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        self.asked.append(list(ks))
        bare = [Tree.chain(row.tokens[-1:]) for row in rows]
        return Proposal([tree if k else root for tree, root, k in zip(self.trees, bare, ks, strict=True)])

    def observe(self, row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        row.memory = [*(row.memory or []), self, *tokens]


def rows(count: int) -> list[Seq]:
    made = [Seq(Request((1, 2, 5), 9)) for _ in range(count)]
    for row in made:
        row.memory = hybrid.Memories()
    return made


class TestWhoIsAsked:
    CHAIN, ROOT, OTHER = Tree.chain([5, 6, 7]), Tree.chain([5]), Tree.chain([5, 8])

    def both(self, model: Llama, budget: int | None) -> tuple[Told, Told, Hybrid]:
        lookup, learned = Told(model, [self.CHAIN, self.ROOT]), Told(model, [self.OTHER, self.OTHER])
        return lookup, learned, Hybrid(model, lookup, learned, budget)

    def test_the_learned_draft_only_for_rows_without_a_match(self, model: Llama) -> None:
        lookup, learned, draft = self.both(model, None)
        proposal = draft.propose(rows(2), [2, 3], Gate(), model.new_cache(9))
        assert (lookup.asked, learned.asked) == ([[2, 3]], [[0, 3]])
        assert [tree.tokens for tree in proposal.trees] == [[5, 6, 7], [5, 8]]
        assert proposal.hidden is None and proposal.depth == 0

    def test_not_at_all_where_every_row_has_one_or_nothing_is_asked(self, model: Llama) -> None:
        _, learned, draft = self.both(model, None)
        proposal = draft.propose(rows(2), [2, 0], Gate(), model.new_cache(9))
        assert learned.asked == [] and [len(tree) for tree in proposal.trees] == [3, 1]

    def test_for_every_row_with_a_budget(self, model: Llama) -> None:
        _, learned, draft = self.both(model, 2)
        proposal = draft.propose(rows(2), [2, 2], Gate(), model.new_cache(9))
        assert learned.asked == [[2, 2]]
        assert [(tree.tokens, tree.parents) for tree in proposal.trees] == [([5, 8, 6], [-1, 0, 0]), ([5, 8], [-1, 0])]

    def test_each_keeps_its_own_memory(self, model: Llama) -> None:
        lookup, learned, draft = self.both(model, None)
        (row,) = rows(1)
        for new in ([1, 2], [3]):
            draft.observe(row, 0, new, torch.empty(0), model.new_cache(9))
        assert (row.memory.lookup, row.memory.learned) == ([lookup, 1, 2, lookup, 3], [learned, 1, 2, learned, 3])


class TestMerged:
    BASE = Tree([5, 6, 7, 8], [-1, 0, 1, 2], signals=[0.1, 0.2])
    OVER = Tree([5, 6, 9, 7, 4, 3], [-1, 0, 0, 1, 3, 2])

    def test_common_nodes_are_one(self) -> None:
        tree = merged(self.BASE, self.OVER, None)
        assert (tree.tokens, tree.parents) == ([5, 6, 7, 8, 9, 4, 3], [-1, 0, 1, 2, 0, 2, 4])
        assert tree.signals == [0.1, 0.2] and len(self.BASE) == 4, "the trees it is made of are left alone"

    @pytest.mark.parametrize(("budget", "tokens"), [(3, []), (4, [9]), (5, [9, 4]), (2, [])])
    def test_up_to_the_budget(self, budget: int, tokens: list[int]) -> None:
        assert merged(self.BASE, self.OVER, budget).tokens[4:] == tokens

    def test_what_has_no_parent_there_is_left_out(self) -> None:
        over = Tree([5, 1, 2, 6, 7], [-1, 0, 1, 0, 3])
        tree = merged(Tree.chain([5, 6]), over, 1)
        assert tree.tokens == [5, 6]

    def test_drawn_tokens_stand_alone(self) -> None:
        drawn = Tree([5, 6], [-1, 0], drawn_from=torch.ones(1, 80) / 80)
        assert merged(drawn, self.OVER, None) is drawn


def test_layers_run_once_where_all_rows_are_served_alike(
    model: Llama, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch of one: a lookup runs no layer before verification, and early exit none a second time."""
    passes: list[tuple[int, int, int]] = []
    real = Llama.run

    def counting(self: Llama, hidden: Tensor, cache: KVCache, at: object, first: int, last: int) -> Tensor:
        passes.append((len(hidden), first, last))
        return real(self, hidden, cache, at, first, last)  # type: ignore[arg-type]

    monkeypatch.setattr(Llama, "run", counting)
    (got,) = decoded(NGRAM.make(model, None), requests[2:3], 4, 1)
    passes.pop(0)
    kinds = set()
    for cycle in got.cycles:
        nodes = cycle.proposed + 1
        looked_up = passes[0] == (nodes, 0, 6)
        kinds.add((looked_up, cycle.proposed > 0))
        wanted = [(nodes, 0, 6)] if looked_up else [*[(1, 0, EXIT)] * nodes, (nodes, EXIT, 6)]
        assert [passes.pop(0) for _ in wanted] == wanted
    assert not passes and kinds >= {(True, True), (False, True)}


def test_both_find_what_the_fit_stage_made_for_them(
    model: Llama, requests: list[Request], plain: list[Completion]
) -> None:
    config = replace(SUFFIX, budget=9, vocab=40, corpus=True)
    traces = [
        trace(model, request.tokens, answer.tokens, EXIT) for request, answer in zip(requests, plain, strict=True)
    ]
    head = config.fit(model, *split(traces * 5), 0)
    assert len(head.tensors["ids"]) == 40 and "corpus" in head.tensors and "agreement" in head.facts
    got = decoded(config.make(model, head), requests, 6, 3)
    assert [c.tokens for c in got] == [c.tokens for c in plain]
    assert len(replace(config, corpus=False).fit(model, *split(traces * 5), 0).tensors) == 1
