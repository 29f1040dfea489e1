"""For tests of launchers: sweeps in a process of their own, whose jobs can be held up and killed from outside."""

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfspec.checkpoint import FILE

REPO = Path(__file__).parents[1]
WITNESS = Path(__file__).with_name("witness")
HELD_UNITS = 2
"""Of a job that is held."""
_HELD_AT = 2 + 2 * HELD_UNITS + 1
"""The call of its engine that is: there are two of the warm-up and of each unit."""


class Sweep:
    """``python -m selfspec.run -m ...`` as a process.

    Attributes:
        hold: while it exists, jobs finish ``HELD_UNITS``, then wait; they can be signalled and killed meanwhile.
    """

    def __init__(self, folder: Path, *argv: str, dies: str = "") -> None:
        """``dies``: the override of a job that does, as it starts."""
        self.hold, self.outputs = folder / "hold", folder / "outputs"
        path = os.pathsep.join(filter(None, (str(WITNESS), os.environ.get("PYTHONPATH"))))
        self.environment = os.environ | {"PYTHONPATH": path, "ENGINE_CALLS": str(folder / "calls")}
        self.environment |= {"ENGINE_HOLD": str(self.hold), "ENGINE_HOLD_AT": str(_HELD_AT), "ENGINE_DIES": dies}
        self.argv = [sys.executable, "-m", "selfspec.run", "-m", *argv]
        self.log = folder / "launcher.log"

    @contextmanager
    def started(self) -> Iterator["subprocess.Popen[bytes]"]:
        """Its process, with its output in ``log``; a test that fails leaves nothing behind."""
        with self.log.open("wb") as log:
            process = subprocess.Popen(self.argv, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=REPO)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def run(self) -> tuple[int, str]:
        """Exit code and output."""
        with self.started() as process:
            return process.wait(), self.log.read_text()

    def units(self) -> list[list[str]]:
        """The finished units of each plan that has a journal."""
        found = []
        for path in sorted((self.outputs / "checkpoint" / "plans").glob(f"*/{FILE}")):
            whole = path.read_text().split("\n")[:-1]
            found.append([f"{e['stage']} {e['unit']}" for e in map(json.loads, whole) if "unit" in e])
        return found

    def held(self, jobs: int) -> bool:
        """Whether so many jobs have begun, and have done all they may."""
        return [len(units) for units in self.units()] == [HELD_UNITS] * jobs

    def once(self, each: int) -> bool:
        """Whether every plan has so many units, and none twice."""
        return all(len(units) == each and set(Counter(units).values()) == {1} for units in self.units())

    def folder(self) -> Path:
        """Of the latest sweep."""
        return sorted((self.outputs / "main" / "sweeps").iterdir())[-1]

    def rows(self) -> list[dict[str, str]]:
        """The latest sweep's table."""
        return rows(self.folder())


def rows(folder: Path) -> list[dict[str, str]]:
    """Of a sweep's table."""
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


def journalled(folder: Path) -> Counter[str]:
    """How often each unit of each plan is in a journal below a folder."""
    return Counter(
        f"{path.parent.name} {entry['unit']}"
        for path in folder.rglob(FILE)
        for entry in map(json.loads, path.read_text().splitlines())
        if "unit" in entry
    )


def tracked(uri: str, experiment: str) -> tuple[Any, list[Any]]:
    """MLflow's one parent of an experiment, and its children in the order they began."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    runs = client.search_runs([known.experiment_id])
    (parent,) = [found for found in runs if "selfspec.sweep_id" in found.data.tags]
    children = [found for found in runs if found.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 1 + len(children), "nothing stands beside the sweep"
    return parent, sorted(children, key=lambda found: found.info.start_time)


def until(what: Callable[[], object], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Waits until it is so, or the process has ended."""
    while not what():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
