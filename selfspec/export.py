"""``speculation_profile.json``: what a bench found and recommends, with flags of ``vllm serve`` and of our gateway."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

from selfspec import costs
from selfspec.axes import CONTROLLER
from selfspec.engine.vllm import args
from selfspec.errors import ConfigError
from selfspec.fitting import head_path
from selfspec.metrics import Unit
from selfspec.plan import Plan
from selfspec.sweep.compose import quoted

FILE = "speculation_profile.json"
Schedule = Sequence[tuple[int, int]]
"""From how many requests on, which K."""


def profile(plan: Plan, units: Sequence[Unit]) -> str:
    """``speculation_profile.json``, whose fields ``docs/profile.md`` tells; ``units`` of one kind of hardware."""
    found = costs.profile(units)
    about = {"plan_id": plan.id, "label": plan.label, "settings": plan.settings()}
    told = about | {"provenance": units[0]["provenance"]} | found | {"flags": flags(plan, found["schedule"])}
    return json.dumps(told, indent=1)


def flags(plan: Plan, recommended: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Command lines, and why there is none where a server cannot do it.

    Args:
        recommended: the schedule of a :func:`profile <selfspec.costs.profile>`.
    """
    schedule = merged(recommended)
    if not plan.speculative or not schedule:
        return {"gateway": None, "vllm": None, "why_not": "nothing was drafted and timed"}
    found: dict[str, str | None] = {"gateway": _gateway(plan, schedule)}
    try:
        return found | {"vllm": _vllm(plan, schedule)}
    except (ConfigError, OSError) as error:
        return found | {"vllm": None, "why_not": str(error)}


def merged(recommended: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The schedule's entries, less those that say what the one before says; the first is for the smallest batches."""
    found: list[tuple[int, int]] = []
    for one in recommended:
        if not found or found[-1][1] != one["K"]:
            found.append((one["batch"] if found else 1, one["K"]))
    return found


def _gateway(plan: Plan, schedule: Schedule) -> str:
    scheduled = _scheduled(plan, schedule)
    if scheduled is None:
        asked = ["draft=none"]
    else:
        head = {"head": str(head_path(plan))} if plan.draft.fitted else {}
        asked = [
            *_overrides("draft", asdict(plan.draft) | head),
            *_overrides("gate", asdict(plan.gate)),
            *_overrides("controller", asdict(scheduled)),
            *_overrides("policy", asdict(plan.policy)),
        ]
    model = {f"model.{key}": value for key, value in asdict(plan.model).items() if value is not None}
    asked += [f"{key}={_value(value)}" for key, value in model.items()]
    return shlex.join(["python", "-m", "selfspec.serve", *asked])


def _overrides(group: str, values: Mapping[str, Any]) -> list[str]:
    """An option, and all its settings: what its file has may change."""
    return [f"{group}={values['name']}"] + [
        f"{group}.{key}={_value(value)}" for key, value in values.items() if key != "name" and value is not None
    ]


def _value(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        return quoted(value)
    return json.dumps(value)


def _scheduled(plan: Plan, schedule: Schedule) -> Any:
    """A controller that does as is recommended; ``None``: nothing is to be drafted at all."""
    if not any(k for _, k in schedule):
        return None
    rest = [[batch, k] for batch, k in schedule[1:]]
    first = schedule[0][1]
    most = max(k for _, k in schedule)
    if first != most:  # the first entry is for one request
        rest = [[1, first], *rest]
    return CONTROLLER.new("schedule", K=most, by_batch=rest) if rest else CONTROLLER.new("fixed", K=most)


def _vllm(plan: Plan, schedule: Schedule) -> str:
    """``vllm serve``; a draft of vLLM's own gets the schedule in vLLM's way, an early exit in ours.

    Raises:
        ConfigError: vLLM has no such draft, or cannot draft so.
        OSError: the draft's own model is not here to be looked at.
    """
    source = plan.model.source
    model = source.partition(":")[2] if source.startswith(("hf:", "file:")) else "MODEL"
    command = ["vllm", "serve", model]
    scheduled = _scheduled(plan, schedule)
    if scheduled is None:
        return shlex.join(command)
    if not plan.draft.inside_vllm and "vllm" not in plan.draft.engines:
        raise ConfigError(f"vLLM has no draft={plan.draft.name}")
    if not plan.draft.inside_vllm and plan.gate.stops:
        raise ConfigError(f"gate={plan.gate.name}: vLLM's draft={plan.draft.name} asks no gate")
    own = str(plan.draft.get("source") or "")
    if own.startswith("pypi:"):
        raise ConfigError(f"draft.source={own}: vLLM reads folders")
    head = head_path(plan) if plan.draft.fitted else None
    asked = args.speculation(replace(plan, controller=scheduled), Path(own.partition(":")[2]) if own else None, head)
    asked.pop("per_request_spec_decode_metrics")
    if not plan.draft.inside_vllm and len(schedule) > 1:
        ends = [batch - 1 for batch, _ in schedule[1:]]
        entries = [[batch, end, k] for (batch, k), end in zip(schedule, [*ends, max(schedule[-1][0], 1)], strict=True)]
        asked["speculative_config"]["num_speculative_tokens_per_batch_size"] = entries
    return shlex.join([*command, *args.flags(asked)])
