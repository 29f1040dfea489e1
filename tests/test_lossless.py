"""The identity that everything stands on: with an exact policy, speculative tokens are plain decoding's.

Every draft x every gate x K, in float32; and three planted faults, each of which the same check finds.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache as memo
from pathlib import Path
from statistics import quantiles

import pytest
import torch
from torch import Tensor

from selfspec.config import Draft as DraftConfig
from selfspec.config import Gate as GateConfig
from selfspec.config import GateName, HeadForm
from selfspec.engine import fit, gate
from selfspec.engine.cache import KVCache
from selfspec.engine.controller import Fixed
from selfspec.engine.decode import Target, decode
from selfspec.engine.draft import layerskip, lsq, none
from selfspec.engine.draft.base import Draft, Proposal, Verified
from selfspec.engine.draft.layerskip import EarlyExit
from selfspec.engine.gate import Gate
from selfspec.engine.head import RawExit
from selfspec.engine.llama import Llama
from selfspec.engine.policy import Policy, Verdict, longest_prefix
from selfspec.types import Completion, Cycle, Request

pytestmark = pytest.mark.usefixtures("inference")

EXIT, NEW = 3, 23  # 22 tokens after the first: no multiple of K + 1 for any K here but 1
OPEN = gate.make(GateConfig())
_LSQ = DraftConfig("lsq", EXIT, HeadForm.affine, ridge=1e-3)
DRAFTS = {
    "none": DraftConfig("none"),
    "layerskip": DraftConfig("layerskip", EXIT),
    "lsq": _LSQ,
    "lsq low rank": replace(_LSQ, form=HeadForm.low_rank, rank=8),
    "lsq previous": replace(_LSQ, previous=True),
}
KS = (1, 2, 3, 5, 8)


class Bench:
    """Requests, drafts and gates for the tiny model, made unruly: it seldom repeats itself, and late layers matter."""

    def __init__(self, folder: Path) -> None:
        self.model = Llama.load(folder, torch.device("cpu"), torch.float32)
        for layer in self.model.layers[EXIT:]:
            layer.out *= 8
            layer.down *= 8
        self.model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
        self.shape = self.model.shape
        random = torch.Generator().manual_seed(6)
        prompts = [tuple(torch.randint(80, (n,), generator=random).tolist()) for n in (3, 12, 30)]
        self.requests = [Request(prompt, NEW, ignore_eos=True) for prompt in prompts]
        said = [token for request in self.requests for token in self.plain(request).tokens[5:15]]
        self.eos = max(set(said), key=said.count)
        self.requests += [replace(request, ignore_eos=False) for request in self.requests]
        self.model.shape = replace(self.shape, eos=frozenset({self.eos}))
        self.plain = memo(self.plain)  # type: ignore[method-assign]
        self.draft = memo(self.draft)  # type: ignore[method-assign]
        self.threshold = memo(self.threshold)  # type: ignore[method-assign]

    def decode(
        self, request: Request, draft: Draft, gate: Gate, k: int, policy: Policy = longest_prefix, kv: type = KVCache
    ) -> Completion:
        """One completion, after which every layer must hold every verified position."""
        s = self.shape
        capacity = len(request.tokens) + request.max_new_tokens - 1 if kv is KVCache else s.max_positions
        cache = kv(s.layers, 1, s.kv_heads, capacity, s.head_dim, torch.float32, torch.device("cpu"))
        target = Target(self.model, s.layers, self.model.norm)
        completion = decode(target, draft, gate, Fixed(k), policy, request, cache)
        cache.check_integrity(s.layers)
        return completion

    def plain(self, request: Request) -> Completion:
        return self.decode(request, none.make(DraftConfig("none"), self.model, None), OPEN, 0)

    def draft(self, name: str) -> Draft:
        config = DRAFTS[name]
        if name == "none":
            return none.make(config, self.model, None)
        if name == "layerskip":
            return layerskip.make(config, self.model, None)
        random = torch.Generator().manual_seed(7)
        parts = []
        for _ in range(40):
            prompt = tuple(torch.randint(80, (6,), generator=random).tolist())
            answer = self.plain(Request(prompt, 20, ignore_eos=True)).tokens
            parts.append(fit.collect(self.model, prompt + answer, len(prompt), EXIT))
        return lsq.make(config, self.model, fit.fit_head(self.model, *fit.split(parts), config, 0))

    def threshold(self, name: str, gate_name: GateName) -> float:
        """The doubtful quartile of the ungated draft's signals: a gate set there stops at every fourth or so."""
        reading = gate.make(GateConfig(gate_name, 0.0)).signal
        runs = [self.decode(r, self.draft(name), Gate(reading, lambda s: False), 4) for r in self.requests[:3]]
        signals = [signal for run in runs for cycle in run.cycles for signal in cycle.signals]
        return quantiles(signals or [0.0, 0.0], n=4)[0 if gate_name is GateName.maxp else 2]

    def gate(self, name: str, gate_name: GateName) -> Gate:
        if gate_name is GateName.none:
            return OPEN
        return gate.make(GateConfig(gate_name, self.threshold(name, gate_name)))


@pytest.fixture(scope="module")
def bench(tiny_folder: Path) -> Bench:
    return Bench(tiny_folder)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("gate_name", GateName)
@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_are_those_of_plain_decoding(bench: Bench, name: str, gate_name: GateName, k: int) -> None:
    cycles: list[Cycle] = []
    for request in bench.requests:
        got = bench.decode(request, bench.draft(name), bench.gate(name, gate_name), k)
        wanted = bench.plain(request)
        assert (got.tokens, got.finish) == (wanted.tokens, wanted.finish)
        assert sum(cycle.new_tokens for cycle in got.cycles) + 1 == len(got.tokens)
        cycles += got.cycles
    if name == "none":
        assert all(cycle.proposed == 0 and cycle.new_tokens == 1 for cycle in cycles)
        return
    accepted, proposed = sum(c.accepted for c in cycles), sum(c.proposed for c in cycles)
    assert 0 < accepted < proposed, "else nothing is proven"
    stopped = sum(c.proposed < c.k_asked for c in cycles)
    assert 0 < stopped < len(cycles) if gate_name is not GateName.none else stopped == 0
    for c in cycles:
        assert 0 <= c.accepted <= c.proposed <= c.k_asked <= k and 1 <= c.new_tokens <= c.accepted + 1
        looked_at = c.proposed + (c.proposed < c.k_asked)
        assert len(c.signals) == (0 if gate_name is GateName.none else looked_at)


def test_some_stop_early_and_some_do_not(bench: Bench) -> None:
    """So that the test above covers both, and a stop in the middle of a cycle."""
    plain = [bench.plain(request) for request in bench.requests]
    assert {completion.finish for completion in plain[3:]} == {"stop", "length"}
    assert all(len(completion.tokens) == NEW and completion.finish == "length" for completion in plain[:3])
    assert all((bench.eos in c.tokens) == (c.finish == "stop") and bench.eos not in c.tokens[:-1] for c in plain[3:])
    speculative = [bench.decode(request, bench.draft("lsq"), OPEN, 5) for request in bench.requests[3:]]
    assert any(c.cycles[-1].new_tokens <= c.cycles[-1].accepted for c in speculative if c.cycles)
    assert len({token for completion in plain for token in completion.tokens}) > 20


class Wrap:
    """A draft whose proposals are tampered with."""

    def __init__(self, draft: Draft, change: Callable[[Proposal], Proposal]) -> None:
        self.draft, self.change = draft, change

    def propose(self, verified: Verified, k: int, gate: Gate, cache: KVCache) -> Proposal:
        return self.change(self.draft.propose(verified, k, gate, cache))


class NoRollBack(KVCache):
    """Counts all that was written as verified."""

    def advance(self, count: int) -> None:
        self.length = self.written[-1]


def one_too_many(drafted: list[int], logits: Tensor) -> Verdict:
    accepted = min(longest_prefix(drafted, logits).accepted + 1, len(drafted))
    return Verdict(accepted, int(logits[accepted].argmax()))


def one_too_few(drafted: list[int], logits: Tensor) -> Verdict:
    """Exact, only slow: so the identity, rightly, does not mind it."""
    accepted = max(longest_prefix(drafted, logits).accepted - 1, 0)
    return Verdict(accepted, int(logits[accepted].argmax()))


class TestPlantedFaults:
    """Each is found with every K; the untouched draft and a merely timid policy pass the same check."""

    @pytest.fixture(params=KS)
    def same(self, bench: Bench, request: pytest.FixtureRequest) -> Callable[..., bool]:
        def same(draft: Draft | None = None, **faulty: object) -> bool:
            draft = draft or bench.draft("layerskip")
            runs = [(r, bench.decode(r, draft, OPEN, request.param, **faulty)) for r in bench.requests[:3]]  # type: ignore[arg-type]
            return all(run.tokens == bench.plain(r).tokens for r, run in runs)

        return same

    def test_none(self, same: Callable[..., bool]) -> None:
        assert same() and same(policy=one_too_few)

    def test_a_token_too_many_is_accepted(self, same: Callable[..., bool]) -> None:
        assert not same(policy=one_too_many)

    def test_the_cache_does_not_roll_back(self, same: Callable[..., bool]) -> None:
        assert not same(kv=NoRollBack)

    def test_the_hidden_states_are_of_a_layer_too_early(self, bench: Bench, same: Callable[..., bool]) -> None:
        early = EarlyExit(bench.model, EXIT - 1, RawExit(bench.model))
        assert same(early)
        with pytest.raises(AssertionError, match=r"layer 2: .* written"):
            same(Wrap(early, lambda proposal: proposal._replace(depth=EXIT)))

    def test_the_hidden_states_are_of_a_layer_too_late(self, bench: Bench, same: Callable[..., bool]) -> None:
        assert not same(Wrap(bench.draft("layerskip"), lambda proposal: proposal._replace(depth=EXIT - 1)))

    def test_the_hidden_states_are_of_another_position(self, bench: Bench, same: Callable[..., bool]) -> None:
        draft = bench.draft("layerskip")
        assert not same(Wrap(draft, lambda proposal: proposal._replace(hidden=proposal.hidden.roll(1, 0))))
