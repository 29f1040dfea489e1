"""What is drafted inside vLLM: the same as by our own engine, as gates and controllers say, and never a bias."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_inside import VOCABULARY, Inside, model_folder, prompts, take_all

from selfspec.axes import DRAFT, GATE, DraftOptions
from selfspec.engine.torch.session import Scheduler
from selfspec.engine.vllm.session import VLLMSession
from selfspec.errors import HeadError
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation import fit, sampling
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, HeadForm
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.types import Completion, Cycle, Request, Sampling
from selfspec.vllm_plugin import early_exit

pytest.importorskip("vllm", reason="vLLM is not installed here; .ci/vllm has it in an environment of its own")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
EXIT, K, LONGEST, NEW = 3, 4, 6, 30
_LSQ = DRAFT.new("lsq", exit_layer=EXIT, form=HeadForm.affine, ridge=1e-3)
HEADS = {
    "raw": DRAFT.new("layerskip", exit_layer=EXIT),
    "raw vocab": DRAFT.new("layerskip", exit_layer=EXIT, vocab=24),
    "affine": _LSQ,
    "low rank": replace(_LSQ, form=HeadForm.low_rank, rank=8),
    "previous": replace(_LSQ, previous=True),
    "vocab": replace(_LSQ, vocab=24),
}


class Ours:
    """The same model in our own engine, and heads fitted there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Llama.load(folder, torch.device("cpu"), torch.float32)

    def decode(self, draft: Draft, k: int, asked: list[list[int]], reading: Gate) -> list[Completion]:
        shape = self.model.shape
        requests = [Request(tuple(prompt), NEW, ignore_eos=True) for prompt in asked]
        cache = KVCache(shape.layers, 1, shape.kv_heads, 256, shape.head_dim, torch.float32, torch.device("cpu"), 512)
        target = Target(self.model, shape.layers, self.model.norm)
        return Scheduler(Speculation(target, draft, reading, Controller(k), LongestPrefix()), cache).run(requests)

    def head(self, config: DraftOptions) -> Head | None:
        if not config.fitted:
            return None
        answers = self.decode(Draft(self.model), 0, prompts(16), Gate())
        traces = [
            fit.trace(self.model, prompt, answer.tokens, EXIT)
            for prompt, answer in zip(prompts(16), answers, strict=True)
        ]
        head: Head = config.fit(self.model, *fit.split(traces), 0)
        return head


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ours]:
    with torch.inference_mode():
        yield Ours(model_folder("LlamaForCausalLM", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def plain(ours: Ours) -> Inside:
    return Inside(ours.folder)


@pytest.fixture(scope="module")
def early(ours: Ours) -> Inside:
    """The vLLM that all drafts here are made in, with room for the longest and for many at once."""
    return Inside(ours.folder, {"exit_layer": EXIT}, LONGEST, max_num_seqs=64)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_drafts_are_those_of_our_own_engine(
    ours: Ours, plain: Inside, early: Inside, tmp_path: Path, name: str, gated: bool
) -> None:
    config, settings = HEADS[name], dict[str, Any](exit_layer=EXIT, controller={"K": K})
    if (head := ours.head(config)) is not None:
        head.facts |= {"exit_layer": EXIT, "draft": config.name}
        (tmp_path / "head").write_bytes(head.to_bytes())
        settings["head"] = str(tmp_path / "head")
    asked = GATE.new("maxp", threshold=0.2) if gated else GATE.new("none")
    if gated:
        settings["gate"] = {"name": "maxp", "threshold": 0.2}
    wanted = ours.decode(config.make(ours.model, head), K, prompts(), asked.make())

    inside = early.drafting(settings)
    assert inside(prompts(), NEW) == [list(done.tokens) for done in wanted] == plain(prompts(), NEW)
    cycles = [cycle for done in wanted for cycle in done.cycles]
    totals = Counter(
        cycles=len(cycles),
        proposed=sum(cycle.proposed for cycle in cycles),
        accepted=sum(cycle.accepted for cycle in cycles),
    )
    assert {key: inside.totals[key] for key in totals} == totals
    assert 0 < totals["accepted"] <= totals["proposed"] < K * totals["cycles"]


def test_a_head_of_another_exit_is_refused(ours: Ours, early: Inside, tmp_path: Path) -> None:
    head = ours.head(HEADS["affine"])
    assert head is not None
    head.facts |= {"exit_layer": EXIT, "draft": "lsq"}
    (tmp_path / "head").write_bytes(head.to_bytes())
    with pytest.raises(HeadError, match="fitted for exit_layer=3, but exit_layer=4 is asked for"):
        early.drafting({"exit_layer": 4, "head": str(tmp_path / "head")})


@pytest.mark.parametrize(("name", "never"), [("maxp", 1.0), ("entropy", 0.0), ("varH", 0.0)])
def test_gates_stop_drafts(plain: Inside, early: Inside, name: str, never: float) -> None:
    inside = early.drafting({"exit_layer": EXIT, "gate": {"name": name, "threshold": never}})
    assert inside(prompts(), NEW) == plain(prompts(), NEW)
    assert inside.totals["proposed"] == 0
    assert inside.totals["cycles"] == len(prompts()) * (NEW - 1)
    assert inside.totals["tokens"] == len(prompts()) * (NEW - 2)  # before the last token nothing need be looked at


@pytest.mark.parametrize(
    "controller",
    [
        {"name": "adaptive", "low": 0, "high": LONGEST, "step": 1, "window": 8, "target": 0.9, "K": LONGEST},
        {"name": "cost", "window": 16, "K": LONGEST},
    ],
)
def test_controllers_choose_k(
    plain: Inside, early: Inside, controller: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, looks = early.drafting({"exit_layer": EXIT, "controller": controller}), itertools.count()

    def clock() -> float:
        """By which a verification takes a millisecond, and a draft step half of one, on every machine."""
        return (next(looks) + inside.totals["steps"] / 2) / 1e3

    monkeypatch.setattr(early_exit, "time", SimpleNamespace(perf_counter=clock))
    assert inside(prompts(), 80) == plain(prompts(), 80)
    learned = inside.runner.drafter.controller.state()
    assert learned != inside.runner.drafter.settings.controller.make().state()
    assert 0 < inside.totals["proposed"] < 5 * inside.totals["cycles"]


def test_controllers_are_not_told_that_they_asked_for_what_there_was_no_room_for(
    early: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, seen = early.drafting({"exit_layer": EXIT}), list[Cycle]()
    monkeypatch.setattr(inside.runner.drafter.controller, "observe", seen.extend)
    inside(prompts(), 5)
    assert max(cycle.k_asked for cycle in seen) == 3, "of the four after the first, verification gives one"
    assert all(cycle.proposed == cycle.k_asked for cycle in seen)


def test_a_bandit_is_paid(plain: Inside, early: Inside) -> None:
    inside = early.drafting({"exit_layer": EXIT, "gate": {"name": "bandit", "arms": [0.1, 0.9]}})
    assert inside(prompts(), NEW) == plain(prompts(), NEW)
    assert inside.runner.drafter.gate.state() != GATE.new("bandit", arms=[0.1, 0.9]).make().state()


GREEDY = {"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1.0, "top_k": 1}
"""Ways to draw that leave nothing to chance: what is drawn by rejection must be the likeliest token, too."""


@pytest.mark.parametrize(
    "how",
    [
        *GREEDY,
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"stop_token_ids": [*range(2, 8)]},
        {"min_tokens": 12, "stop_token_ids": [*range(2, 40)]},
    ],
    ids=lambda how: "+".join(how),
)
def test_what_requests_ask_for_is_kept_to(plain: Inside, early: Inside, how: dict[str, Any]) -> None:
    inside = early.drafting({"exit_layer": EXIT})
    assert inside(prompts(), NEW, **how) == plain(prompts(), NEW, **how)
    assert 0 < inside.totals["accepted"] < inside.totals["proposed"]
    usual = plain(prompts(), NEW)
    assert (plain(prompts(), NEW, **how) == usual) == (how in GREEDY), "else nothing is proven"


def test_requests_that_are_taken_back_leave_the_others_alone(plain: Inside, early: Inside) -> None:
    session = VLLMSession(early.drafting({"exit_layer": EXIT}).llm.llm_engine, 8, 256, frozenset(), LONGEST)
    asked = [Request(tuple(prompt), NEW, ignore_eos=True) for prompt in prompts()]
    numbers, done = [session.submit(request) for request in asked], dict[int, Completion]()
    while session.busy:
        done |= {told.number: told.completion for told in session.step() if told.completion}
        for number in numbers[1::2]:
            if number not in done and (left := session.cancel(number)):
                done[number] = left
    wanted = plain(prompts(), NEW)
    assert [list(done[number].tokens) for number in numbers[::2]] == wanted[::2]
    for number in numbers[1::2]:
        told = list(done[number].tokens)
        assert told == wanted[number][: len(told)] and len(told) < NEW


def test_what_vllm_verifies_at_its_end_is_no_draft_of_ours(ours: Ours) -> None:
    """Near its greatest length vLLM asks for no drafts, and verifies zeros."""
    end, gate = 128, {"name": "maxp", "threshold": 0.2}
    options = {"max_model_len": end, "per_request_spec_decode_metrics": "detailed"}
    inside = Inside(ours.folder, {"exit_layer": EXIT, "gate": gate}, K, **options)
    asked = [Request(tuple(prompt), end - len(prompt), ignore_eos=True) for prompt in prompts()]
    done = VLLMSession(inside.llm.llm_engine, 8, end, frozenset(), K).run(asked)
    zeros, ours_own = [], []
    for cycle in (cycle for one in done for cycle in one.cycles):
        (ours_own if cycle.signals else zeros).append(cycle)
    assert all(c.proposed <= len(c.signals) <= c.proposed + 1 for c in ours_own)
    assert any(c.proposed for c in zeros) and len(zeros) < len(ours_own)


def test_nothing_is_kept_of_requests_that_are_done(early: Inside) -> None:
    inside = early.drafting({"exit_layer": EXIT})
    for _ in range(3):
        inside(prompts(), NEW)
    record = inside.runner.drafter.record
    assert len(record.cycles) <= 8 and len(record.pending) <= 8


SAMPLES, PROMPT, FEW = 3000, [5, 6, 7, 8, 9, 10], 5


def truth(ours: Ours) -> torch.Tensor:
    """P(second and third token after the prompt), of the FEW likeliest tokens each: ``[V, V]``, by our own model."""
    shape = ours.model.shape

    def after(tokens: list[int]) -> torch.Tensor:
        cache = KVCache(shape.layers, 1, shape.kv_heads, 16, shape.head_dim, torch.float32, torch.device("cpu"), 512)
        at = cache.place([Tree.chain(tokens)], row=cache.admit())
        hidden = ours.model.run(ours.model.embed(tokens, at), cache, at, 0, shape.layers)
        logits = ours.model.logits(ours.model.norm(hidden[-1:]))[0]
        return sampling.distribution(logits, Sampling(1.0, top_k=FEW)).float()

    joint, first = torch.zeros(VOCABULARY, VOCABULARY), after(PROMPT)
    for a in first.nonzero().flatten().tolist():
        second = after([*PROMPT, a])
        for b in second.nonzero().flatten().tolist():
            joint[b] += first[a] * second[b] * after([*PROMPT, a, b])
    return joint


def surprise(inside: Inside, exact: torch.Tensor) -> float:
    """How far from ``exact`` what is drawn lies: its chi-squared, in standard deviations above the mean."""
    drawn = torch.zeros(VOCABULARY, VOCABULARY)
    for _, second, third, _ in inside([PROMPT] * SAMPLES, 4, temperature=1.0, top_k=FEW):
        drawn[second, third] += 1
    expected = exact * SAMPLES
    often = expected >= 5
    counts = torch.cat([drawn[often], drawn[~often].sum()[None]])
    means = torch.cat([expected[often], expected[~often].sum()[None]]).clamp(min=0.5)
    freedom = len(counts) - 1
    return float((((counts - means) ** 2 / means).sum() - freedom) / (2 * freedom) ** 0.5)


def test_sampled_tokens_have_the_targets_distribution(
    ours: Ours, early: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample import rejection_sampler

    exact = truth(ours)
    assert len(exact.nonzero()) > 10
    inside = early.drafting({"exit_layer": EXIT})
    assert surprise(inside, exact) < 5
    assert 0 < inside.totals["accepted"] < inside.totals["proposed"]
    with monkeypatch.context() as planted:
        planted.setattr(rejection_sampler, "rejection_sample", take_all)
        assert surprise(inside, exact) > 50
