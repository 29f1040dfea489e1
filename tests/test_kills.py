"""A sweep that loses processes and is carried on with: its table is an undisturbed one's, and no work is done twice.

Two kills with a fixed seed; ``tests/benchmarks/kills.py`` does fifty: with every launcher, fits, a tracker, a bucket.
"""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from disturbed import Sweep, violations
from launched import until

pytestmark = pytest.mark.slow

Make = Callable[[], Sweep]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Make:
    """A sweep of three jobs on the fake engine, in a folder of its own."""

    def made() -> Sweep:
        cache = {"SELFSPEC_CACHE": str(prompts_file.with_name("cache"))}
        overrides = [*tiny.fake_job(prompts_file), "K=1,2,3", "scale.prompts=6", "scale.warmup=0"]
        return Sweep(tmp_path_factory.mktemp("sweep") / "of three", overrides, virtual=True, environment=cache)

    return made


@pytest.fixture(scope="module")
def undisturbed(make: Make) -> Sweep:
    return make().finish()


def test_killed_and_carried_on_with(make: Make, undisturbed: Sweep) -> None:
    sweep, chance, made = make(), random.Random(0), 0
    sweep.hold.touch()
    for signum, first in ((signal.SIGKILL, 1), (signal.SIGTERM, 12)):  # in the first job, and in the second or third
        calls = chance.randint(first, first + 11)
        with sweep.launch(calls) as process:
            made += calls
            until(lambda wanted=made: len(sweep.calls()) == wanted, process, sweep.log)
            process.send_signal(signum)
        assert process.returncode == (-signum if signum is signal.SIGKILL else 128 + signum), sweep.said()
    sweep.hold.unlink()
    sweep.finish()
    assert violations(sweep, undisturbed) == []
    assert len(sweep.calls()) in range(36 + 2, 36 + 2 * 2 + 1), "each kill cost a call or two: the unit in hand"
    assert "Traceback" not in sweep.said()


def test_two_launchers_at_once_run_each_unit_once(make: Make, undisturbed: Sweep) -> None:
    sweep = make()
    sweep.hold.touch()
    with sweep.launch() as one, sweep.launch() as other:
        until(lambda: "waiting for another process that runs the same plan" in sweep.said(), one, sweep.log)
        sweep.hold.unlink()
        assert [one.wait(), other.wait()] == [0, 0], sweep.said()
    assert violations(sweep, undisturbed) == []
    assert len(sweep.calls()) == len(undisturbed.calls()) == 36, "each unit once"
    one_table, other_table = (path.read_text() for path in sweep.folder.rglob("sweeps/*/summary.csv"))
    assert one_table == other_table


def test_each_planted_violation_is_found(undisturbed: Sweep, tmp_path: Path) -> None:
    def found(change: Callable[[Sweep], None]) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = Sweep(tmp_path / "copy" / "of it", [], virtual=True)
        shutil.copytree(undisturbed.folder, copy.folder, dirs_exist_ok=True)
        change(copy)
        return "\n".join(violations(copy, undisturbed))

    def lines(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Sweep], None]:
        def changed(sweep: Sweep) -> None:
            path = sorted(sweep.folder.rglob(name))[-1]  # the sweep's own comes after its jobs'
            path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

        return changed

    assert found(lines("calls", list)) == ""
    again = [
        line.replace('"pid": ', '"pid": 9') for line in (undisturbed.folder / "calls").read_text().splitlines(True)
    ]
    assert "began when that was finished" not in found(lines("calls", lambda all: [again[0], *all]))
    late = again[0].replace('"at": ', '"at": 9')
    assert "began when that was finished" in found(lines("calls", lambda all: [*all, late]))
    assert "processes at once" in found(lines("calls", lambda all: [all[0], again[1], *all[1:]]))
    assert "more was run again" in found(lines("calls", lambda all: [*again[:4], *all]))
    assert "lost, or added" in found(lines("journal.jsonl", lambda all: all[:-1]))
    assert "never ran" in found(lines("calls", lambda all: all[1:]))
    assert "tables differ" in found(lines("summary.csv", lambda all: [all[0], *all[2:]]))
