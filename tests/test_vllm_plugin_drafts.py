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

from selfspec.config import Draft as DraftConfig
from selfspec.config import Gate as GateConfig
from selfspec.config import GateName, HeadForm
from selfspec.engine import controller as controllers
from selfspec.engine import fit, gate, policy, sampling
from selfspec.engine.cache import KVCache
from selfspec.engine.controller import Fixed
from selfspec.engine.decode import Speculation, Target
from selfspec.engine.draft import layerskip, lsq
from selfspec.engine.draft.base import Draft
from selfspec.engine.head import Head
from selfspec.engine.llama import Llama
from selfspec.engine.scheduler import Scheduler
from selfspec.engine.tree import Tree
from selfspec.types import Completion, Request, Sampling
from selfspec.vllm_plugin import early_exit

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
EXIT, K, NEW = 3, 4, 30
_LSQ = DraftConfig("lsq", EXIT, HeadForm.affine, ridge=1e-3)
HEADS = {
    "raw": DraftConfig("layerskip", EXIT),
    "raw vocab": DraftConfig("layerskip", EXIT, vocab=24),
    "affine": _LSQ,
    "low rank": replace(_LSQ, form=HeadForm.low_rank, rank=8),
    "previous": replace(_LSQ, previous=True),
    "vocab": replace(_LSQ, vocab=24),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    pytest.importorskip("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        yield


class Ours:
    """The same model in our own engine, and heads fitted there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Llama.load(folder, torch.device("cpu"), torch.float32)

    def decode(self, draft: Draft, k: int, asked: list[list[int]], reading: gate.Gate) -> list[Completion]:
        shape = self.model.shape
        requests = [Request(tuple(prompt), NEW, ignore_eos=True) for prompt in asked]
        cache = KVCache(shape.layers, 1, shape.kv_heads, 256, shape.head_dim, torch.float32, torch.device("cpu"), 512)
        target = Target(self.model, shape.layers, self.model.norm)
        scheduler = Scheduler(Speculation(target, draft, reading, Fixed(k), policy.LongestPrefix()), cache)
        numbers, done = [scheduler.submit(request) for request in requests], dict[int, Completion]()
        while scheduler.busy:
            done |= {told.number: told.completion for told in scheduler.step() if told.completion}
        return [done[number] for number in numbers]

    def head(self, config: DraftConfig) -> Head | None:
        if not config.fitted:
            return None
        answers = self.decode(Draft(self.model), 0, prompts(16), gate.Gate())
        traces = [
            fit.trace(self.model, prompt, answer.tokens, EXIT)
            for prompt, answer in zip(prompts(16), answers, strict=True)
        ]
        return (lsq if config.name == "lsq" else layerskip).fit(self.model, *fit.split(traces), config, 0)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ours]:
    with torch.inference_mode():
        yield Ours(model_folder("LlamaForCausalLM", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def plain(ours: Ours) -> Inside:
    return Inside(ours.folder)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_drafts_are_those_of_our_own_engine(ours: Ours, plain: Inside, tmp_path: Path, name: str, gated: bool) -> None:
    config, settings = HEADS[name], dict[str, Any](exit_layer=EXIT)
    if (head := ours.head(config)) is not None:
        head.facts |= {"exit_layer": EXIT, "draft": config.name}
        (tmp_path / "head").write_bytes(head.to_bytes())
        settings["head"] = str(tmp_path / "head")
    asked = GateConfig(GateName.maxp, 0.2) if gated else GateConfig()
    if gated:
        settings["gate"] = {"name": "maxp", "threshold": 0.2}
    draft = (lsq if config.name == "lsq" else layerskip).make(config, ours.model, head)
    wanted = ours.decode(draft, K, prompts(), gate.make(asked))

    inside = Inside(ours.folder, settings, K)
    assert inside(prompts(), NEW) == [list(done.tokens) for done in wanted] == plain(prompts(), NEW)
    cycles = [cycle for done in wanted for cycle in done.cycles]
    totals = Counter(
        cycles=len(cycles),
        proposed=sum(cycle.proposed for cycle in cycles),
        accepted=sum(cycle.accepted for cycle in cycles),
    )
    assert {key: inside.totals[key] for key in totals} == totals
    assert 0 < totals["accepted"] <= totals["proposed"] < K * totals["cycles"]


def test_a_head_of_another_exit_is_refused(ours: Ours, tmp_path: Path) -> None:
    head = ours.head(HEADS["affine"])
    assert head is not None
    head.facts |= {"exit_layer": EXIT, "draft": "lsq"}
    (tmp_path / "head").write_bytes(head.to_bytes())
    with pytest.raises(Exception, match="fitted for exit_layer=3, but exit_layer=4 is asked for"):
        Inside(ours.folder, {"exit_layer": 4, "head": str(tmp_path / "head")})


@pytest.mark.parametrize(("name", "never"), [("maxp", 1.0), ("entropy", 0.0), ("varH", 0.0)])
def test_gates_stop_drafts(ours: Ours, plain: Inside, name: str, never: float) -> None:
    inside = Inside(ours.folder, {"exit_layer": EXIT, "gate": {"name": name, "threshold": never}})
    assert inside(prompts(), NEW) == plain(prompts(), NEW)
    assert inside.totals["proposed"] == 0
    assert inside.totals["cycles"] == len(prompts()) * (NEW - 1)
    assert inside.totals["tokens"] == len(prompts()) * (NEW - 2)  # before the last token nothing need be looked at


@pytest.mark.parametrize(
    "controller",
    [
        {"name": "adaptive", "low": 0, "high": 6, "step": 1, "window": 8, "target": 0.9, "K": 6},
        {"name": "cost", "window": 16, "K": 6},
    ],
)
def test_controllers_choose_k(
    ours: Ours, plain: Inside, controller: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, looks = Inside(ours.folder, {"exit_layer": EXIT, "controller": controller}, 6), itertools.count()

    def clock() -> float:
        """By which a verification takes a millisecond, and a draft step half of one, on every machine."""
        return (next(looks) + inside.totals["steps"] / 2) / 1e3

    monkeypatch.setattr(early_exit, "time", SimpleNamespace(perf_counter=clock))
    assert inside(prompts(), 80) == plain(prompts(), 80)
    learned = inside.runner.drafter.controller.state()
    assert learned != controllers.make(inside.runner.drafter.settings.controller).state()
    assert 0 < inside.totals["proposed"] < 5 * inside.totals["cycles"]


def test_a_bandit_is_paid(ours: Ours, plain: Inside) -> None:
    inside = Inside(ours.folder, {"exit_layer": EXIT, "gate": {"name": "bandit", "arms": [0.1, 0.9]}})
    assert inside(prompts(), NEW) == plain(prompts(), NEW)
    assert inside.runner.drafter.gate.state() != gate.make(GateConfig(GateName.bandit, arms=[0.1, 0.9])).state()


def test_nothing_is_kept_of_requests_that_are_done(ours: Ours) -> None:
    inside = Inside(ours.folder, {"exit_layer": EXIT})
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


def test_sampled_tokens_have_the_targets_distribution(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import rejection_sampler

    exact = truth(ours)
    assert len(exact.nonzero()) > 10
    inside = Inside(ours.folder, {"exit_layer": EXIT}, max_num_seqs=64)
    assert surprise(inside, exact) < 5
    assert 0 < inside.totals["accepted"] < inside.totals["proposed"]
    with monkeypatch.context() as planted:
        planted.setattr(rejection_sampler, "rejection_sample", take_all)
        assert surprise(inside, exact) > 50
