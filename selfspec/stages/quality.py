"""The quality stage: what a configuration does to perplexity, to lm-eval's tasks, and what its gates know.

Units, each journalled when it is done: a chunk of conversations (their own answers scored, and the texts generated
and scored, plainly and as configured); a chunk of those again, for what every exit layer would have drafted and
what gates would have said; and an lm-eval task, plainly or as configured.
"""

import importlib.util
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from selfspec.checkpoint import Journal, Record
from selfspec.data import workload
from selfspec.engine import factory
from selfspec.engine.base import LazyEngine, Probes, Scores
from selfspec.errors import ConfigError, StageError
from selfspec.files import write_atomic
from selfspec.fitting import install
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.provenance import collect
from selfspec.quality import gates, perplexity, plot, tasks
from selfspec.quality.perplexity import Nats
from selfspec.stages.base import Stage, Unit, Units
from selfspec.stages.bench import request
from selfspec.types import Measurements, Prompt

EXACT_WITHIN = 1e-3
"""Of its perplexity: how far float32 rounding may take an exact configuration from plain decoding."""
_SCORED = ("plain_reference", "reference", "plain_text", "text")


class Quality(Stage):
    """See the module's docstring."""

    name = "quality"

    def check(self) -> None:
        """Refuses an engine that scores no text, or shows no states."""
        factory.require(self.plan, Scores, "stages=[quality] needs one of")
        gate_prompts, engine = self.plan.quality.gate_prompts, self.plan.engine.name
        if gate_prompts and Probes not in self.plan.engine.can:
            silent = f"engine={engine} shows no states for gates to look at; use quality.gate_prompts=0"
            raise ConfigError(f"quality.gate_prompts={gate_prompts}: {silent}")

    def installed(self) -> None:
        """Refuses packages that are not installed, and a task that lm-eval does not have."""
        quality = self.plan.quality
        tasks.check(quality)
        if quality.gate_prompts and importlib.util.find_spec("sklearn") is None:
            wanted = f"needs scikit-learn; {tasks.EXTRA}, or use quality.gate_prompts=0"
            raise ConfigError(f"quality.gate_prompts={quality.gate_prompts}: {wanted}")

    def fetch(self) -> None:
        """Has the tasks' documents on this disk."""
        tasks.fetch(self.plan.quality)

    def units(self, engine: LazyEngine, journal: Journal) -> Units:
        """Texts first: the gates' units are of texts that are in the journal."""
        plan, quality = self.plan, self.plan.quality
        wanted = [*_named("texts", quality.prompts, plan), *_named("gates", quality.gate_prompts, plan)]
        wanted += [f"tasks/{task}/{way}" for task in quality.tasks for way in _ways(plan)]
        missing = self.missing(wanted, journal)
        if not missing:
            return
        made = engine()
        assert isinstance(made, Scores), "checked above"
        install(made, plan)  # a job may be resumed after its head was deleted
        prompts: list[Prompt] = []
        if any(unit.startswith("texts") for unit in missing):
            encode = partial(made.tokenizer.encode, chat=plan.workload.chat)
            prompts = workload.select(plan.workload, "quality", quality.prompts, plan.seed, encode, answered=True)
        provenance = collect(made.describe())
        with progress(self.name, len(wanted), len(wanted) - len(missing)) as advance:
            for unit in missing:
                kind, *rest = unit.split("/")
                if kind == "tasks":
                    data = self._task(made, *rest)
                elif kind == "texts":
                    data = self._texts(made, prompts[_range(rest[0])])
                else:
                    assert isinstance(made, Probes), "checked above"
                    with journal.reading():
                        data = self._gates(made, _data(journal, "texts"), _range(rest[0]))
                yield Unit.measured(unit, data, provenance)
                advance()

    def measurements(self, journal: Journal) -> Measurements:
        """Perplexities, what the gates know, and the tasks' metrics."""
        found: Measurements = {}
        rows = perplexity.conversations(_data(journal, "texts"))
        if rows:
            found |= perplexity.summarise(rows, self.plan.seed)
        signals = _data(journal, "gates")
        if signals:
            found |= gates.summarise(signals, gates.curves(signals))
        for unit in _data(journal, "tasks"):
            named = unit["metrics"] | {"documents": unit["documents"]}
            found |= {f"tasks/{unit['task']}/{unit['way']}/{name}": value for name, value in named.items()}
        return found

    def per_unit(self, data: dict[str, Any]) -> Measurements:
        """A chunk's perplexities."""
        if "conversations" not in data:
            return {}
        found = perplexity.summarise(perplexity.conversations([data]), seed=0)
        shown = ("reference_ppl", "reference_delta_ppl", "text_ppl", "text_delta_ppl", "equal_tokens")
        return {f"quality/unit/{name}": found[name] for name in shown}

    def facts(self, journal: Journal) -> dict[str, Any]:
        """Where it ran."""
        records = journal.records(self.name)
        return {"provenance": records[0].data["provenance"]} if records else {}

    def notes(self, journal: Journal) -> list[str]:
        """What the reader of the perplexities must know."""
        policy = self.plan.policy
        if policy.relaxed and policy.verify and self.plan.quality.prompts:
            return ["the reference answers' perplexity cannot show what this policy lets through; its own text's does"]
        return []

    def failures(self, journal: Journal) -> list[str]:
        """An exact configuration that decodes with another distribution than plain decoding's, beyond rounding."""
        units = [record.data for record in _records(journal, "texts")]
        in_float32 = units and all(unit["provenance"]["extra"].get("dtype") == "float32" for unit in units)
        if not in_float32 or not self.plan.exact:
            return []
        found = perplexity.summarise(perplexity.conversations(units), self.plan.seed)
        delta, plain = found["reference_delta_ppl"], found["plain_reference_ppl"]
        if abs(delta) <= EXACT_WITHIN * plain:
            return []
        return [f"not exact: delta-PPL of the reference answers is {delta:+.4f} at {plain:.2f}, in float32"]

    def write(self, folder: Path, journal: Journal) -> None:
        """Per-conversation values, ROC curves and their picture, and lm-eval's results."""
        files: dict[str, str | bytes | None] = {}
        rows, signals = perplexity.conversations(_data(journal, "texts")), _data(journal, "gates")
        if rows:
            files["quality_conversations.csv"] = perplexity.table(rows)
        if signals:
            made = gates.curves(signals)
            files |= {
                "gate_roc.csv": gates.table(made),
                "gate_roc.png": plot.roc(made, self.plan.draft.get("exit_layer")),
            }
        if self.plan.quality.tasks:
            files["lm_eval.json"] = json.dumps(_data(journal, "tasks"), indent=1)
        for name, content in files.items():
            if content is not None:
                write_atomic(folder / name, content)

    def _texts(self, engine: Scores, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Conversations' own answers and generated texts, scored: plainly, and as configured.

        Raises:
            StageError: one has no perplexity.
        """
        requests = [request(self.plan, prompt) for prompt in prompts]
        plain = engine.generate(requests, plain=True)
        drafts = self.plan.draft.name != "none"
        configured = engine.generate(requests) if drafts else plain
        rows = []
        for prompt, one, other in zip(prompts, plain, configured, strict=True):
            answer = engine.tokenizer.encode_part(prompt.answer)[: self.plan.quality.answer_tokens]
            (reference,) = engine.score(prompt.tokens, [answer], plain=True)
            (decoded,) = engine.score(prompt.tokens, [answer]) if drafts else (reference,)
            texts = engine.score(prompt.tokens, [one.tokens, other.tokens], plain=True)
            scored = zip(
                ("plain_reference", "reference", "plain_text", "text"), (reference, decoded, *texts), strict=True
            )
            row = {name: Nats.of(score) for name, score in scored}
            for name, nats in row.items():
                if not nats.sensible:
                    side = f"prompt {prompt.id}: {name} of {nats.tokens} tokens has {nats.nats:g} nats"
                    raise StageError(f"what was measured makes no sense: {side}")
            rows.append({"prompt": prompt.id, **row, "plain_tokens": one.tokens, "tokens": other.tokens})
        return {"conversations": rows, "prompts": [prompt.tokens for prompt in prompts]}

    def _gates(self, engine: Probes, units: Sequence[dict[str, Any]], chosen: slice) -> dict[str, Any]:
        """What every exit would have drafted of the plain texts, exit by exit and one text after the other.

        Raises:
            StageError: a gate would have seen what is no number.
        """
        texts = [
            (prompt, row["plain_tokens"])
            for unit in units
            for prompt, row in zip(unit["prompts"], unit["conversations"], strict=True)
        ]
        exits: dict[tuple[int, str], dict[str, Any]] = {}
        for prompt, answer in texts[chosen]:
            if len(answer) < 2:  # nothing was drafted
                continue
            for one in engine.probe(prompt, answer, self.plan.quality.exits):
                into = exits.setdefault((one.layer, one.head), {"layer": one.layer, "head": one.head})
                for name in ("max_prob", "entropy", "var_entropy"):
                    if not all(map(math.isfinite, getattr(one, name))):
                        where = f"exit {one.layer}, {one.head}: {name} is not finite"
                        raise StageError(f"what was measured makes no sense: {where}")
                    into.setdefault(name, []).extend(float(f"{number:.6g}") for number in getattr(one, name))
                into.setdefault("accepted", []).extend(map(int, one.accepted))
        return {"exits": [*exits.values()]}

    def _task(self, engine: Scores, task: str, way: str) -> dict[str, Any]:
        return {"task": task, "way": way, **tasks.evaluate(engine, self.plan.quality, task, plain=way == "plain")}


def _ways(plan: Plan) -> tuple[str, ...]:
    return ("plain",) if plan.draft.name == "none" else ("plain", "configured")


def _named(kind: str, count: int, plan: Plan) -> list[str]:
    """Chunks of conversations, in their order, by the first one and the one after the last."""
    size = plan.quality.chunk
    return [f"{kind}/{at:05d}-{min(at + size, count):05d}" for at in range(0, count, size)]


def _range(name: str) -> slice:
    first, stop = name.split("-")
    return slice(int(first), int(stop))


def _records(journal: Journal, kind: str) -> list[Record]:
    """Of one kind, in their order."""
    found = [record for record in journal.records("quality") if record.unit.startswith(f"{kind}/")]
    return found if kind == "tasks" else sorted(found, key=lambda record: record.unit)


def _data(journal: Journal, kind: str) -> list[dict[str, Any]]:
    """What came of them, less where each ran."""
    data = [record.data for record in _records(journal, kind)]
    return [{key: value for key, value in one.items() if key != "provenance"} for one in data]
