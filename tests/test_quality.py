"""The quality stage and its numbers: perplexities, ROC curves, targets; what is run, resumed and left behind."""

import csv
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_report
from plans import planned, run_job

from selfspec import job
from selfspec.axes import ENGINE
from selfspec.checkpoint import Journal
from selfspec.config import Resume
from selfspec.engine.fake.engine import FakeEngine
from selfspec.errors import AssetError, ConfigError, StageError
from selfspec.plan import Plan
from selfspec.quality import gates, generation, perplexity, plot, tasks
from selfspec.quality.config import TaskData
from selfspec.quality.perplexity import Conversation, Nats
from selfspec.report import quality as tables
from selfspec.report import tables as report
from selfspec.report.results import Result
from selfspec.stages import quality
from selfspec.stages.quality import Quality
from selfspec.types import Sampling, Score, Signals

pytestmark = pytest.mark.slow

Make = Callable[..., Plan]
ASKED = ("stages=[quality]", "quality.tasks=[]", "quality.chunk=2", "quality.prompts=5", "quality.gate_prompts=3")


@pytest.fixture
def make(fake: list[str]) -> Make:
    """A plan of a quality stage without lm-eval on the fake engine, and more overrides."""

    return partial(planned, *fake, *ASKED)


def units(made: Plan) -> dict[str, dict[str, Any]]:
    with Journal.open(job.place(made), made.id, {}, Resume.require) as journal:
        return {record.unit: record.data for record in journal.records("quality")}


def conversation(
    reference: tuple[float, float], text: tuple[float, float], a: str, b: str, n: int = 10
) -> Conversation:
    """Nats per token, plainly and as configured; the texts' tokens, a letter each."""
    (plain, own), (plain_text, own_text) = reference, text
    sides = (Nats(plain * n, n), Nats(own * n, n), Nats(plain_text * len(a), len(a)), Nats(own_text * len(b), len(b)))
    return Conversation("c", *sides, [*map(ord, a)], [*map(ord, b)])


# ---------------------------------------------------------------------------- perplexity


def test_perplexity_is_of_all_tokens_together() -> None:
    rows = [
        conversation((1.0, 1.5), (0.5, 0.5), "abcd", "abxd", n=10),
        conversation((2.0, 2.0), (1.0, 2.0), "ab", "ab", 30),
    ]
    found = perplexity.summarise(rows, seed=0)
    assert found["plain_reference_ppl"] == pytest.approx(math.exp(70 / 40))
    assert found["reference_ppl"] == pytest.approx(math.exp(75 / 40))
    assert found["reference_delta_ppl"] == pytest.approx(math.exp(75 / 40) - math.exp(70 / 40))
    assert found["text_ppl"] == pytest.approx(math.exp((0.5 * 4 + 2.0 * 2) / 6))
    assert (found["conversations"], found["reference_tokens"], found["text_tokens"]) == (2, 40, 6)
    assert found["equal_tokens"] == (3 / 4 + 1) / 2 and found["identical_texts"] == 0.5
    assert found["first_divergence"] == 2


def test_the_interval_is_of_the_difference() -> None:
    rng = random.Random(0)
    plain = [Nats(rng.uniform(10, 60), 20) for _ in range(60)]
    same = perplexity.delta_perplexity(plain, plain, seed=0)
    assert same == (0, 0, 0), "conversations differ by far more, and are drawn together"
    worse = [Nats(nats + 1.0, tokens) for nats, tokens in plain]
    delta, low, high = perplexity.delta_perplexity(plain, worse, seed=0)
    assert 0 < low < delta < high
    assert perplexity.delta_perplexity(plain, worse, seed=0) == (delta, low, high)
    assert perplexity.delta_perplexity(plain, worse, seed=1) != (delta, low, high)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, held = random.Random(1), 0
    for trial in range(100):  # one nat a token plainly; as configured, 0.1 more on average
        plain = [Nats(20.0, 20)] * 40
        configured = [Nats(20 * rng.gauss(1.1, 0.2), 20) for _ in plain]
        _, low, high = perplexity.delta_perplexity(plain, configured, seed=trial)
        held += low <= math.exp(1.1) - math.e <= high
    assert 88 <= held <= 99


@pytest.mark.parametrize(
    ("a", "b", "equal", "first"), [("abc", "abc", 1, None), ("abcd", "axcd", 0.75, 1), ("ab", "abcd", 0.5, 2)]
)
def test_how_far_texts_are_apart(a: str, b: str, equal: float, first: int | None) -> None:
    row = conversation((1, 1), (1, 1), a, b)
    assert (perplexity.equal_tokens(row), perplexity.divergence(row)) == (equal, first)


def test_a_line_of_csv_for_each_conversation() -> None:
    text = perplexity.table([conversation((1.0, 2.0), (1.0, 1.0), "ab", "ab"), conversation((0, 0), (0, 0), "a", "b")])
    first, second = csv.DictReader(text.splitlines())
    assert float(first["reference_ppl"]) == pytest.approx(math.e**2) and first["first_divergence"] == ""
    assert (second["equal_tokens"], second["first_divergence"]) == ("0.0", "0")


def test_nats_of_a_score() -> None:
    assert Nats.of(Score((-1.0, -0.5), True)) == Nats(1.5, 2)


# ---------------------------------------------------------------------------- gates


def signals(layer: int, max_prob: list[float], accepted: list[int], head: str = "raw", **other: Any) -> dict[str, Any]:
    """A unit of one exit; the other signals know nothing unless given."""
    blank = {"entropy": [1.0] * len(accepted), "var_entropy": [1.0] * len(accepted)}
    return {"exits": [{"layer": layer, "head": head, "max_prob": max_prob, "accepted": accepted} | blank | other]}


def test_auc_by_gate() -> None:
    unit = signals(3, [0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], entropy=[0.1, 0.2, 0.8, 0.9], var_entropy=[5, 5, 5, 5])
    areas = {curve.gate: curve.auc for curve in gates.curves([unit])}
    assert areas == {"maxp": 1.0, "entropy": 1.0, "varH": 0.5}, "low entropy speaks for a token"
    wrong = signals(3, [0.1, 0.8, 0.2, 0.9], [1, 0, 1, 0])
    assert gates.curves([wrong])[0].auc == 0.0


def test_auc_is_the_chance_that_what_stands_looks_better() -> None:
    rng = random.Random(0)
    stands = [rng.random() < 0.4 for _ in range(300)]
    sure = [min(1.0, max(0.0, rng.gauss(0.6 if stand else 0.4, 0.2))) for stand in stands]
    halves = [signals(3, sure[:150], [*map(int, stands[:150])]), signals(3, sure[150:], [*map(int, stands[150:])])]
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, s in zip(sure, stands, strict=True)
        if s
        for b, t in zip(sure, stands, strict=True)
        if not t
    ]
    maxp = gates.curves(halves)[0]
    assert maxp.auc == pytest.approx(sum(pairs) / len(pairs))
    assert len(maxp.thresholds) <= gates.POINTS and maxp.false_positives[-1] == maxp.true_positives[-1] == 1


def test_exits_are_kept_apart_and_one_that_never_varies_has_no_area() -> None:
    told = [signals(3, [0.9, 0.1], [1, 0]), signals(3, [0.3, 0.2], [1, 1], head="lsq"), signals(5, [0.5, 0.4], [0, 0])]
    made = gates.curves(told)
    areas = {curve.exit: curve.auc for curve in made if curve.gate == "maxp"}
    assert areas == {(3, "raw"): 1.0, (3, "lsq"): None, (5, "raw"): None}
    found = gates.summarise(told, made)
    wanted = {"gates/3/raw/acceptance": 0.5, "gates/3/lsq/acceptance": 1.0, "gates/5/raw/tokens": 2}
    assert found.items() >= wanted.items()
    assert "gates/3/raw/maxp_auc" in found and "gates/3/lsq/maxp_auc" not in found
    rows = list(csv.DictReader(gates.table(made).splitlines()))
    assert {row["exit_layer"] for row in rows} == {"3"} and {row["gate"] for row in rows} == set(gates.GATES)
    assert (plot.roc(made, 3) or b"").startswith(b"\x89PNG")
    assert plot.roc(gates.curves(told[1:]), 3) is None


def test_thresholds_are_the_gates_own() -> None:
    made = gates.curves([signals(3, [0.9, 0.6, 0.2], [1, 0, 0], entropy=[0.1, 0.5, 2.0])])
    maxp, entropy, _ = made
    assert {0.9, 0.6, 0.2} >= {*maxp.thresholds[1:]} and {0.1, 0.5, 2.0} >= {*entropy.thresholds[1:]}


# ---------------------------------------------------------------------------- the stage


def test_what_the_stage_leaves_behind(make: Make, tmp_path: Path) -> None:
    made = make()
    result = run_job(made, tmp_path)
    done = units(made)
    assert [*done] == [
        *("texts/00000-00002", "texts/00002-00004", "texts/00004-00005"),
        *("gates/00000-00002", "gates/00002-00003"),
    ]
    measured = result["measurements"]
    assert (measured["quality/conversations"], result["status"]) == (5, "finished")
    assert measured["quality/reference_delta_ppl"] == 0 and measured["quality/equal_tokens"] == 1
    assert measured["quality/text_ppl"] == pytest.approx(2), "the fake model gives its own token one half"
    assert measured["quality/gates/3/raw/maxp_auc"] > 0.6
    assert result["provenance"] == done["texts/00000-00002"]["provenance"]
    rows = list(csv.DictReader((tmp_path / "quality_conversations.csv").read_text().splitlines()))
    assert [row["prompt"] for row in rows] == [
        c["prompt"] for unit in done.values() for c in unit.get("conversations", [])
    ]
    assert (tmp_path / "gate_roc.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "gate_roc.csv").exists()
    assert "| delta-PPL, reference answers |" in (tmp_path / "report.txt").read_text()
    assert not (tmp_path / "lm_eval.json").exists()


def test_what_is_lossy_changes_perplexity_and_fails_nothing(make: Make, tmp_path: Path) -> None:
    result = run_job(make("policy.verify=false"), tmp_path)
    assert result["measurements"]["quality/reference_delta_ppl"] != 0 and result["status"] == "finished"


@pytest.mark.parametrize("fail_at", [1, 3, 4, 5])
def test_only_what_is_missing_is_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    made, work = make(), Quality._texts
    calls = list[str]()

    def watched(name: str, broken: bool) -> Callable[..., Any]:
        original = getattr(Quality, name)

        def step(*args: Any) -> Any:
            calls.append(name)
            if broken and len(calls) == fail_at:
                raise RuntimeError("out of memory")
            return original(*args)

        return step

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        for name in ("_texts", "_gates"):
            patch.setattr(Quality, name, watched(name, broken=True))
        run_job(made, tmp_path)
    assert Quality._texts is work and len(units(made)) == fail_at - 1
    kept = units(made)
    calls.clear()
    for name in ("_texts", "_gates"):
        monkeypatch.setattr(Quality, name, watched(name, broken=False))
    resumed = run_job(made, tmp_path)
    assert calls == (["_texts"] * 3 + ["_gates"] * 2)[fail_at - 1 :]
    assert {unit: units(made)[unit] for unit in kept} == kept
    whole = run_job(replace(made, checkpoint=replace(made.checkpoint, dir=str(tmp_path / "b"))), tmp_path / "c")
    assert resumed["measurements"] == whole["measurements"]


def test_a_finished_stage_needs_no_engine(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_job(make(), tmp_path)
    monkeypatch.setattr(FakeEngine, "__init__", lambda self, plan: pytest.fail("an engine is made"))
    assert run_job(make(), tmp_path)["measurements"] == first["measurements"]


def test_plain_decoding_is_scored_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = list[bool]()
    score = FakeEngine.score

    def spy(self: FakeEngine, *args: Any, plain: bool = False) -> Any:
        plainly.append(plain)
        return score(self, *args, plain=plain)

    monkeypatch.setattr(FakeEngine, "score", spy)
    result = run_job(make("draft=none", "quality.gate_prompts=0"), tmp_path)
    assert all(plainly) and result["measurements"]["quality/text_delta_ppl"] == 0
    assert not any("gates" in key for key in result["measurements"])


def test_an_exact_policy_that_changes_the_distribution_fails(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = FakeEngine.score

    def off(self: FakeEngine, context: Any, texts: Any, *, plain: bool = False) -> list[Score]:
        scores = score(self, context, texts, plain=plain)
        return scores if plain else [s._replace(logprobs=tuple(x - 0.01 for x in s.logprobs)) for s in scores]

    monkeypatch.setattr(FakeEngine, "score", off)
    monkeypatch.setattr(FakeEngine, "describe", lambda self: {"dtype": "float32"})
    result = run_job(make(), tmp_path)
    assert result["status"] == "failed" and "not exact: delta-PPL of the reference answers is +" in (
        result["error"] or ""
    )
    relaxed = run_job(make("policy.verify=false"), tmp_path)
    assert relaxed["status"] == "finished"
    monkeypatch.setattr(FakeEngine, "describe", lambda self: {"dtype": "bfloat16"})
    assert run_job(make("seed=1"), tmp_path)["status"] == "finished", "rounding may be as large"


@pytest.mark.parametrize(
    ("logprob", "says"),
    [
        (math.nan, "has nan nats"),
        (-math.inf, "has inf nats"),
        (-1e4, "000 nats"),  # a perplexity that no double holds
        (0.5, "has -"),  # a probability above one
    ],
)
def test_a_text_without_a_perplexity_fails_in_a_line_and_is_not_journalled(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logprob: float, says: str
) -> None:
    def off(self: FakeEngine, context: Any, texts: Any, *, plain: bool = False) -> list[Score]:
        return [Score((logprob,) * len(text), True) for text in texts]

    monkeypatch.setattr(FakeEngine, "score", off)
    with pytest.raises(StageError, match=r"^what was measured makes no sense: prompt .* plain_reference of ") as told:
        run_job(make(), tmp_path)
    assert says in str(told.value) and units(make()) == {}


def test_a_gate_that_sees_no_number_fails_in_a_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = FakeEngine.probe

    def off(self: FakeEngine, *args: Any) -> list[Signals]:
        first, *others = probe(self, *args)
        return [first._replace(entropy=(math.nan,) * len(first.entropy)), *others]

    monkeypatch.setattr(FakeEngine, "probe", off)
    with pytest.raises(StageError, match=r"^what was measured makes no sense: exit \d, raw: entropy is not finite$"):
        run_job(make(), tmp_path)


def test_a_relaxed_policy_is_explained(make: Make, tmp_path: Path) -> None:
    (note,) = run_job(make("policy=typical"), tmp_path)["notes"]
    assert "its own text's does" in note


def test_what_a_tracker_is_shown(make: Make, tmp_path: Path) -> None:
    run_job(make(), tmp_path)
    shown = {unit: Quality(make()).per_unit(data) for unit, data in units(make()).items()}
    assert shown["gates/00000-00002"] == {}
    assert shown["texts/00000-00002"]["quality/unit/reference_delta_ppl"] == 0


def test_answers_too_short_to_draft_are_passed_over() -> None:
    class Silent(FakeEngine):
        def probe(self, *args: Any) -> list[Signals]:
            raise AssertionError("nothing was drafted")

    unit = {"prompts": [[1, 2]], "conversations": [{"plain_tokens": [3]}]}
    asked: Any = type("Plan", (), {"quality": type("Quality", (), {"exits": None})})
    assert Quality(asked)._gates(object.__new__(Silent), [unit], slice(0, 1)) == {"exits": []}


# ---------------------------------------------------------------------------- refusals, identity, tables


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("quality.prompts=-1", "quality.prompts=-1: must be >= 0"),
        ("quality.gate_prompts=9", r"quality.gate_prompts=9: must be from 0 to 5"),
        ("quality.limit=0", "quality.limit=0: must be >= 1"),
        ("quality.chunk=0", "quality.chunk=0: must be >= 1"),
    ],
)
def test_refused_with_the_reason(make: Make, overrides: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make(overrides)


def test_what_is_not_there_is_refused_before_anything_is_written(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = make("quality.tasks=[arc_hard]")
    placed = replace(made.quality, data={"arc_hard": TaskData("file:/nowhere/x.arrow")})
    with pytest.raises(ConfigError, match=r"quality.data.arc_hard: lm-eval has no task of this name"):
        job.check(replace(made, quality=placed))
    job.check(make("quality.tasks=[arc_easy]"))
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quality.tasks=\['arc_easy'\]: needs lm-eval; pip install"):
        job.check(make("quality.tasks=[arc_easy]"))
    with pytest.raises(ConfigError, match=r"quality.gate_prompts=3: needs scikit-learn"):
        job.check(make())
    job.check(make("quality.gate_prompts=0"))
    assert not (tmp_path / "outputs").exists()


def test_an_engine_that_scores_nothing_is_refused(make: Make) -> None:
    made = make()
    made = replace(made, engine=ENGINE.new("openai"))
    with pytest.raises(ConfigError, match=r"engine=openai: stages=\[quality\] needs one of fake, hf, torch"):
        Quality(made).check()


def test_identity(make: Make) -> None:
    made = make()
    assert made.id != make("quality.prompts=6").id and made.id != make("quality.answer_tokens=8").id
    assert made.id == make("quality.name=other").id
    bench = ("stages=[bench]", "scale.prompts=2")
    assert make(*bench).id == make(*bench, "quality.prompts=6").id, "not of plans without the stage"
    moved = "quality.data.arc_easy.source='pypi:other==1/x'"
    assert made.id == make(moved).id, "the same content elsewhere"
    assert made.id != make(f"quality.data.arc_easy.sha256={'0' * 64}").id


def measured(**numbers: float) -> Result:
    return test_report.result(
        label="lsq12", measurements={key.replace("__", "/"): number for key, number in numbers.items()}
    )


def met(row: Result) -> dict[str, str]:
    (targets,) = [section for section in tables.sections([row]) if "target" in section.columns]
    return {cells[1]: cells[-1] for cells in targets.cells}


def test_targets_are_met_by_the_whole_interval() -> None:
    delta, name = "quality__reference_delta_ppl", "delta-PPL, reference answers"
    for high, verdict in ((0.17, "yes"), (0.19, "unclear")):
        assert met(measured(**{delta: 0.1, f"{delta}_low": 0.0, f"{delta}_high": high})) == {name: verdict}
    row = measured(
        quality__text_delta_ppl=0.5, bench__acceptance=0.46, bench__ttft_ms=54, bench__plain_ttft_ms=100,
        bench__speedup=1.9, bench__speedup_low=1.8, bench__speedup_high=1.95,
    )  # fmt: skip
    said = {"delta-PPL, own text": "no", "acceptance rate": "yes"}
    assert met(row) == said | {"TTFT over plain's": "yes", "tok/s over plain's": "no"}
    row["measurements"] |= {"bench/ttft_ms": 55, "bench/speedup_low": 2.0, "bench/speedup_high": 2.4}
    assert met(row) == said | {"TTFT over plain's": "no", "tok/s over plain's": "yes"}


def test_tables_of_tasks_and_gates() -> None:
    prefix = "quality__tasks__arc_easy__"
    row = measured(
        **{prefix + "plain__documents": 100, prefix + "plain__acc": 0.5, prefix + "plain__acc_stderr": 0.05},
        **{prefix + "configured__documents": 100, prefix + "configured__acc": 0.25},
        quality__gates__12__lsq__acceptance=0.3, quality__gates__12__lsq__maxp_auc=0.8,
        quality__gates__4__raw__acceptance=0.1,
    )  # fmt: skip
    text = report.text([row])
    assert "| lsq12         | arc_easy     | 100       | 0.500 +- 0.050 -> 0.250 | - -> -   |" in text
    places = [text.index(cells) for cells in ("| 4    | raw  | 0.100 ", "| 12   | lsq  | 0.300    | 0.800 ")]
    assert places == sorted(places)
    assert "delta-PPL" not in report.text([measured(bench__tok_s=3.0)]), "a bench alone has its own table only"


# ---------------------------------------------------------------------------- lm-eval, without a model

CHOICES = {"text": ["a", "bb", "c"], "label": ["A", "B", "C"]}
ARC = [{"id": str(i), "question": f"Which is {i}?", "choices": CHOICES, "answerKey": "B"} for i in range(7)]


@pytest.fixture
def arrow(tmp_path: Path) -> Path:
    """Seven questions in ARC's form, in a folder whose name YAML would trip over."""
    from datasets import Dataset

    folder = tmp_path / "it's: a {folder}"
    Dataset.from_list(ARC).save_to_disk(folder)
    return next(folder.glob("*.arrow"))


def test_tasks_run_plainly_and_as_configured(
    make: Make, arrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("quality.tasks=[arc_easy]", "quality.limit=4", "quality.prompts=0", "quality.gate_prompts=0")
    data = {"arc_easy": replace(made.quality.data["arc_easy"], source=f"file:{arrow}", sha256=None)}
    made = replace(made, quality=replace(made.quality, data=data))
    seen = list[bool]()
    score = FakeEngine.score

    def prefers_b(self: FakeEngine, context: Any, texts: Any, *, plain: bool = False) -> list[Score]:
        seen.append(plain)
        assert bytes(context).decode() == f"Question: Which is {(len(seen) - 1) % 4}?\nAnswer:" and len(texts) == 3
        return [Score((-1.0 if plain and b"bb" in bytes(text) else -2.0,), False) for text in texts]

    job.check(made)
    job.fetch(made)
    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "score", prefers_b)
        result = run_job(made, tmp_path / "run")
    assert seen == [True] * 4 + [False] * 4, "each context is read once for all its choices"
    found = {key: value for key, value in result["measurements"].items() if key.startswith("quality/tasks/arc_easy")}
    assert (found["quality/tasks/arc_easy/plain/acc"], found["quality/tasks/arc_easy/configured/acc"]) == (1, 0)
    assert (
        found["quality/tasks/arc_easy/plain/documents"] == 4 and found["quality/tasks/arc_easy/plain/acc_stderr"] == 0
    )
    kept = json.loads((tmp_path / "run" / "lm_eval.json").read_text())
    assert [(unit["way"], unit["split"]) for unit in kept] == [("plain", "validation"), ("configured", "validation")]
    assert FakeEngine.score is score


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's index of ARC alone: all of it takes seconds to read."""
    import lm_eval.tasks

    arc = Path(lm_eval.tasks.__file__).parent / "arc"
    small = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=arc)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    monkeypatch.setattr(tasks, "_load", tasks._load.__wrapped__)  # keeps nothing


def test_a_task_that_lm_eval_does_not_have(make: Make, index: None) -> None:
    made = make("quality.tasks=[arc_hard]")
    with pytest.raises(ConfigError, match=r"quality\.tasks=arc_hard: lm-eval has no such task"):
        tasks.evaluate(FakeEngine(made), made.quality, "arc_hard", plain=True)


def test_the_hubs_documents_are_those_that_lm_eval_asks_for(
    make: Make, index: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def hub(path: str, name: str, **options: Any) -> Any:
        assert (path, name) == ("allenai/ai2_arc", "ARC-Easy")
        splits = {"train": ARC[:1], "validation": ARC[:2], "test": ARC[2:]}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    made = make("quality.tasks=[arc_easy]", "quality/data=hub", "quality.limit=null")
    found = tasks.evaluate(FakeEngine(made), made.quality, "arc_easy", plain=True)
    assert (found["split"], found["documents"]) == ("test", 5) and {"acc", "acc_norm", "acc_stderr"} <= {
        *found["metrics"]
    }

    def unreachable(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(AssetError, match=r"quality\.tasks=arc_easy: its documents cannot be had: no route to the hub"):
        tasks.evaluate(FakeEngine(made), made.quality, "arc_easy", plain=True)


def test_what_a_task_asks_and_we_do_not_do_is_refused_by_name() -> None:
    done = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "min_p": 0, "early_stopping": None}
    assert generation.sampling(done | neutral) == Sampling(0.5, 3, 0.9)
    for key, value in (("repetition_penalty", 1.5), ("num_beams", 4), ("bad_words", ["x"])):
        with pytest.raises(ConfigError, match=rf"generation_kwargs\.{key}=.*: is not done here"):
            generation.sampling(done | {key: value})
