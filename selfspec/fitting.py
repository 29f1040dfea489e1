"""What is fitted: made once, and shared by all plans that ask for the same.

The model answers the fit prompts greedily, batch by batch (each a unit of a journal of its own, shared by
heads of every exit layer); where the plan leaves the exit layer open, what is best here is chosen by those answers;
the head is then fitted on them. Who comes second waits for the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from selfspec import checkpoint, heads
from selfspec.checkpoint import Journal
from selfspec.config import Resume
from selfspec.data import workload
from selfspec.engine.base import Chooses, Engine, Fits, LazyEngine
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.provenance import fingerprint, versions
from selfspec.types import Request

MAX_PROMPT_TOKENS = 256
BATCH = 64
"""Prompts answered together: compute-bound on a CPU, and a batch's loss to a kill is small."""


def head_path(plan: Plan) -> Path:
    """Where the plan's head is on this disk once it is :func:`ready`."""
    if (given := plan.draft.get("head")) is not None:
        return Path(given)
    return _store(plan).path(_head(plan))


def wanted(plan: Plan) -> dict[str, Any]:
    """The facts that the plan's head must have."""
    return {"model": plan.model_id, **plan.draft.facts()}


def fitted(plan: Plan) -> bool:
    """Whether the plan's head is there, in the store or where the user says."""
    if (given := plan.draft.get("head")) is not None:
        return Path(given).exists()
    return _store(plan).size(_head(plan)) is not None


def may_fit(plan: Plan) -> bool:
    """Whether a head that is missing is to be fitted."""
    return plan.draft.get("head") is None and "fit" in plan.stages


def check_head(plan: Plan) -> dict[str, Any]:
    """The facts of the plan's head, which must be there and fit.

    Raises:
        ConfigError: it has not been fitted.
        HeadError: it is corrupt or was fitted for something else.
    """
    if plan.draft.get("head") is not None:
        return heads.check(head_path(plan), wanted(plan))
    store, name = _store(plan), _head(plan)
    size = store.size(name)
    if size is None:
        raise ConfigError(
            f"stages={list(plan.stages)}: draft={plan.draft.name} needs a head and none is fitted yet; "
            "add fit, or name one with draft.head"
        )
    where = store.where(name)
    start = store.read(name, heads.START) if size else None  # of nothing, no range can be asked for
    return heads.fits(where, heads.read(where, start or b"", size), wanted(plan))


def ready(engine: LazyEngine, plan: Plan) -> dict[str, Any]:
    """The facts of the plan's head, which is there from now on: fitted if it is missing and may be.

    Raises:
        ConfigError, HeadError: as :func:`check_head`.
    """
    if may_fit(plan) and not fitted(plan):
        pairs = answered(engine, plan)
        facts = {**wanted(plan), "format": 1, "versions": versions()}
        _store(plan).make(_head(plan), lambda path: _fits(engine(), plan).fit(pairs, path, facts))
    found = check_head(plan)
    if plan.draft.get("head") is None:
        _store(plan).fetch(_head(plan))
    return found


def choice(engine: LazyEngine, plan: Plan) -> dict[str, Any]:
    """What is best here of what an open plan leaves to be chosen.

    It is found out once for every kind of machine: another that shares the checkpoint has other prices.
    """
    here = fingerprint(versions())
    with _shared(plan, plan.choice_id) as journal:
        if (known := journal.get("choice", here)) is None:
            path = None
            if plan.draft.fitted:
                ready(engine, plan)
                path = head_path(plan)
            made = engine()
            assert isinstance(made, Chooses), "checked by the plan"
            found = made.choose(answered(engine, plan), path)
            known = journal.append("choice", here, found, fingerprint(made.describe()))
    return dict(known.data)


def settled(plan: Plan, made: Mapping[str, Any]) -> Plan:
    """A plan with a choice made."""
    return plan.settled(made["exit_layer"], made["K"])


def install(engine: Engine, plan: Plan) -> None:
    """Has an engine draft as a plan says: by a choice where it is open, and through its head, made :func:`ready`."""
    if plan.open:
        plan = settled(plan, choice(lambda: engine, plan))
    if isinstance(engine, Chooses):
        engine.settle(plan)
    if plan.draft.fitted:
        ready(lambda: engine, plan)
        _fits(engine, plan).use_head(head_path(plan))


def _fits(engine: Engine, plan: Plan) -> Fits:
    assert isinstance(engine, Fits), "checked by the plan: others cannot run drafts with a head"
    if isinstance(engine, Chooses):
        engine.settle(plan)
    return engine


def answered(engine: LazyEngine, plan: Plan) -> list[tuple[Sequence[int], Sequence[int]]]:
    """The fit prompts and the model's answers, those of earlier runs from their journal."""
    with _shared(plan, plan.answers_id) as journal:
        batches = [f"batch-{i:04d}" for i in range(-(-plan.scale.fit_prompts // BATCH))]
        missing = [i for i, unit in enumerate(batches) if journal.get("answers", unit) is None]
        if missing:
            made = engine()
            prompts = _prompts(made, plan)
            with progress("answers", len(batches), len(batches) - len(missing)) as advance:
                for i in missing:
                    batch = prompts[i * BATCH : (i + 1) * BATCH]
                    requests = [Request(tokens, plan.scale.fit_new_tokens) for tokens in batch]
                    answers = [answer.tokens for answer in made.generate(requests, plain=True, max_batch=BATCH)]
                    data = {"prompts": batch, "answers": answers}
                    journal.append("answers", batches[i], data, fingerprint(made.describe()))
                    advance()
        records = [journal.get("answers", unit) for unit in batches]
        with journal.reading():
            found = [pair for r in records if r for pair in zip(r.data["prompts"], r.data["answers"], strict=True)]
            return [([*map(int, prompt)], [*map(int, answer)]) for prompt, answer in found]


def _shared(plan: Plan, name: str) -> Journal:
    """A journal beside the plans' own."""
    place, settings = checkpoint.fit_place(plan.checkpoint.dir, name), {"model": plan.model.source, "seed": plan.seed}
    return Journal.open(place, name, settings, Resume.auto, lease_s=plan.checkpoint.lease_s)


def _store(plan: Plan) -> checkpoint.Store:
    return checkpoint.at(plan.checkpoint.dir, plan.checkpoint.lease_s)


def _head(plan: Plan) -> str:
    return f"heads/{plan.head_id}.safetensors"


def _prompts(engine: Engine, plan: Plan) -> list[tuple[int, ...]]:
    """Whole prompts, however short the bench cuts its own: one head serves all lengths."""
    source = replace(plan.workload, prompt_tokens=None, max_prompt_tokens=MAX_PROMPT_TOKENS)
    encode = partial(engine.tokenizer.encode, chat=source.chat)
    chosen = workload.select(source, "fit", plan.scale.fit_prompts, plan.seed, encode)
    return sorted((prompt.tokens for prompt in chosen), key=len)  # a batch is as wide as its longest prompt
