"""sense: what cannot be measured is said in a line, and fails its job."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from plans import planned, run_job
from safetensors.torch import load_file, save_file
from test_metrics import completion, cycle, timed, unit

from selfspec import job, sense
from selfspec.checkpoint import Journal
from selfspec.config import Resume
from selfspec.engine.fake.engine import FakeEngine
from selfspec.engine.torch.engine import TorchEngine
from selfspec.errors import AssetError, StageError
from selfspec.plan import Plan
from selfspec.report import tables
from selfspec.stages.bench import Bench
from selfspec.types import Completion, Cycle

NAN, INF = math.nan, math.inf


def answer(*tokens: int, ttft: float = 1.0, total: float = 2.0, finish: str = "length") -> dict[str, Any]:
    return completion(0, ttft, total) | {"tokens": list(tokens), "finish": finish}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (answer(), "the answer has no token"),
        (answer(1, 2, ttft=0.0), "the first token came after 0 s, the last after 2 s"),
        (answer(1, 2, ttft=-1.0), "the first token came after -1 s, the last after 2 s"),
        (answer(1, 2, ttft=3.0), "the first token came after 3 s, the last after 2 s"),
        (answer(1, 2, ttft=NAN), "the first token came after nan s, the last after 2 s"),
        (answer(1, 2, total=NAN), "the first token came after 1 s, the last after nan s"),
        (answer(1, 2, total=INF), "the first token came after 1 s, the last after inf s"),
        (completion(3, 1, 2, cycle(4, 5)), "a cycle accepted 5 tokens of 4 proposed for 4 positions"),
        (completion(3, 1, 2, cycle(4, -1)), "a cycle accepted -1 tokens of 4 proposed for 4 positions"),
        (completion(3, 1, 2, Cycle(4, 4, 4, 1, 2, (), NAN, 1.0)), "a cycle took no finite time"),
    ],
)
def test_what_cannot_be_of_a_unit_is_named(wrong: dict[str, Any], says: str) -> None:
    right = timed("a", 2.0, 1.0)
    assert sense.impossible(right) is None
    assert sense.impossible({**right, "configured": [wrong]}) == f"prompt a, the configuration: {says}"
    assert sense.impossible({**right, "plain": [wrong]}) == f"prompt a, plain decoding: {says}"
    assert sense.impossible({**right, "against": {"K=2": [wrong]}}) == f"prompt a, K=2: {says}"


def test_a_tree_proposes_more_than_it_looks_ahead_and_an_answer_may_come_at_once() -> None:
    tree = Cycle(4, 7, 3, 2, 3, (), 1.0, 10.0)
    assert sense.impossible(unit(completion(4, 1, 1, tree))) is None


STOPS = [unit(answer(2, total=1.0, finish="stop"), prompt=prompt) for prompt in "ab"]
ZEROS = [unit(answer(0, 0, 0), prompt=prompt) for prompt in "ab"]
AT_ONCE = [unit(answer(1, 2, 3, total=1.0), prompt=prompt) for prompt in "ab"]
TWO = [unit(answer(1, 2, 3), answer(1, 2), prompt=prompt) for prompt in "ab"]


@pytest.mark.parametrize(
    ("units", "drafts", "says"),
    [
        (STOPS, True, "every answer is empty: its first token ends it"),
        (STOPS, False, "every answer is empty: its first token ends it"),
        (ZEROS, True, "every answer is token 0 over and over, whatever is asked"),
        (ZEROS, False, "every answer is token 0 over and over, whatever is asked"),
        (AT_ONCE, True, "no speed-up is known: no answer has tokens after its first that come one after another"),
        (TWO, True, "no speed-up is known: plain decoding says no more than one token after its first"),
    ],
)
def test_what_all_units_cannot_tell_is_named(units: list[dict[str, Any]], drafts: bool, says: str) -> None:
    assert sense.senseless(units, drafts) == says
    assert sense.senseless([*units, timed("c", 2.0, 1.0)], drafts) is None, "one that makes sense is enough"


def test_a_single_prompt_may_well_loop_and_plain_decoding_alone_needs_no_speed_up() -> None:
    assert sense.senseless(ZEROS[:1], drafts=True) is None
    assert sense.senseless(AT_ONCE, drafts=False) is None
    assert sense.senseless(TWO, drafts=False) is None


def test_measurements_that_are_no_number() -> None:
    assert sense.not_finite({"a": 1.0, "b": NAN, "c": -INF, "d": 0}) == ["b=nan", "c=-inf"]


Spoil = Callable[[Completion], Completion]


@pytest.fixture
def make(overrides: list[str], prompts_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    return partial(planned, *overrides, "engine=fake", "draft=layerskip", "scale.warmup=0")


def spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    """Every answer of the fake engine is planted."""
    generate = FakeEngine.generate

    def planting(self: FakeEngine, requests: Sequence[Any], **how: Any) -> list[Completion]:
        return [spoil(one) for one in generate(self, requests, **how)]

    monkeypatch.setattr(FakeEngine, "generate", planting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda one: replace(one, total_s=0.0), "the last after 0 s"),
        (lambda one: replace(one, ttft_s=NAN), "the first token came after nan s"),
        (lambda one: replace(one, tokens=()), "the answer has no token"),
    ],
)
def test_a_unit_that_cannot_be_is_not_journalled(
    make: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoil, says: str
) -> None:
    made = make()
    with (
        monkeypatch.context() as patch,
        pytest.raises(StageError, match=f"^what was measured makes no sense: .*{says}"),
    ):
        spoilt(patch, spoil)
        run_job(made, tmp_path / "spoilt")
    with Journal.open(job.place(made), made.id, {}, Resume.require) as kept:
        assert kept.records("bench") == []
    assert run_job(made, tmp_path / "right")["status"] == "finished", "nothing of it is left"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda one: replace(one, tokens=(0,) * len(one.tokens)), "every answer is token 0 over and over"),
        (lambda one: replace(one, tokens=(2,), cycles=(), total_s=one.ttft_s, finish="stop"), "every answer is empty"),
        (lambda one: replace(one, total_s=one.ttft_s), "no speed-up is known"),
    ],
)
def test_nonsense_fails_a_job_in_a_line_and_is_never_lossless(
    make: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoil, says: str
) -> None:
    spoilt(monkeypatch, spoil)
    result = run_job(make(), tmp_path)
    assert (result["status"], result["lossless"]) == ("failed", None)
    assert result["error"] is not None and result["error"].startswith(f"what was measured makes no sense: {says}")
    assert "\n" not in result["error"]
    text = tables.text([result])
    assert "| FAILED " in text and "| yes " not in text and says in text


@pytest.mark.slow
def test_a_measurement_that_is_no_number_fails_a_job(
    make: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "measurements", lambda *_: {"tok_s": NAN, "speedup": 2.0})
    result = run_job(make(), tmp_path)
    assert (result["status"], result["lossless"]) == ("failed", None)
    assert result["error"] == "what was measured makes no sense: bench/tok_s=nan"


@pytest.fixture(scope="module")
def overflowing(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, in whose third layer float32 overflows: every state after it is NaN."""
    return larger(tiny_folder, tmp_path_factory.mktemp("models") / "overflowing", "up_proj", 3e38)


def larger(tiny_folder: Path, folder: Path, name: str, most: float) -> Path:
    """A copy of the tiny model, with one matrix of its third layer as large as this."""
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    matrix = weights[f"model.layers.2.mlp.{name}.weight"]
    matrix *= most / matrix.abs().max()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        "draft=ngram",
        "draft=ngram engine.kernels=torch",
        "draft=layerskip exit_layer=4",
        "draft=suffix engine.max_batch=3",
        "draft=ngram policy=rejection temperature=0.7",
        "draft=ngram policy=typical",
        "draft=none stages=[quality] quality.tasks=[] quality.gate_prompts=0",
    ],
)
def test_logits_that_are_not_finite_fail_a_job_in_a_line(
    overrides: list[str],
    overflowing: Path,
    tmp_path: Path,
    prompts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: str,
) -> None:
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    made = planned(*overrides, "hardware.threads=1", f"model.source=file:{overflowing}", *more.split())
    with pytest.raises(AssetError, match=r"^model: its logits are not finite in float32: first after layer 3 of 6$"):
        run_job(made, tmp_path)


@pytest.mark.slow
def test_a_model_that_knows_nothing_any_more_fails_a_job_in_a_line(
    overrides: list[str], tiny_folder: Path, tmp_path: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm of states this large is 0, and so are all logits: finite, and the argmax the first token for ever."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    folder = larger(tiny_folder, tmp_path / "model", "down_proj", 1e37)
    made = planned(*overrides, "hardware.threads=1", f"model.source=file:{folder}", "draft=ngram")
    result = run_job(made, tmp_path / "job")
    assert (result["status"], result["lossless"]) == ("failed", None)
    said = "what was measured makes no sense: every answer is token 0 over and over, whatever is asked"
    assert result["error"] == said


@pytest.mark.slow
def test_a_sequence_scored_by_no_number_fails(overrides: list[str], overflowing: Path) -> None:
    made = TorchEngine(planned(*overrides, "hardware.threads=1", f"model.source=file:{overflowing}", "draft=none"))
    with pytest.raises(StageError, match=r"^logits are not finite: [^\n]*$"):
        made.score([5, 6], [[7, 8]])
