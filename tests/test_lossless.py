"""The identity that everything stands on: with an exact policy, speculative tokens are plain decoding's.

Every draft x every gate x K x batch size, in float32; and planted faults, each of which the same check finds.
At every save: every draft x gate at one K, every draft x order of admission in a batch, and all planted faults. Daily:
every draft x K without a gate too. Nightly: what is left of the products.
A new draft is one line in ``DRAFTS``.
"""

import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache as memo
from pathlib import Path
from statistics import quantiles

import caches
import pytest
import torch
from devices import CAPTURES, DEVICE
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfspec.axes import DRAFT, GATE
from selfspec.engine.torch.session import Scheduler
from selfspec.model import graphs
from selfspec.model.attention import AttentionMetadata
from selfspec.model.cache import KVCache
from selfspec.model.graphs import Graphs
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.serve.config import Order
from selfspec.speculation import fit
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.draft.medusa import HeadInit
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, HeadForm, RawExit
from selfspec.speculation.policy.base import Choice, Policy, Verdict
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Cycle, Request

pytestmark = pytest.mark.usefixtures("inference")

EXIT, NEW, POSITIONS, ROOMY = 3, 19, 64, 512
CHUNK = 3
"""Under ``chunked_prefill``: prompts of 3, 12, 1 and 45 tokens are read whole, in even pieces, and in uneven ones."""
OPEN = Gate()
_LSQ = DRAFT.new("lsq", exit_layer=EXIT, form=HeadForm.affine, ridge=1e-3)
_BLOCK = DRAFT.new("eagle", form=HeadForm.block, ridge=1e-3, sgd_epochs=1)
DRAFTS = {
    "none": DRAFT.new("none"),
    "layerskip": DRAFT.new("layerskip", exit_layer=EXIT),
    "lsq": _LSQ,
    "lsq low rank": replace(_LSQ, form=HeadForm.low_rank, rank=8),
    "lsq previous": replace(_LSQ, previous=True),
    "lsq tree": replace(_LSQ, width=3, budget=9),
    "lsq worth": replace(_LSQ, width=8, budget=9, worth=0.02),
    "lsq vocab": replace(_LSQ, vocab=60),
    "adapter": DRAFT.new("adapter", exit_layer=EXIT, ridge=1e-3, sgd_epochs=1),
    "medusa": DRAFT.new("medusa", heads=4, init=HeadInit.lsq, ridge=1e-3),
    "medusa tree": DRAFT.new("medusa", heads=4, init=HeadInit.copy, ridge=1e-3, sgd_epochs=1, width=3, budget=9),
    "medusa worth": DRAFT.new("medusa", heads=4, init=HeadInit.lsq, ridge=1e-3, width=4, worth=0.02),
    "eagle alpha": DRAFT.new("eagle", alpha=0.3),
    "eagle": DRAFT.new("eagle", form=HeadForm.affine, ridge=1e-3),
    "eagle block": _BLOCK,
    "eagle tree": replace(_BLOCK, width=2, budget=9),
    "eagle worth": replace(_BLOCK, width=4, worth=0.02),
    "draft_model": DRAFT.new("draft_model", source="file:{folder}/small"),
    "ngram": DRAFT.new("ngram", max_match=4, min_match=1),
    "suffix": DRAFT.new("suffix", max_match=4, min_match=1, cross_request=True, width=2, budget=9),
    "hybrid": DRAFT.new("hybrid", exit_layer=EXIT, lookup="ngram", learned="layerskip", max_match=4, min_match=2),
}
LOOKUPS = {"ngram", "suffix"}
"""Drafts without a distribution: no gate has anything to say to them."""
KS = (1, 3, 8)
BATCHES = (1, 3)


def tier(gate_name: str, k: int) -> list[pytest.MarkDecorator]:
    """When a case is run, with every draft and batch size: at every save, daily or nightly."""
    if k == 3:
        return []
    return [pytest.mark.slow] if gate_name == "none" else [pytest.mark.nightly]


def unruly(tiny_folder: Path, folder: Path, positions: int) -> Path:
    """The tiny model made unruly: it seldom repeats itself, and late layers matter; in ``small``, the first five."""
    weights = load_file(tiny_folder / "model.safetensors")
    for layer in range(EXIT, 6):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"] *= 8
    weights["lm_head.weight"] = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    config = json.loads((tiny_folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    for place, more in ((folder, {"max_position_embeddings": positions}), (folder / "small", {"num_hidden_layers": 5})):
        shutil.copytree(tiny_folder, place, dirs_exist_ok=True)
        (place / "config.json").write_text(json.dumps(config | more))
        save_file(weights, place / "model.safetensors")
    return folder


class Bench:
    """Requests, drafts and gates for a model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Llama.load(folder, DEVICE, torch.float32)
        self.model.fused = CAPTURES
        self.shape = self.model.shape = replace(self.model.shape, eos=frozenset())
        chance = torch.Generator().manual_seed(6)
        lengths = (3, 12, 1, POSITIONS - NEW)
        prompts = [tuple(torch.randint(80, (n,), generator=chance).tolist()) for n in lengths]
        free = [Request(prompt, NEW, ignore_eos=True) for prompt in prompts]
        said = [token for request in free for token in self.plain(request).tokens[5:15]]
        self.eos = max(set(said), key=said.count)
        self.requests = [replace(request, ignore_eos=False) for request in free]
        self.requests += [free[1], replace(free[2], max_new_tokens=2), replace(free[0], max_new_tokens=1)]
        self.model.shape = replace(self.shape, eos=frozenset({self.eos}))
        self.plain = memo(self.plain)  # type: ignore[method-assign]
        self.head = memo(self.head)  # type: ignore[method-assign]
        self.threshold = memo(self.threshold)  # type: ignore[method-assign]

    def decode(
        self,
        requests: Sequence[Request],
        draft: Draft,
        gate: Gate = OPEN,
        k: int = 0,
        rows: int = 1,
        policy: Policy | None = None,
        kv: type[KVCache] = KVCache,
        order: Order = Order.fcfs,
        static: bool = False,
    ) -> list[Completion]:
        """All of them, by continuous batching; after each step every layer must hold every verified position."""
        s = self.shape
        capacity = max(len(r.tokens) + r.max_new_tokens for r in requests) + draft.nodes(k)
        size = (s.layers + draft.layers, rows, s.kv_heads, capacity if kv is KVCache else ROOMY, s.head_dim)
        cache = kv(*size, torch.float32, self.model.device, s.max_positions, 1 if static else 0)
        if static:  # on a GPU they are captured as graphs, elsewhere run one operator after the other
            self.model._graphs[cache] = Graphs(self.model._static_run(), s.hidden, torch.float32, CAPTURES)
        target = Target(self.model, s.layers, self.model.norm)
        scheduler = Scheduler(
            Speculation(target, draft, gate, Controller(k), policy or LongestPrefix()), cache, order, CHUNK
        )
        numbers = [scheduler.submit(request) for request in requests]
        done = dict[int, Completion]()
        while scheduler.busy:
            done |= {told.number: told.completion for told in scheduler.step() if told.completion}
            caches.check(cache, s.layers)
            assert kv is not KVCache or cache.lengths == [len(seq.tokens) - 1 for seq in scheduler.running]
        return [done[number] for number in numbers]

    def plain(self, request: Request) -> Completion:
        return self.decode([request], Draft(self.model))[0]

    def same(self, draft: Draft, k: int, rows: int, **faulty: object) -> bool:
        """Whether all tokens are plain decoding's."""
        got = self.decode(self.requests, draft, OPEN, k, rows, **faulty)  # type: ignore[arg-type]
        return all(run.tokens == self.plain(r).tokens for run, r in zip(got, self.requests, strict=True))

    def draft(self, name: str) -> Draft:
        """A new one: some remember what they have seen."""
        config = DRAFTS[name]
        if config.name == "draft_model":
            config = replace(config, source=config.source.format(folder=self.folder))
        made: Draft = config.make(self.model, self.head(name) if config.fitted else None)
        return made

    def head(self, name: str) -> Head:
        config = DRAFTS[name]
        chance = torch.Generator().manual_seed(7)
        traces = []
        for _ in range(40):
            prompt = tuple(torch.randint(80, (6,), generator=chance).tolist())
            answer = self.plain(Request(prompt, 20, ignore_eos=True)).tokens
            traces.append(fit.trace(self.model, prompt, answer, config.get("exit_layer")))
        head: Head = config.fit(self.model, *fit.split(traces), 0)
        return head.to(self.model.dtype, self.model.device)

    def threshold(self, name: str, gate_name: str) -> float:
        """The doubtful quartile of the ungated draft's signals: a gate set there stops at every fourth or so."""
        reading = GATE.new(gate_name, threshold=math.nan).make()  # which no signal is above or below: it never stops
        runs = self.decode(self.requests[:4], self.draft(name), reading, 4)
        signals = [signal for run in runs for cycle in run.cycles for signal in cycle.signals]
        return quantiles(signals or [0.0, 0.0], n=4)[0 if gate_name == "maxp" else 2]

    def gate(self, name: str, gate_name: str) -> Gate:
        match gate_name:
            case "none":
                return OPEN
            case "bandit":
                return GATE.new("bandit", arms=[0.0, self.threshold(name, "maxp"), 0.9]).make()
            case _:
                return GATE.new(gate_name, threshold=self.threshold(name, gate_name)).make()


@pytest.fixture(scope="module")
def bench(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The longest of its requests ends at the model's last position."""
    return Bench(unruly(tiny_folder, tmp_path_factory.mktemp("unruly"), POSITIONS))


@pytest.fixture(scope="module")
def roomy(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same with positions to spare: a fault is to be found by what it says, not by where it runs out."""
    return Bench(unruly(tiny_folder, tmp_path_factory.mktemp("roomy"), ROOMY))


@pytest.mark.parametrize(
    ("name", "gate_name", "k", "rows"),
    [
        pytest.param(name, gate_name, k, rows, marks=tier(gate_name, k))
        for name, gate_name, k, rows in itertools.product(DRAFTS, GATE.options, KS, BATCHES)
    ],
)
def test_tokens_are_those_of_plain_decoding(
    bench: Bench, ticking: None, name: str, gate_name: str, k: int, rows: int
) -> None:
    cycles: list[Cycle] = []
    draft = bench.draft(name)
    runs = bench.decode(bench.requests, draft, bench.gate(name, gate_name), k, rows)
    for request, got in zip(bench.requests, runs, strict=True):
        wanted = bench.plain(request)
        assert (got.tokens, got.finish) == (wanted.tokens, wanted.finish)
        assert sum(cycle.new_tokens for cycle in got.cycles) + 1 == len(got.tokens)
        cycles += got.cycles
    assert {cycle.batch for cycle in cycles} >= {1} if rows == 1 else {cycle.batch for cycle in cycles} >= {rows}
    if name == "none":
        assert all(cycle.proposed == 0 and cycle.new_tokens == 1 for cycle in cycles)
        return
    for c in cycles:
        assert 0 <= c.accepted <= c.depth <= c.k_asked <= k and c.proposed >= c.depth
        assert 1 <= c.new_tokens <= c.accepted + 1 and c.proposed < draft.nodes(k)
    accepted, proposed = sum(c.accepted for c in cycles), sum(c.proposed for c in cycles)
    assert 0 < accepted < proposed, "else nothing is proven"
    reads = gate_name != "none" and name.split()[0] not in LOOKUPS
    assert any(c.signals for c in cycles) == reads
    if reads and gate_name != "bandit":  # which may come to prefer a threshold that never stops
        assert 0 < sum(c.depth < c.k_asked for c in cycles) < len(cycles)
    learned = name.split()[0] not in LOOKUPS | {"hybrid"}
    if learned and gate_name == "none" and DRAFTS[name].get("width", 1) == 1 and k <= DRAFTS[name].get("heads", k):
        assert all(c.depth == c.k_asked for c in cycles), "nothing else stops a chain"


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", DRAFTS)
def test_passes_of_a_fixed_shape_change_no_tokens(bench: Bench, name: str, rows: int) -> None:
    """What a graph replays: padded rows and nodes, and a mask made from bits."""
    runs = bench.decode(bench.requests, bench.draft(name), k=5, rows=rows, static=True)
    for request, got in zip(bench.requests, runs, strict=True):
        assert (got.tokens, got.finish) == (bench.plain(request).tokens, bench.plain(request).finish)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.nightly), 3])
@pytest.mark.parametrize("order", [order for order in Order if order is not Order.fcfs])
@pytest.mark.parametrize("name", DRAFTS)
def test_no_order_of_admission_changes_tokens(bench: Bench, name: str, order: Order, rows: int) -> None:
    runs = bench.decode(bench.requests, bench.draft(name), k=3, rows=rows, order=order)
    for request, got in zip(bench.requests, runs, strict=True):
        assert (got.tokens, got.finish) == (bench.plain(request).tokens, bench.plain(request).finish)


def test_some_stop_early_and_some_do_not(bench: Bench) -> None:
    """So that the test above covers both, and a stop in the middle of a cycle."""
    plain = [bench.plain(request) for request in bench.requests]
    assert {completion.finish for completion in plain[:4]} == {"stop", "length"}
    assert all((bench.eos in c.tokens) == (c.finish == "stop") and bench.eos not in c.tokens[:-1] for c in plain[:4])
    assert [len(completion.tokens) for completion in plain[4:]] == [NEW, 2, 1] and bench.eos in plain[4].tokens
    assert any(len(r.tokens) + len(c.tokens) == POSITIONS for r, c in zip(bench.requests, plain, strict=True))
    speculative = bench.decode(bench.requests, Thicket(bench), k=5)
    assert any(c.cycles[-1].new_tokens <= c.cycles[-1].accepted for c in speculative if c.cycles)
    assert len({token for completion in plain for token in completion.tokens}) > 20


class Thicket(Draft):
    """Random trees of right and wrong tokens, which know what the model will say.

    Right tokens follow right ones and wrong ones, before and behind their wrong siblings, so that a node which
    sees what it must not, stands where it must not or is kept where it does not belong gives other tokens.
    With ``depth``, the first layers are run here: some nodes first, then the others.
    """

    def __init__(self, bench: Bench, depth: int = 0) -> None:
        super().__init__(bench.model)
        self.bench, self.depth = bench, depth

    def nodes(self, k: int) -> int:
        return 1 + 4 * k

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        trees = [self.grown(row, k) for row, k in zip(rows, ks, strict=True)]
        if not self.depth:
            return Proposal(trees)
        first = min(map(len, trees)) // 2
        begun = [Tree(tree.tokens[:first], tree.parents[:first]) for tree in trees]
        parts = [self.early(trees, first, cache)] if not first else []
        if first:
            early, late = self.early(begun, 0, cache), self.early(trees, first, cache)
            late_of = torch.split(late, [len(tree) - first for tree in trees])
            parts = [part for pair in zip(torch.split(early, first), late_of, strict=True) for part in pair]
        return Proposal(trees, torch.cat(parts), self.depth)

    def early(self, trees: Sequence[Tree], first: int, cache: KVCache) -> Tensor:
        at = cache.place(trees, first=first)
        tokens = [token for tree in trees for token in tree.tokens[first:]]
        return self.model.run(self.model.embed(tokens, at), cache, at, 0, self.depth)

    def grown(self, row: Seq, k: int) -> Tree:
        rng = random.Random(str((row.request.tokens, len(row.tokens))))
        said = self.bench.plain(replace(row.request, ignore_eos=True, max_new_tokens=NEW)).tokens
        at = len(row.output_tokens())
        tree, depths = Tree.chain(row.tokens[-1:]), [0]
        for _ in range(4 * k if rng.random() < 0.9 else 0):
            parent = rng.choice([i for i, depth in enumerate(depths) if depth < k] + [len(depths) - 1] * 2)
            if depths[parent] == k:
                continue
            right = said[at + depths[parent]]
            token = right if rng.random() < 0.6 else rng.randrange(80)
            if tree.child(parent, token) is None:
                tree.add(parent, token)
                depths.append(depths[parent] + 1)
        return tree


class TestTrees:
    @pytest.mark.parametrize("rows", BATCHES)
    @pytest.mark.parametrize("depth", [0, EXIT])
    @pytest.mark.parametrize("k", KS)
    def test_tokens_are_those_of_plain_decoding(self, bench: Bench, k: int, depth: int, rows: int) -> None:
        runs = bench.decode(bench.requests, Thicket(bench, depth), k=k, rows=rows)
        for request, got in zip(bench.requests, runs, strict=True):
            assert (got.tokens, got.finish) == (bench.plain(request).tokens, bench.plain(request).finish)
        cycles = [cycle for run in runs for cycle in run.cycles]
        assert all(0 <= c.accepted <= c.depth <= c.k_asked <= k and c.proposed >= c.depth for c in cycles)
        assert any(c.proposed > c.depth for c in cycles) and any(c.proposed == 0 < c.k_asked for c in cycles)
        accepted = [c.accepted for c in cycles]
        assert set(accepted) == {0, 1} if k == 1 else len(set(accepted)) >= 4


class Wrap(Draft):
    """A draft whose proposals are tampered with."""

    def __init__(self, draft: Draft, change: Callable[[Proposal], Proposal]) -> None:
        super().__init__(draft.model)
        self.draft, self.change = draft, change

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        return self.change(self.draft.propose(rows, ks, gate, cache))


class NoRollBack(KVCache):
    """Counts all that was written as verified."""

    def place(self, trees: Sequence[Tree], first: int = 0, row: int | None = None) -> AttentionMetadata:
        rows = range(len(trees)) if row is None else [row]
        self.stops = {row: self.lengths[row] + len(tree) for row, tree in zip(rows, trees, strict=True)}
        return super().place(trees, first, row)

    def commit(self, row: int, path: Sequence[int]) -> None:
        super().commit(row, path)
        self.lengths[row] = self.stops[row]


class Forgetful(KVCache):
    """Leaves the keys and values of a path where the tree had them."""

    def commit(self, row: int, path: Sequence[int]) -> None:
        self.lengths[row] += len(path)


class BySlot(KVCache):
    """Takes a node's slot for its position."""

    def place(self, trees: Sequence[Tree], first: int = 0, row: int | None = None) -> AttentionMetadata:
        at = super().place(trees, first, row)
        at.positions = slice(at.start, at.stop) if at.slot is None else at.slot
        return at


class Judged(LongestPrefix):
    """A policy that changes its mind."""

    def __init__(self, change: Callable[[Tree, Verdict, list[int]], Verdict]) -> None:
        self.change = change

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        verdicts = super().__call__(trees, logits, choices)
        wanted = [part.argmax(-1).tolist() for part in torch.split(logits, [len(tree) for tree in trees])]
        return [self.change(*row) for row in zip(trees, verdicts, wanted, strict=True)]


def one_too_many(tree: Tree, verdict: Verdict, wanted: list[int]) -> Verdict:
    children = [i for i, parent in enumerate(tree.parents) if parent == verdict.path[-1]]
    path = verdict.path + children[:1]
    return Verdict(path, wanted[path[-1]])


def one_too_few(tree: Tree, verdict: Verdict, wanted: list[int]) -> Verdict:
    """Exact, only slow: so the identity, rightly, does not mind it."""
    path = verdict.path[:-1] or [0]
    return Verdict(path, wanted[path[-1]])


@pytest.mark.parametrize(("k", "rows"), [(1, 3), (3, 1), (8, 3)])
class TestPlantedFaults:
    """Each is found; the untouched draft and a merely timid policy pass the same check."""

    def test_none(self, roomy: Bench, k: int, rows: int) -> None:
        for draft in (roomy.draft("layerskip"), Thicket(roomy), Thicket(roomy, EXIT)):
            assert roomy.same(draft, k, rows) and roomy.same(draft, k, rows, policy=Judged(one_too_few))

    def test_a_token_too_many_is_accepted(self, roomy: Bench, k: int, rows: int) -> None:
        for draft in (roomy.draft("layerskip"), Thicket(roomy)):
            assert not roomy.same(draft, k, rows, policy=Judged(one_too_many))

    def test_the_cache_does_not_roll_back(self, roomy: Bench, k: int, rows: int) -> None:
        assert not roomy.same(roomy.draft("layerskip"), k, rows, kv=NoRollBack)

    def test_the_hidden_states_are_of_a_layer_too_early(self, roomy: Bench, k: int, rows: int) -> None:
        early = EarlyExit(roomy.model, EXIT - 1, RawExit(roomy.model))
        assert roomy.same(early, k, rows)
        with pytest.raises(AssertionError, match=r"layer 2, row .* written"):
            roomy.same(Wrap(early, lambda proposal: proposal._replace(depth=EXIT)), k, rows)

    def test_the_hidden_states_are_of_a_layer_too_late(self, roomy: Bench, k: int, rows: int) -> None:
        late = Wrap(roomy.draft("layerskip"), lambda proposal: proposal._replace(depth=EXIT - 1))
        assert not roomy.same(late, k, rows)

    def test_the_hidden_states_are_of_another_position(self, roomy: Bench, k: int, rows: int) -> None:
        def rolled(proposal: Proposal) -> Proposal:
            hidden = proposal.hidden  # none where nothing was drafted
            return proposal if hidden is None else proposal._replace(hidden=hidden.roll(1, 0))

        assert not roomy.same(Wrap(roomy.draft("layerskip"), rolled), k, rows)

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("depth", [0, EXIT])
    def test_siblings_see_each_other(
        self, roomy: Bench, k: int, rows: int, depth: int, static: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Tree.ancestors

        def too_much(self: Tree) -> list[int]:
            siblings = ([i for i in range(node) if self.parents[i] == self.parents[node]] for node in range(len(self)))
            return [seen | sum(1 << i for i in beside) for seen, beside in zip(real(self), siblings, strict=True)]

        monkeypatch.setattr(Tree, "ancestors", too_much)
        assert not roomy.same(Thicket(roomy, depth), k, rows, static=static)

    @pytest.mark.parametrize("depth", [0, EXIT])
    def test_a_path_that_stands_is_not_moved_up(self, roomy: Bench, k: int, rows: int, depth: int) -> None:
        assert not roomy.same(Thicket(roomy, depth), k, rows, kv=Forgetful)

    @pytest.mark.parametrize("depth", [0, EXIT])
    def test_positions_are_slots(self, roomy: Bench, k: int, rows: int, depth: int) -> None:
        assert not roomy.same(Thicket(roomy, depth), k, rows, kv=BySlot)

    def test_static_passes_without_a_fault(self, roomy: Bench, k: int, rows: int) -> None:
        for draft in (roomy.draft("layerskip"), Thicket(roomy), Thicket(roomy, EXIT)):
            assert roomy.same(draft, k, rows, static=True)

    def test_a_static_pass_has_a_wrong_bit(
        self, roomy: Bench, k: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nodes do not see the root."""
        real = Tree.ancestors
        monkeypatch.setattr(Tree, "ancestors", lambda tree: [1, *(seen & ~1 for seen in real(tree)[1:])])
        assert not roomy.same(Thicket(roomy), k, rows, static=True)

    def test_padding_of_a_static_pass_writes_into_its_row(
        self, roomy: Bench, k: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = graphs._Pass.fill

        def astray(made: graphs._Pass, hidden: Tensor, at: AttentionMetadata) -> None:
            real(made, hidden, at)
            slots = made.metadata().slot
            slots[slots == len(made._slots) - 1] = 0

        monkeypatch.setattr(graphs._Pass, "fill", astray)
        with pytest.raises(AssertionError, match="not written"):  # as padding comes from zeros
            roomy.same(Thicket(roomy), k, rows, static=True)

    def test_the_output_of_a_static_pass_is_not_copied(
        self, roomy: Bench, k: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next replay writes over it."""
        monkeypatch.setattr(graphs._Pass, "own", lambda made: made.result[: made._places])
        assert not roomy.same(roomy.draft("layerskip"), k, rows, static=True)
