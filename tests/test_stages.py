"""The stages: what they run, in which order, what they do not run again, and what they never mix."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from plans import planned, run_job

from selfspec import fitting, heads, job
from selfspec.checkpoint import Journal
from selfspec.config import Resume
from selfspec.data import workload
from selfspec.engine.fake.engine import FakeEngine
from selfspec.errors import ConfigError, HeadError
from selfspec.plan import Plan
from selfspec.types import Completion, Request

pytestmark = pytest.mark.slow

Make = Callable[..., Plan]
FAKE = ("engine=fake", "draft=layerskip")


@pytest.fixture
def make(overrides: list[str], prompts_file: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A plan on the tiny model, with a journal of its own."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    return partial(planned, *overrides, "hardware.threads=1")


def journal(made: Plan) -> Journal:
    return Journal.open(job.place(made), made.id, {}, Resume.require)


def spied(monkeypatch: pytest.MonkeyPatch, name: str, fail_at: int | None = None) -> list[dict[str, Any]]:
    """The keyword arguments of every call of a method of the torch engine; the given call fails."""
    from selfspec.engine.torch.engine import TorchEngine

    calls = list[dict[str, Any]]()
    method = getattr(TorchEngine, name)

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == fail_at:
            raise RuntimeError("out of memory")
        return method(*args, **options)

    monkeypatch.setattr(TorchEngine, name, spy)
    return calls


def test_fit_and_bench_of_a_gated_head(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch, "generate")
    made = make("gate=varH", "tau_v=2")
    result = run_job(made, tmp_path)
    ended = ["1 of 3 units have no speed-up: no tokens after the first to time"]  # a stop token came at once
    assert (result["lossless"], result["status"], result["notes"]) == ("yes", "finished", ended)
    with journal(made) as kept:
        records, (head,) = kept.records("bench"), kept.records("fit")

    plain = [bool(options.get("plain")) for options in calls if "max_batch" not in options]
    assert plain == [True, False, True, False, False, True, True, False], (
        "warm-up, then each in turn first; the fit's are batched"
    )
    for record in records:
        assert (
            record.data["verdicts"] == [{"verdict": "equal"}]
            and record.data["provenance"]["extra"]["dtype"] == "float32"
        )
        assert record.on == record.data["provenance"]["fingerprint"] and record.data["peak_memory_mb"] > 0
        (configured,) = record.data["configured"]
        cycles = configured["cycles"]
        assert sum(cycles["new_tokens"]) + 1 == len(configured["tokens"])
        gated = (cycles[name] for name in ("proposed", "k_asked", "signals"))
        assert all(p == k or s[-1] > 2 for p, k, s in zip(*gated, strict=True))

    measured = result["measurements"]
    named = {
        "speedup",
        "speedup_low",
        "speedup_high",
        "speedup_total",
        "looping",
        "tok_s",
        "plain_tok_s",
        "acceptance",
        "acceptance_length",
        "ttft_ms",
    }
    assert {f"bench/{name}" for name in named} <= set(measured)
    assert (measured["bench/differing"], measured["bench/equal_tokens"], measured["bench/units"]) == (0, 1, 3)
    assert 0 < measured["fit/raw_agreement"] <= 1 and 0 < measured["fit/agreement"] <= 1
    assert measured["fit/train_tokens"] > measured["fit/heldout_tokens"] > 0
    assert measured["fit/agreement"] == head.data["agreement"] == heads.facts(fitting.head_path(made))["agreement"]
    assert fitting.wanted(made).items() <= head.data.items()


@pytest.mark.parametrize(
    ("more", "lossless", "speculates"),
    [
        ("draft=none", "reference", 0),
        ("draft=layerskip", "yes", 1),
        ("draft=layerskip exit_layer=1 policy.verify=false", "lossy", 0),
    ],
)
def test_verdicts(make: Make, tmp_path: Path, more: str, lossless: str, speculates: int) -> None:
    result = run_job(make(*more.split()), tmp_path)
    assert result["lossless"] == lossless and ("bench/acceptance" in result["measurements"]) == speculates
    assert (result["measurements"]["bench/equal_tokens"] == 1) == (lossless != "lossy")


def test_repeats_begin_the_other_way_round(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[bool]()
    generate = FakeEngine.generate

    def spy(self: FakeEngine, requests: list[Request], *, plain: bool = False) -> list[Completion]:
        calls.append(plain)
        return generate(self, requests, plain=plain)

    monkeypatch.setattr(FakeEngine, "generate", spy)
    made = make(*FAKE, "scale.prompts=2", "scale.repeats=2", "scale.warmup=0")
    result = run_job(made, tmp_path)
    first, second = [True, False, False, True], [False, True, True, False]
    assert calls == first + second
    assert (result["measurements"]["bench/units"], result["measurements"]["bench/prompts"]) == (4, 2)


@pytest.mark.parametrize(("before", "kept"), [(1, 3), (3, 3), (2, 2)])
def test_timings_of_different_hardware_are_not_pooled(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, kept: int
) -> None:
    """Four prompts, some of them on another machine; of two halves, the first."""
    made = make(*FAKE, "scale.prompts=4", "scale.warmup=0")
    describe = FakeEngine.describe

    def other(self: FakeEngine) -> Mapping[str, object]:
        return {**describe(self), "device": "another"}

    generate, calls = FakeEngine.generate, list[Request]()

    def failing(self: FakeEngine, requests: list[Request], *, plain: bool = False) -> list[Completion]:
        calls.extend(requests)
        if len(calls) > 2 * before:
            raise RuntimeError("the machine is taken away")
        return generate(self, requests, plain=plain)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(FakeEngine, "describe", other)
        patch.setattr(FakeEngine, "generate", failing)
        run_job(made, tmp_path / "taken")
    result = run_job(made, tmp_path)
    assert result["measurements"]["bench/units"] == kept
    assert result["notes"] == [f"{4 - kept} of 4 units ran on other hardware and are left out"]
    assert result["provenance"]["extra"]["device"] == ("none" if before == 1 else "another")
    assert result["notes"][0] in (tmp_path / "report.txt").read_text()


def test_a_bench_never_sees_a_prompt_its_head_was_fitted_on(make: Make, tmp_path: Path) -> None:
    made = make("scale.fit_prompts=60", "scale.prompts=30")
    ids = {
        split: {
            prompt.id for prompt in workload.select(made.workload, split, 40, made.seed, lambda text: text.encode())
        }
        for split in ("fit", "bench", "quality")
    }
    assert all(not one & other for one, other in [(ids["fit"], ids["bench"]), (ids["fit"], ids["quality"])])


def test_answers_and_head_are_made_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "BATCH", 8)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        spied(patch, "generate", fail_at=3)
        run_job(make(), tmp_path / "failed")
    generated, fits = spied(monkeypatch, "generate"), spied(monkeypatch, "fit")

    def batches() -> int:
        return sum("max_batch" in options for options in generated)

    run_job(make(), tmp_path / "one")
    assert (batches(), len(fits)) == (1, 1), "of three batches, two were in the journal"
    run_job(make("gate=maxp"), tmp_path / "two")
    assert (batches(), len(fits)) == (1, 1), "another gate asks for the same head"
    run_job(make("exit_layer=2"), tmp_path / "three")
    assert (batches(), len(fits)) == (1, 2), "another exit asks for another head, of the same answers"
    run_job(make("seed=1", "stages=[fit]"), tmp_path / "four")
    assert (batches(), len(fits)) == (4, 3)


def test_a_head_of_the_users_is_taken_and_checked(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = make("stages=[fit]")
    run_job(fitted, tmp_path)
    path = fitting.head_path(fitted).rename(tmp_path / "mine.safetensors")
    fits = spied(monkeypatch, "fit")
    made = make(f"draft.head={path}", "stages=[bench]", f"checkpoint.dir={tmp_path / 'other'}")
    job.check(made)
    assert run_job(made, tmp_path / "bench")["lossless"] == "yes" and fits == []
    for change in ("exit_layer=2", "draft.previous=true"):
        with pytest.raises(HeadError, match=f"{path}: fitted for "):
            job.check(make(f"draft.head={path}", change))
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    with pytest.raises(HeadError, match="cut off"):
        job.check(made)
    path.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")  # a NaN
    other = make(f"draft.head={path}", "stages=[bench]", "seed=1")
    with pytest.raises(HeadError, match="corrupt head"):
        run_job(other, tmp_path / "nan")


def test_a_corpus_of_the_users_is_taken_and_one_that_means_nothing_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = ("draft=suffix", "draft.corpus=true")
    fitted = make(*corpus, "stages=[fit]")
    run_job(fitted, tmp_path)
    path = fitting.head_path(fitted).rename(tmp_path / "corpus.safetensors")
    fits = spied(monkeypatch, "fit")
    made = make(*corpus, f"draft.head={path}", "stages=[bench]", f"checkpoint.dir={tmp_path / 'other'}")
    assert run_job(made, tmp_path / "bench")["lossless"] == "yes" and fits == []
    with pytest.raises(ConfigError, match=r"^draft\.head=x: means nothing without draft\.corpus=true"):
        make("draft=suffix", "draft.corpus=false", "draft.head=x")
    with pytest.raises(ConfigError, match=r"^draft\.head=x: means nothing to draft=layerskip"):
        make("draft=layerskip", "draft.head=x")


def test_a_bench_without_its_head_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="draft=lsq needs a head and none is fitted yet; add fit, or name one"):
        job.check(make("stages=[bench]"))


def test_a_finished_job_outlives_its_head(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_job(make(), tmp_path)
    fitting.head_path(make()).unlink()
    fits = spied(monkeypatch, "fit")
    assert run_job(make(), tmp_path)["measurements"] == first["measurements"] and fits == []
