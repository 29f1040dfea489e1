"""The profile stage: what is dear, by part of a cycle; a trace that opens; memory over time."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfspec.engine.torch.profile import PYTHON, by_phase
from selfspec.speculation import phases
from selfspec.speculation.phases import PHASES

Run = Callable[..., tuple[int, str, str]]


def event(name: str, start: float, host: float, device: float = 0.0) -> SimpleNamespace:
    times = {"self_cpu_time_total": host, "self_device_time_total": device}
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start), **times)


def test_an_operator_is_of_the_part_that_began_last() -> None:
    events = [event("mm", 1, 5), event("draft", 2, 1), event("mm", 3, 4), event("verify", 10, 2), event("mm", 10, 7, 9)]
    events += [event("mm", 11, 1), event("accept", 20, 0.5), event("copy", 21, 3)]
    found = {(one.phase, one.name): one[2:] for one in by_phase(events)}
    assert found[("before", "mm")] == (1, 5, 0) and found[("draft", "mm")] == (1, 4, 0)
    assert found[("verify", "mm")] == (2, 8, 9) and found[("verify", PYTHON)] == (1, 2, 0)
    assert found[("accept", "copy")] == (1, 3, 0)
    assert next(one.name for one in by_phase(events)) == "mm", "the dearest comes first"


def test_parts_are_marked_only_while_somebody_looks() -> None:
    seen, unmarked = list[str](), phases.phase("draft")

    def mark(name: str) -> AbstractContextManager[None]:
        seen.append(name)
        return nullcontext()

    with phases.marked(mark), phases.phase("verify"):
        pass
    with phases.phase("accept"):
        pass
    assert seen == ["verify"] and phases.phase("draft") is unmarked


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.slow
def test_a_job_leaves_its_profile_and_does_not_run_it_twice(run: Run, overrides: list[str], tmp_path: Path) -> None:
    asked = [*overrides, "draft=layerskip", "stages=[bench,profile]", "workload.new_tokens=12"]
    code, out, err = run(*asked)
    assert code == 0, err
    assert all(f"profile: {phase} " in out for phase in PHASES)
    (first,) = (tmp_path / "outputs").glob("main/runs/*")
    operators = rows(first / "operators.csv")
    assert {row["phase"] for row in operators} >= set(PHASES)
    assert any(row["name"] == "aten::addmm" and int(row["calls"]) > 10 for row in operators if row["phase"] == "verify")
    trace = json.loads(gzip.decompress((first / "trace.json.gz").read_bytes()))
    assert {"draft", "verify", "accept"} <= {event.get("name") for event in trace["traceEvents"]}
    memory = rows(first / "memory.csv")
    assert len(memory) >= 2 and all(float(row["resident_mb"]) > 50 for row in memory)
    assert (first / "memory.png").read_bytes().startswith(b"\x89PNG")
    measured = json.loads((first / "result.json").read_text())["measurements"]
    shares = [measured[f"profile/host_share/{phase}"] for phase in PHASES]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0

    code, out, err = run(*asked)
    assert code == 0, err
    (second,) = set((tmp_path / "outputs").glob("main/runs/*")) - {first}
    assert (second / "operators.csv").read_text() == (first / "operators.csv").read_text()
    assert (second / "trace.json.gz").read_bytes() == (first / "trace.json.gz").read_bytes()


def test_an_engine_that_cannot_is_refused(run: Run, fake: list[str]) -> None:
    code, out, err = run(*fake, "stages=[profile]")
    assert (code, out) == (2, "")
    assert err.strip() == (
        "error: engine=fake: stages=profile needs an engine that decodes in this process, by torch: torch"
    )
