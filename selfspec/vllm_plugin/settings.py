"""What early exit inside vLLM is told: one JSON object, under ``selfspec`` in vLLM's ``--speculative-config``.

    {"model": "selfspec.vllm_plugin.EarlyExit", "num_speculative_tokens": 4,
     "selfspec": {"exit_layer": 24, "head": "head.safetensors", "gate": {"name": "maxp", "threshold": 0.4}}}

``num_speculative_tokens`` is the most tokens a draft may have; gate and controller are those of ``conf/``.
"""

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfspec.axes import CONTROLLER, DRAFT, GATE, ControllerOptions, DraftOptions, GateOptions
from selfspec.errors import ConfigError, one_line
from selfspec.options import Axis, Option, check_bounds, within
from selfspec.plan import Plan

KEY = "selfspec"
PROPOSER = "selfspec.vllm_plugin.EarlyExit"


@dataclass
class Settings:
    """An early exit: after which layer, read out through what, and how long it drafts."""

    exit_layer: int = MISSING
    """Layers run before the exit."""
    head: str | None = None
    """A file that the fit stage made for this exit; ``None``: the model's own norm and head."""
    gate: GateOptions = MISSING
    controller: ControllerOptions = MISSING
    """``K: 0``: as many as ``num_speculative_tokens``."""
    seed: int = 0


def parse(asked: Any, most: Any, ranks: int = 1) -> Settings:
    """Typed settings from the JSON object.

    Args:
        most: ``num_speculative_tokens``, as it was given.
        ranks: ``tensor_parallel_size``.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if not isinstance(asked, dict):
        raise ConfigError(f"{KEY}={asked!r}: must be a JSON object such as {{'exit_layer': 12}}")
    if not isinstance(most, int) or most < 1:
        raise ConfigError(f"num_speculative_tokens={most!r}: must be a number >= 1, the most tokens of a draft")
    try:
        options = {axis.group: _chosen(axis, asked.get(axis.group)) for axis in (GATE, CONTROLLER)}
        merged = OmegaConf.merge(OmegaConf.structured(Settings(**options)), asked)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{KEY}.{missing[0]}: has no value; give one")
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{KEY}.{error.full_key or ''}: {one_line(error).split(' full_key:')[0]}") from error
    assert isinstance(settings, Settings)
    controller = settings.controller
    if controller.K == 0:
        controller.K = min(most, controller.max_k or most)
    if settings.exit_layer < 1:
        raise ConfigError(f"{KEY}.exit_layer={settings.exit_layer}: must be >= 1")
    _check_learning(settings.gate, controller, ranks)
    if not 0 < controller.max_k <= most:
        raise ConfigError(
            f"{KEY}.controller: asks for up to {controller.max_k}; must be from 1 to num_speculative_tokens={most}"
        )
    within(f"{KEY}.controller.K", controller.K, controller.least_k, controller.max_k)
    check_bounds(settings, f"{KEY}.")
    return settings


def _chosen(axis: Axis[Any], asked: Any) -> Any:
    """The option that a JSON object names, its settings still to be given."""
    default = {"gate": "none", "controller": "fixed"}[axis.group]
    name = asked.get("name", default) if isinstance(asked, dict) else default
    if name not in axis.options:
        raise ConfigError(f"{KEY}.{axis.group}.name={name}: allowed are {', '.join(axis.options)}")
    return axis.options[name](**({"K": 0} if axis is CONTROLLER else {}))


def check(draft: DraftOptions, gate: GateOptions, controller: ControllerOptions, ranks: int) -> None:
    """Refuses an early exit that drafts anything but chains of likeliest tokens, or could not learn inside vLLM.

    Args:
        ranks: among how many devices layers are shared.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in (("width", 1), ("budget", None), ("sample", False)):
        if draft.get(key) != value:
            raise ConfigError(f"draft.{key}={draft.get(key)}: inside vLLM a draft is a chain of likeliest tokens")
    _check_learning(gate, controller, ranks)


def check_own(draft: DraftOptions, gate: GateOptions, controller: ControllerOptions) -> None:
    """Refuses a gate, and a K that changes, for a draft that is vLLM's own.

    Raises:
        ConfigError: naming it.
    """
    if gate.stops:
        raise ConfigError(f"gate={gate.name}: vLLM's draft={draft.name} asks no gate; {' and '.join(early())} do")
    if not controller.constant:
        asked = f"controller={controller.name}"
        raise ConfigError(
            f"{asked}: vLLM's draft={draft.name} has one K, use fixed; {' and '.join(early())} have others"
        )


def _check_learning(gate: GateOptions, controller: ControllerOptions, ranks: int) -> None:
    if controller.chosen_exits:
        able = [name for name, option in CONTROLLER.options.items() if not hasattr(option, "exits")]
        raise ConfigError(
            f"controller={controller.name}: inside vLLM one exit serves all; allowed are {', '.join(able)}"
        )
    if ranks > 1 and (gate.learns or controller.learns):
        raise ConfigError(
            f"gate={gate.name}, controller={controller.name}: learns from times, which ranks measure differently, and "
            f"so cannot run with tensor_parallel_size={ranks}"
        )


def early() -> list[str]:
    """The drafts that run inside vLLM."""
    return [name for name, option in DRAFT.options.items() if option.inside_vllm]


def arguments(plan: Plan, head: Path | None = None) -> dict[str, Any]:
    """What makes ``vllm.LLM(...)`` draft as a plan says; ``vllm serve`` takes the same as JSON.

    Args:
        head: the plan's fitted head; ``None`` where it has none.

    Raises:
        ConfigError: the plan asks for what cannot be done inside vLLM.
    """
    draft = plan.draft
    if not draft.inside_vllm:
        raise ConfigError(f"draft={draft.name}: no early exit; inside vLLM run {', '.join(early())}")
    if not plan.policy.verify:
        raise ConfigError("policy.verify=false: vLLM verifies what is drafted")
    ranks = plan.engine.get("tensor_parallel", 1)
    check(draft, plan.gate, plan.controller, ranks)
    given = {
        "exit_layer": draft.get("exit_layer"),
        "head": None if head is None else str(head.resolve()),
        "gate": _given(plan.gate),
        "controller": _given(plan.controller),
        "seed": plan.seed,
    }
    most = plan.controller.max_k
    parse(given, most, ranks)
    return {"speculative_config": {"model": PROPOSER, "num_speculative_tokens": most, KEY: given}}


def _given(group: Option) -> dict[str, Any]:
    """A group as JSON, less what is not set."""
    values = {key: value for key, value in asdict(group).items() if value is not None}
    return {key: value.name if isinstance(value, Enum) else value for key, value in values.items()}
