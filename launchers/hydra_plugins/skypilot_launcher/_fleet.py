"""The managed jobs of a sweep: which are left alone, attached to or launched; and watching them until they are over."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from hydra_plugins.skypilot_launcher._task import PREFIX
from hydra_plugins.skypilot_launcher.config import SkyPilotConf
from selfspec import checkpoint
from selfspec.errors import LaunchError, SelfspecError
from selfspec.plan import Plan
from selfspec.report import results

BATCH = 8
"""Jobs launched at a time, before the table is shown again; each takes some ten seconds, all at once."""
RAN = ("SUCCEEDED", "FAILED", "FAILED_SETUP")
"""How a job can end that has a log; else SkyPilot's reason says it all."""
LAUNCHING = "launching"
PATIENCE = 10
"""How often in a row SkyPilot may fail to say how jobs are, or not list one."""


class SkyPilot(Protocol):
    """What answers requests, as ``_sky.py`` describes them."""

    def ask(self, do: str, **request: Any) -> Any:
        """What comes of a request; raises ``LaunchError`` or ``ConfigError``."""


@dataclass
class Job:
    """One plan, and how it is.

    Attributes:
        numbers: of the sweep's jobs that come to this plan.
        folders: theirs, where results go.
        state: SkyPilot's word, or ours for what is not, or no longer, its affair.
        missed: at how many looks in a row SkyPilot did not list it.
    """

    plan: Plan
    task: dict[str, Any]
    numbers: list[int]
    folders: list[Path]
    state: str = "waiting"
    id: int | None = None
    where: str = "-"
    recoveries: int = 0
    note: str = ""
    over: bool = False
    missed: int = 0
    result: dict[str, Any] | None = None
    log: list[str] = field(default_factory=list)

    @property
    def under_way(self) -> bool:
        """Whether SkyPilot has it, or is about to."""
        return not self.over and (self.id is not None or self.state == LAUNCHING)

    @property
    def failed(self) -> bool:
        """Whether it is over and did not bring what was asked for."""
        return self.over and (self.result is None or self.result["status"] != "finished")


class Fleet:
    """All jobs of a sweep; ``show`` is called with them whenever something may have changed."""

    def __init__(
        self, sky: SkyPilot, settings: SkyPilotConf, jobs: Sequence[Job], show: Callable[[Sequence[Job]], None]
    ) -> None:
        self._sky = sky
        self._settings = settings
        self._jobs = jobs
        self._show = show
        self._failures = 0

    def start(self, secrets: Sequence[str]) -> None:
        """Leaves finished jobs alone, attaches to those under way, and launches the others, as many as may run.

        Raises:
            LaunchError: SkyPilot does not say which jobs there are.
            ConfigError: it refuses what was asked for.
        """
        for job, result in zip(self._jobs, checkpoint.map_concurrent(_result, self._jobs), strict=True):
            self._take(job, result)
        if any(not job.over for job in self._jobs):
            self._attach()
        self._show(self._jobs)
        self._launch(secrets)

    def watch(self, secrets: Sequence[str]) -> None:
        """Until all are over: launches what there is room for, and follows what was launched.

        Raises:
            LaunchError: SkyPilot has not said for a while how jobs are; they go on.
        """
        while any(not job.over for job in self._jobs):
            time.sleep(self._settings.poll_s)
            self._look()
            self._launch(secrets)

    def _attach(self) -> None:
        latest: dict[str, dict[str, Any]] = {}
        # By id: earlier launches of a plan have the same name, and the latest one counts.
        for known in sorted(self._sky.ask("queue", prefix=PREFIX), key=lambda known: known["id"]):
            latest[known["name"]] = known
        for job in self._jobs:
            known = latest.get(job.task["name"])
            if known is None or job.over:
                continue
            if known["over"]:
                job.note = f"launched again: job {known['id']} {known['state']}"
            else:
                job.note = "attached"
                self._update(job, known)

    def _launch(self, secrets: Sequence[str]) -> None:
        most = self._settings.parallelism or len(self._jobs)
        while True:
            under_way = sum(job.id is not None and not job.over for job in self._jobs)
            waiting = [job for job in self._jobs if job.id is None and not job.over]
            batch = waiting[: max(0, min(BATCH, most - under_way))]
            if not batch:
                return
            for job in batch:
                # Before the request: an interrupt while it is under way must still name what may be running.
                job.state = LAUNCHING
            self._show(self._jobs)
            tasks = [job.task for job in batch]
            launched = self._sky.ask("launch", tasks=tasks, secrets=list(secrets), pool=self._settings.pool)
            for job, done in zip(batch, launched, strict=True):
                job.id, job.state = done.get("id"), "launched"
                if job.id is None:
                    self._fail(job, "not launched", done["failed"])
            self._show(self._jobs)

    def _look(self) -> None:
        ids = {job.id: job for job in self._jobs if job.id is not None and not job.over}
        if not ids:
            return
        try:
            found = self._sky.ask("queue", ids=list(ids))
        except LaunchError as error:
            self._failures += 1
            if self._failures == PATIENCE:
                raise LaunchError(f"{error}; jobs go on, and the same command comes back to them") from error
            return
        self._failures = 0
        listed = {known["id"]: known for known in found}
        for id, job in ids.items():
            if id in listed:
                job.missed = 0
                self._update(job, listed[id])
                if listed[id]["over"]:
                    self._settle(job, listed[id])
                continue
            job.missed += 1
            if job.missed == PATIENCE:
                self._settle(job, {"state": "GONE", "reason": "SkyPilot knows it no more"})
        self._show(self._jobs)

    def _update(self, job: Job, known: dict[str, Any]) -> None:
        job.id, job.state, job.where, job.recoveries = (known[key] for key in ("id", "state", "where", "recoveries"))

    def _take(self, job: Job, result: dict[str, Any] | None) -> None:
        """Takes the result that a job has left in the store, if it has."""
        if result is None:
            return
        job.result, job.over = result, True
        job.state = job.state if job.id is not None else "done before"
        if job.failed:
            job.note = str(result["error"])
        for folder in job.folders:
            results.write_result(folder, cast(results.Result, result))

    def _settle(self, job: Job, known: dict[str, Any]) -> None:
        """A job is over: its result, or why there is none. One that failed hides no other."""
        state, reason = known["state"], known["reason"]
        try:
            # The store before SkyPilot's word: a job may leave its result and then lose its machine.
            self._take(job, _result(job))
        except SelfspecError as error:
            reason = str(error)
        if job.over:
            return
        if state == "SUCCEEDED":
            reason = reason or f"left no result in {job.plan.checkpoint.dir}"
        if state in RAN and self._settings.log_lines:
            try:
                job.log = self._sky.ask("logs", id=job.id, lines=self._settings.log_lines)
            except LaunchError as error:
                job.log = [str(error)]
        self._fail(job, state, reason)

    def _fail(self, job: Job, state: str, reason: str) -> None:
        job.state, job.over, job.note = state, True, reason
        words = ": ".join(filter(None, (f"SkyPilot job {job.id or ''} {state}".replace("  ", " "), reason)))
        for folder in job.folders:
            results.failed(job.plan, folder, LaunchError(words), {})


def _result(job: Job) -> dict[str, Any] | None:
    return checkpoint.finished(job.plan.checkpoint.dir, job.plan.id)
