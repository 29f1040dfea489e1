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

from selfspec.checkpoint import FILE

REPO = Path(__file__).parents[1]
_SITE = """
import os, signal, sys, time
hold = os.environ["TEST_HOLD"]
if "hydra.mode=RUN" in sys.orig_argv or "submitit.core._submit" in sys.orig_argv:
    fsync = os.fsync
    def slow(fd):
        if os.path.exists(hold):
            time.sleep(0.5)
        fsync(fd)
    os.fsync = slow
if os.environ.get("TEST_DIES") in sys.orig_argv:
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""A disk that is slow while a file is there: a job then takes half a second for each unit. And a job that dies."""


class Sweep:
    """``python -m selfspec.run -m ...`` as a process.

    Attributes:
        hold: while it exists, jobs make hardly any progress.
    """

    def __init__(self, folder: Path, *argv: str, dies: str = "") -> None:
        self.hold, self.outputs = folder / "hold", folder / "outputs"
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(_SITE)
        self.environment = os.environ | {"PYTHONPATH": str(site), "TEST_HOLD": str(self.hold), "TEST_DIES": dies}
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

    def once(self, each: int) -> bool:
        """Whether every plan has so many units, and none twice."""
        return all(len(units) == each and set(Counter(units).values()) == {1} for units in self.units())

    def folder(self) -> Path:
        """Of the latest sweep."""
        return sorted((self.outputs / "main" / "sweeps").iterdir())[-1]

    def rows(self) -> list[dict[str, str]]:
        """The latest sweep's table."""
        return list(csv.DictReader((self.folder() / "summary.csv").read_text().splitlines()))


def until(what: Callable[[], object], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Waits until it is so, or the process has ended."""
    while not what():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
