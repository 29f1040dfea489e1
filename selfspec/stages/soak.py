"""The soak stage: many callers at a served model for minutes, and whether it held.

The server and Locust run in processes of their own. A unit is one interval of the load; a soak that was
interrupted starts the server again and goes on with the intervals that are missing, after a warm-up that counts
for nothing. Some *sentinel* prompts are answered alone before the load and after it, and must be answered alike.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from selfspec import credentials, sense
from selfspec.checkpoint import Journal, Record
from selfspec.data import workload
from selfspec.engine import factory
from selfspec.engine.base import LazyEngine, Opens
from selfspec.errors import ConfigError, StageError
from selfspec.files import own_folder, storing, write_atomic
from selfspec.fitting import ready
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.provenance import collect
from selfspec.soak import chart, judge
from selfspec.soak.config import SoakServer
from selfspec.soak.load import TABLES, Load, calling
from selfspec.soak.server import KEY, Server, secret, serving
from selfspec.stages.base import Stage, Unit, Units
from selfspec.stages.bench import compared, poolable, request
from selfspec.types import Completion, Measurements, Prompt, Request

_READINGS = 20
"""Of the server's memory in an interval."""
_LIMITS = (
    *(("users", "max_concurrent_requests"), ("users", "max_connections_per_client"), ("users", "max_connections")),
    ("new_tokens", "max_tokens"),
)
"""Of callers, and the gateway's."""


class Soak(Stage):
    """See the module's docstring."""

    name = "soak"

    def check(self) -> None:
        """Refuses what cannot be soaked."""
        plan, soak = self.plan, self.plan.soak
        factory.require(plan, Opens, "stages=soak serves")
        if soak.server is not SoakServer.vllm and soak.arguments:
            raise ConfigError(f"soak.arguments={soak.arguments}: of soak.server=vllm; the gateway is given the job's")
        for argument in soak.arguments:
            if argument.startswith("-") and credentials.named(name := argument.partition("=")[0]):
                raise ConfigError(f"soak.arguments: {name} would be kept with the results; keys are given as {KEY}")
        for asked, limit in _LIMITS:
            most, wanted = getattr(plan.serve, limit), getattr(soak, asked)
            if wanted > most and soak.server is SoakServer.selfspec:
                raise ConfigError(f"soak.{asked}={wanted}: serve.{limit}={most} would refuse it")
        if soak.server is SoakServer.vllm:
            alone = plan.draft.name == "none" and plan.engine.name == "torch"
            if plan.engine.name != "vllm" and not alone:
                raise ConfigError("soak.server=vllm: use engine=vllm; or engine=torch draft=none, the model alone")

    def installed(self) -> None:
        """Refuses packages that are not installed."""
        if find_spec("locust") is None:
            raise ConfigError("stages=soak: needs Locust; pip install 'selfspec[serve]'")
        if self.plan.soak.server is SoakServer.vllm and find_spec("vllm") is None:
            raise ConfigError("soak.server=vllm: vLLM is not installed here; pip install 'selfspec[vllm]'")

    def units(self, engine: LazyEngine, journal: Journal) -> Units:
        """Puts the server under load for every interval that is missing, from sentinels to sentinels.

        Raises:
            StageError: the server or Locust did not start, or died.
        """
        plan = self.plan
        if not self.missing(["end"], journal):
            return
        if plan.draft.fitted:
            ready(engine, plan)
        local, folder = engine(), journal.folder / "soak"
        with storing(folder):
            own_folder(folder)
        encode = partial(local.tokenizer.encode, chat=plan.workload.chat)
        prompts = workload.select(plan.workload, "bench", plan.soak.prompts, plan.seed, encode)
        sentinels = prompts[: plan.soak.sentinels]
        provenance = collect({**local.describe(), "server": plan.soak.server.name})
        on = str(provenance["fingerprint"])
        with (
            serving(plan, folder / "server.log") as server,
            closing(factory.served(server.url, secret(plan), local.tokenizer)) as caller,
        ):
            if self.missing(["begin"], journal):
                yield Unit("begin", {"answers": _answers(caller.answer, plan, sentinels)}, on)
            yield from self._load(server, journal, prompts, provenance)
            after = _answers(caller.answer, plan, sentinels)
        before = journal.get(self.name, "begin")
        assert before is not None, "yielded above"
        with journal.reading():
            pairs = zip(sentinels, before.data["answers"], after, strict=True)
            verdicts = [compared(local.ties, plan, sentinel, one, other) for sentinel, one, other in pairs]
        yield Unit("end", {"answers": after, "verdicts": verdicts}, on)

    def _load(
        self, server: Server, journal: Journal, prompts: Sequence[Prompt], provenance: Mapping[str, object]
    ) -> Units:
        """The missing intervals, one after the other, under one Locust."""
        soak = self.plan.soak
        missing = self.missing(map(_name, range(soak.intervals)), journal)
        if not missing:
            return
        with journal.reading():
            life = 1 + max((record.data["life"] for record in _intervals(journal)), default=0)
        with (
            progress(self.name, soak.intervals, soak.intervals - len(missing)) as advance,
            calling(self.plan, server.url, prompts, journal.folder / "soak") as load,
        ):
            end = time.time() + soak.warmup
            _watch(server, load, end, soak.interval)
            load.take(end)
            for unit in missing:
                end += soak.interval
                rss = _watch(server, load, end, soak.interval)
                data = {**load.take(end), "life": life, "seconds": soak.interval, "rss": rss}
                yield Unit.measured(unit, data, provenance)
                advance()
            yield Unit(f"locust-{life}", load.finish(), str(provenance["fingerprint"]))

    def measurements(self, journal: Journal) -> Measurements:
        """What the callers saw, what became of the server's memory, and whether sentinels were answered alike."""
        intervals, verdicts = _intervals(journal), _verdicts(journal)
        found = judge.summarise([r.data for r in intervals], [r.data for r in poolable(intervals)], self.plan.seed)
        return found | {
            "users": self.plan.soak.users,
            "sentinels": len(verdicts),
            "sentinels_differing": verdicts.count("differs"),
            "sentinels_tied": verdicts.count("tie"),
        }

    def failures(self, journal: Journal) -> list[str]:
        """Whatever was measured and is not allowed."""
        found = self.measurements(journal)
        reasons = judge.failures(found, judge.errors_by_kind([r.data for r in _intervals(journal)]), self.plan.soak)
        if self.plan.exact and found["sentinels_differing"]:
            reasons.append(
                f"{found['sentinels_differing']:g} of {found['sentinels']:g} sentinel prompts "
                "were answered otherwise after the load than before it"
            )
        answers = [answer for unit in ("begin", "end") for answer in _sentinels(journal, unit).get("answers", ())]
        if found["sentinels"] > 1 and (token := sense.one_token(answers)) is not None:
            reasons.append(f"every sentinel's answer is token {token} over and over, whatever is asked")
        return [f"soak: {reason}" for reason in reasons]

    def notes(self, journal: Journal) -> list[str]:
        """What was seen, in a few lines; and what the reader must know of it."""
        intervals, soak = _intervals(journal), self.plan.soak
        said = [
            f"{soak.users} users for {soak.seconds:g} s, answers of up to {soak.new_tokens} tokens: "
            + judge.in_words(self.measurements(journal))
        ]
        lives = len({record.data["life"] for record in intervals})
        if lives > 1:
            said.append(f"the server was started {lives} times; Locust's own tables are of the last")
        left_out = len(intervals) - len(poolable(intervals))
        if left_out:
            said.append(f"{left_out} of {len(intervals)} intervals ran on other hardware; their timings are left out")
        return [f"soak: {line}" for line in said]

    def facts(self, journal: Journal) -> dict[str, Any]:
        """Where it ran."""
        return {"provenance": poolable(_intervals(journal))[0].data["provenance"]}

    def per_unit(self, data: dict[str, Any]) -> Measurements:
        """An interval's; of the sentinels nothing."""
        if "requests" not in data:
            return {}
        return {f"interval/{name}": value for name, value in judge.per_interval(data).items()}

    def write(self, folder: Path, journal: Journal) -> None:
        """Locust's tables, the intervals as a table, and a chart over time."""
        plan = self.plan
        tables = [record.data for record in journal.records(self.name) if record.unit.startswith("locust-")]
        for name in TABLES if tables else ():  # whatever else a journal names becomes no file
            if (text := tables[-1].get(name)) is not None:
                write_atomic(folder / f"locust_{name}.csv", str(text))
        intervals = [record.data for record in _intervals(journal)]
        rows = [{"interval": i, "life": one["life"], **judge.per_interval(one)} for i, one in enumerate(intervals)]
        write_atomic(folder / "soak.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        title = f"{plan.label}: {plan.soak.users} users, {plan.soak.new_tokens} tokens, by {plan.soak.server.name}"
        write_atomic(folder / "soak.png", chart.draw(intervals, title))


def _watch(server: Server, load: Load, until: float, interval: float) -> list[tuple[float, float]]:
    """Waits, and reads the server's memory: seconds since it was started, and MiB.

    Raises:
        StageError: the server or Locust is no more.
    """
    readings = []
    while (left := until - time.time()) > 0:
        if not server.alive:
            raise StageError(f"the server died under load: {server.why_it_died()}")
        if not load.alive:
            raise StageError(f"Locust ended early: {load.why_it_died()}")
        readings.append((round(time.monotonic() - server.started, 2), round(server.rss_mb(), 2)))
        time.sleep(min(left, interval / _READINGS))
    return readings


def _answers(ask: Callable[[Request], Completion], plan: Plan, sentinels: Sequence[Prompt]) -> list[list[int]]:
    """The tokens of each sentinel's answer, one by one on a server that has nothing else to do."""
    asked = [replace(request(plan, prompt), max_new_tokens=plan.soak.new_tokens) for prompt in sentinels]
    return [list(ask(one).tokens) for one in asked]


def _intervals(journal: Journal) -> list[Record]:
    return [record for record in journal.records("soak") if record.unit.startswith("interval-")]


def _verdicts(journal: Journal) -> list[str]:
    return [verdict["verdict"] for verdict in _sentinels(journal, "end").get("verdicts", ())]


def _sentinels(journal: Journal, unit: str) -> Mapping[str, Any]:
    """What is known of them before the load (``begin``) or after it (``end``); nothing before that was run."""
    record = journal.get("soak", unit)
    return record.data if record else {}


def _name(number: int) -> str:
    return f"interval-{number:04d}"
