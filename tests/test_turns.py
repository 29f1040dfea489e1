"""Conversations asked turn by turn: every way is asked the same, after the model's own answers; each turn is kept."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from plans import planned, run_job
from tiny import WORDS

from selfspec import job
from selfspec.checkpoint import Journal
from selfspec.config import Resume
from selfspec.engine.fake.engine import Bytes, FakeEngine
from selfspec.engine.tokenizer import ModelTokenizer
from selfspec.errors import ConfigError, StageError
from selfspec.plan import Plan
from selfspec.types import Completion, Request

Make = Callable[..., Plan]
FAKE = ("engine=fake", "draft=layerskip", "scale.warmup=0")


@pytest.fixture
def make(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A plan on the tiny model and conversations of three turns, and some of one."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    rng, path = random.Random(0), tmp_path / "turns.jsonl"
    asked = [[" ".join(rng.choices(WORDS, k=6)) for _ in range(3 if n % 4 else 1)] for n in range(160)]
    path.write_text("".join(json.dumps({"question_id": n, "turns": turns}) + "\n" for n, turns in enumerate(asked)))
    return partial(planned, *overrides, "hardware.threads=1", f"workload.source=file:{path}")


def asked_of(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[tuple[bool, list[tuple[int, ...]]]]:
    """What the fake engine is asked, whether plainly; the given call fails."""
    calls, generate = list[tuple[bool, list[tuple[int, ...]]]](), FakeEngine.generate

    def spy(self: FakeEngine, requests: list[Request], *, plain: bool = False) -> list[Completion]:
        calls.append((plain, [request.tokens for request in requests]))
        if len(calls) == fail_at:
            raise RuntimeError("the machine is taken away")
        return generate(self, requests, plain=plain)

    monkeypatch.setattr(FakeEngine, "generate", spy)
    return calls


def test_each_turn_is_asked_after_the_models_own_answers(make: Make, tmp_path: Path) -> None:
    made = make("draft=layerskip", "engine.kernels=torch", "workload.turns=3", "scale.repeats=2", "engine.max_batch=2")
    result = run_job(made, tmp_path / "out")
    measured = result["measurements"]
    assert (result["lossless"], measured["bench/prompts"], measured["bench/units"]) == ("yes", 3, 2 * 2 * 3)
    assert result["notes"][0] == "3 turns of each conversation, asked after plain decoding's answers to those before"
    assert "3 prompts x 3 turns x 12 tokens" in " ".join((tmp_path / "out" / "report.txt").read_text().split())
    with Journal.open(job.place(made), made.id, {}, Resume.require) as kept:
        records = {record.unit: record.data for record in kept.records("bench")}
    assert [*records][:3] == ["unit-0000/repeat-0", "unit-0000/repeat-0/turn-1", "unit-0000/repeat-0/turn-2"]
    rows = map(json.loads, Path(made.workload.source.removeprefix("file:")).read_text().splitlines())
    turns = {str(row["question_id"]): row["turns"] for row in rows}
    tokenizer = ModelTokenizer(made.model, lambda: Path(made.model.source.removeprefix("file:")))
    for unit in ("unit-0000/repeat-0", "unit-0001/repeat-1"):
        for at, id in enumerate(records[unit]["prompts"]):
            messages, lengths = list[dict[str, str]](), list[int]()
            for turn, text in enumerate(turns[id]):
                data = records[f"{unit}/turn-{turn}" if turn else unit]
                messages.append({"role": "user", "content": text})
                lengths.append(len(tokenizer.encode_chat(messages)))
                assert data["prompts"][at] == id and data["prompt_tokens"][at] == lengths[-1]
                messages.append({"role": "assistant", "content": tokenizer.decode(data["plain"][at]["tokens"])})
            assert lengths == sorted(set(lengths)), "each turn's prompt has what was said before"


def test_every_way_is_asked_the_same(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked_of(monkeypatch)
    made = make(*FAKE, "workload.turns=2", "scale.prompts=2")
    run_job(made, tmp_path / "out")
    assert [tokens for plain, tokens in calls if plain] == [tokens for plain, tokens in calls if not plain]
    first, second = (bytes(tokens).decode() for _, (tokens,) in calls[:4:2])
    assert second.startswith(f"<user>{first}<assistant>") and second.rpartition("<user>")[2] not in first
    assert [plain for plain, _ in calls[:4]] == [True, False, False, True]


def test_a_conversation_that_was_broken_off_goes_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(*FAKE, "workload.turns=3", "scale.prompts=2")
    whole = make(*FAKE, "workload.turns=3", "scale.prompts=2", f"checkpoint.dir={tmp_path / 'other'}")
    with monkeypatch.context() as patch:
        expected = asked_of(patch)
        run_job(whole, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="taken away"):
        asked_of(patch, fail_at=4)  # the second turn's other way
        run_job(made, tmp_path / "out")
    calls = asked_of(monkeypatch)
    result = run_job(made, tmp_path / "out")
    assert calls == expected[2:], "the first turn was in the journal"
    assert result["measurements"]["bench/units"] == 6


def test_a_template_that_refuses_a_second_turn_is_one_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Bytes, messages: object) -> list[int]:
        raise ValueError("roles must alternate")

    monkeypatch.setattr(Bytes, "encode_chat", refuse)
    with pytest.raises(StageError, match=r"^workload\.turns=2: the model's chat template refuses turn 2: roles must"):
        run_job(make(*FAKE, "workload.turns=2"), tmp_path)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("workload.turns=0", r"workload\.turns=0: must be"),
        ("workload.turns=2 workload.chat=false", r"workload\.turns=2: needs a chat"),
        ("workload.turns=2 workload.prompt_tokens=8", r"workload\.turns=2: needs a chat"),
        ("workload.turns=2 stages=[fit]", r"workload\.turns=2: only the bench stage"),
    ],
)
def test_what_cannot_be_asked_is_refused(make: Make, more: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        make(*FAKE, *more.split())


def test_conversations_of_fewer_turns_are_passed_over(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scale\.prompts=40: must be at most \d+, .*workload\.turns=2; "):
        run_job(make(*FAKE, "workload.turns=2", "scale.prompts=40"), tmp_path)
    with pytest.raises(ConfigError, match=r"scale\.prompts=9: must be at most 0, .*workload\.turns=4; "):
        run_job(make(*FAKE, "workload.turns=4", "scale.prompts=9"), tmp_path)
