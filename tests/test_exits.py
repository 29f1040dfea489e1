"""exit_layer=auto: all candidates from one pass, the choice as arithmetic, and a job that keeps to it."""

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import planned, run_job
from torch.testing import assert_close

from selfspec import fitting, job
from selfspec.axes import DRAFT, GATE
from selfspec.engine import factory
from selfspec.errors import HeadError
from selfspec.model.llama import Llama
from selfspec.plan import Plan
from selfspec.report import tables
from selfspec.speculation import exits, fit
from selfspec.speculation.choice import Exit, Odds, choose
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import HeadForm
from selfspec.stages.bench import Bench
from selfspec.types import Request

LAYERS = [1, 2, 3, 4]
"""Candidates of the tiny model's six."""


@pytest.mark.parametrize(
    ("layers", "wanted"), [(2, [1]), (6, LAYERS), (12, [1, 2, 3, 4, 6]), (30, [1, 2, 3, 4, 6, 9, 13, 19])]
)
def test_candidates(layers: int, wanted: list[int]) -> None:
    assert exits.candidates(layers) == wanted


@pytest.mark.usefixtures("inference")
class TestSurvey:
    @pytest.fixture
    def model(self, tiny_folder: Path) -> Llama:
        return Llama.load(tiny_folder, torch.device("cpu"), torch.float32)

    @pytest.fixture
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        chance = torch.Generator().manual_seed(1)
        lengths = [(6 + i % 5, 5 + i % 4) for i in range(20)]
        return [tuple(torch.randint(5, 80, (n,), generator=chance).tolist() for n in both) for both in lengths]  # type: ignore[misc]

    @pytest.mark.parametrize(
        "settings",
        [
            {"form": HeadForm.affine},
            {"form": HeadForm.affine, "previous": True, "vocab": 40},
            {"form": HeadForm.low_rank, "rank": 4},
        ],
    )
    def test_one_pass_gives_what_each_exit_gives_alone(
        self, model: Llama, pairs: list[tuple[list[int], list[int]]], settings: dict[str, Any]
    ) -> None:
        draft = DRAFT.new("lsq", exit_layer="auto", ridge=1e-2, **settings)
        seen = exits.states(model, pairs)
        assert sorted(seen) == LAYERS
        head = exits.fit(model, draft, {layer: fit.split(traces)[0] for layer, traces in seen.items()})
        for layer, made in exits.drafts(model, draft, head).items():
            alone = draft.at(layer).fit(model, *fit.split([fit.trace(model, *pair, layer) for pair in pairs]), 0)
            for name, tensor in alone.tensors.items():
                assert_close(head.tensors["ids" if name == "ids" else f"{layer}.{name}"], tensor)
            assert made.exit_layer == layer
            odds = exits.odds(made, Gate(), fit.split(seen[layer])[1], 3)
            assert odds.passed == (1.0,) * len(odds.passed)
            assert [ranks[0] for ranks in odds.ranks] == pytest.approx(alone.facts["agreement_by_position"][:3])

    @pytest.mark.parametrize("gate", [Gate(), GATE.new("maxp", threshold=0.5).make(0)])
    def test_odds_by_their_definition(self, model: Llama, pairs: list[tuple[list[int], list[int]]], gate: Gate) -> None:
        """Every start on its own, one token after the other, as long as tokens are proposed and stand."""
        draft = DRAFT.new("layerskip", exit_layer=3, width=2).make(model, None)
        assert isinstance(draft, EarlyExit)
        traces = [fit.trace(model, *pair, 3) for pair in pairs]
        asked, passed, ranks = [0] * 2, [0] * 2, [[0] * 3 for _ in range(2)]
        for trace in traces:
            for start, step in itertools.product(trace.at.tolist(), range(2)):
                at = start + step
                before = trace.tokens[start + 1 : at + 1].tolist()
                heads = [model.norm(trace.exit[place : place + 1]) for place in range(start, at + 1)]  # type: ignore[index]
                logits = [model.logits(state) for state in heads]
                stopped = [gate.stops(float(gate.signal(one)[0])) if gate.reads else False for one in logits]
                guesses = [int(one.argmax()) for one in logits]
                if at >= len(trace.tokens) - 1 or any(stopped[:step]) or guesses[:step] != before:
                    continue
                asked[step] += 1
                if not stopped[step]:
                    passed[step] += 1
                    order = logits[step][0].argsort(descending=True).tolist()
                    rank = order.index(int(trace.tokens[at + 1]))
                    if rank < 3:
                        ranks[step][rank] += 1
        odds = exits.odds(draft, gate, traces, 2)
        assert odds.passed == pytest.approx([p / a for p, a in zip(passed, asked, strict=True) if a])
        for step, found in enumerate(odds.ranks):
            assert list(found[:3]) == pytest.approx([count / max(1, passed[step]) for count in ranks[step]])


ALWAYS = (1.0,) * 4


def odds(*first: float, second: float = 0.0, passed: tuple[float, ...] = ALWAYS) -> Odds:
    return Odds(passed[: len(first)], tuple((share, second) for share in first))


class TestChoice:
    @pytest.mark.parametrize(
        ("of", "k", "width", "budget", "steps", "accepted"),
        [
            (odds(0.5, 0.4, 0.2), 1, 1, None, 1, 0.5),
            (odds(0.5, 0.4, 0.2), 3, 1, None, 3, 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.2),
            (odds(0.5, 0.4, passed=(0.5, 1.0)), 2, 1, None, 1.5, 0.25 + 0.25 * 0.4),
            (odds(0.5, 0.4, passed=(0.0, 0.0)), 2, 1, None, 1, 0),
            (odds(0.5, 0.4, second=0.1), 2, 2, None, 2, 0.6 + 0.5 * 0.5),
            (odds(0.5, 0.4, second=0.1), 2, 2, 3, 2, 0.6 + 0.5 * 0.4),
            (odds(0.5, 0.4, second=0.1), 2, 2, 1, 2, 0.5),
        ],
    )
    def test_what_drafts_come_to(
        self, of: Odds, k: int, width: int, budget: int | None, steps: float, accepted: float
    ) -> None:
        assert (of.steps(k), of.accepted(k, width, budget)) == pytest.approx((steps, accepted))

    EARLY, LATE = odds(0.3, 0.3, 0.3, 0.3), odds(0.8, 0.8, 0.8, 0.8)

    @pytest.mark.parametrize(
        ("early", "late", "ks", "wanted", "speedup"),
        [
            ({1: 11, 4: 20}, {1: 16, 4: 30}, range(1, 5), (1, 1), 13 / 11),
            ({1: 11, 4: 11.1}, {1: 18, 4: 30}, range(1, 5), (1, 4), 14.251 / 11.1),
            ({1: 20, 4: 40}, {1: 12, 4: 17}, range(1, 5), (3, 4), 33.616 / 17),
            ({1: 20, 4: 40}, {1: 12, 4: 48}, range(1, 5), (3, 1), 18 / 12),
            ({2: 12}, {2: 30}, [2], (1, 2), 13.9 / 12),
            ({1: 20, 4: 40}, {1: 50, 4: 90}, range(1, 5), (1, 1), 13 / 20),
            ({1: 13, 4: 40}, {1: 18, 4: 90}, range(1, 5), (1, 1), 1),
        ],
    )
    def test_the_highest_speedup_that_is_foretold(
        self,
        early: dict[int, float],
        late: dict[int, float],
        ks: Sequence[int],
        wanted: tuple[int, int],
        speedup: float,
    ) -> None:
        made = choose({3: Exit(self.LATE, late), 1: Exit(self.EARLY, early)}, 10, ks)
        assert (made["exit_layer"], made["K"]) == wanted
        assert made["speedup"] == pytest.approx(speedup) and [*made["exits"]] == ["1", "3"]


FAVOURING = {1: {1: 1.0, 2: 90.0, 3: 90.0, 4: 90.0}, 3: {1: 90.0, 2: 90.0, 3: 1.0, 4: 90.0}}
"""Milliseconds a token drafted, by exit layer."""


@pytest.mark.slow
class TestJob:
    @pytest.fixture
    def base(self, overrides: list[str]) -> list[str]:
        return [*overrides, "exit_layer=auto"]

    @pytest.fixture
    def favour(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def prefer(layer: int) -> None:
            def costs(ways: Mapping[Hashable, Any], *_: Any) -> dict[Hashable, float]:
                return {name: 10.0 + FAVOURING[layer].get(name[0], 0.0) * name[1] for name in ways}  # type: ignore[index]

            monkeypatch.setattr("selfspec.engine.torch.engine.cycle_ms", costs)

        return prefer

    @staticmethod
    def settled(made: Plan) -> Plan:
        with job.Journal.open(job.place(made), made.id, {}, made.checkpoint.resume) as journal:
            return job.chosen(made, journal)

    def test_the_exit_that_promises_most_is_measured_and_reported(
        self, base: list[str], favour: Any, tmp_path: Path
    ) -> None:
        favour(3)
        made = planned(*base)
        result = run_job(made, tmp_path / "a")
        told, head = result["measurements"], fitting.head_path(self.settled(made))
        assert result["label"].startswith("lsq3 K=") and result["lossless"] == "yes" and told["fit/exit_layer"] == 3
        assert head.exists() and head == fitting.head_path(planned(*base, "exit_layer=3")), "a number's own head"
        said = tables.text([result])
        assert f"exit layer 3 and K={told['fit/K']:.0f} promised most: {told['fit/speedup']:.2f}x (measured: " in said
        assert (tmp_path / "a" / "exits.png").exists()

    def test_a_number_is_that_layer(self, base: list[str], favour: Any, tmp_path: Path) -> None:
        favour(3)
        result = run_job(planned(*base, "exit_layer=1"), tmp_path / "a")
        assert result["label"] == "lsq1 K=4" and "fit/exit_layer" not in result["measurements"]
        assert "promised" not in tables.text([result]) and not (tmp_path / "a" / "exits.png").exists()

    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_a_job_that_was_killed_keeps_the_exit_that_it_chose(
        self, base: list[str], favour: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
    ) -> None:
        """Also where it carries on on another machine, on which another exit would be best."""
        made = planned(*base, "K=2")
        favour(3)
        with monkeypatch.context() as patch:
            patch.setattr(Bench, "units", self.killed)
            with pytest.raises(HeadError, match="killed"):
                run_job(made, tmp_path / "a")
        favour(1)
        if elsewhere:
            for module in ("fitting", "stages.fit", "provenance"):
                monkeypatch.setattr(f"selfspec.{module}.fingerprint", lambda *_: "another")
        result = run_job(made, tmp_path / "b")
        assert result["label"] == "lsq3 K=2"
        assert any("chosen on other hardware" in note for note in result["notes"]) == elsewhere
        again = planned(*base, "K=2", "workload.new_tokens=13")
        assert run_job(again, tmp_path / "c")["label"] == ("lsq1 K=2" if elsewhere else "lsq3 K=2"), "its own choice"

    @staticmethod
    def killed(*_: Any) -> Iterator[None]:
        raise HeadError("killed")
        yield

    @pytest.mark.parametrize("draft", ["layerskip", "layerskip draft.vocab=40", "lsq_lowrank draft.rank=4"])
    def test_other_early_exits(self, base: list[str], favour: Any, tmp_path: Path, draft: str) -> None:
        favour(3)
        result = run_job(planned(*base, f"draft={draft.split()[0]}", *draft.split()[1:], "gate=maxp"), tmp_path / "a")
        assert "3" in result["label"] and result["lossless"] == "yes"

    def test_a_server_takes_the_choice_that_was_made_on_this_machine(self, base: list[str], favour: Any) -> None:
        made, prompt = planned(*base, "K=2"), Request((7, 21, 3), 4)
        for layer in (3, 1):
            favour(layer)
            engine = factory.make(made)
            fitting.install(engine, made)
            assert engine.plan.label == "lsq3 K=2", "the first one's"  # type: ignore[attr-defined]
            assert engine.generate([prompt])[0].tokens == engine.generate([prompt], plain=True)[0].tokens

    def test_prices_are_measured(self, base: list[str], tmp_path: Path) -> None:
        result = run_job(planned(*base, "gate=varH", "draft.width=2"), tmp_path / "a")
        told = result["measurements"]
        assert all(told[f"fit/exits/{layer}/cycle_ms"] > 0 for layer in LAYERS) and told["fit/plain_ms"] > 0
