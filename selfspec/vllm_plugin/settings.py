"""What early exit inside vLLM is told: one JSON object, under ``selfspec`` in vLLM's ``--speculative-config``.

    {"model": "selfspec.vllm_plugin.EarlyExit", "num_speculative_tokens": 4,
     "selfspec": {"exit_layer": 24, "head": "head.safetensors", "gate": {"name": "maxp", "threshold": 0.4}}}

``num_speculative_tokens`` is the most tokens a draft may have; gate and controller are those of ``conf/``.
"""

from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfspec import config as schema
from selfspec import vllm_rules
from selfspec.errors import ConfigError, one_line
from selfspec.plan import Plan
from selfspec.rules import check_controller, check_gate

KEY = "selfspec"
PROPOSER = "selfspec.vllm_plugin.EarlyExit"


@dataclass
class Settings:
    """An early exit: after which layer, read out through what, and how long it drafts."""

    exit_layer: int = MISSING
    """Layers run before the exit."""
    head: str | None = None
    """A file that the fit stage made for this exit; ``None``: the model's own norm and head."""
    gate: schema.Gate = field(default_factory=schema.Gate)
    controller: schema.Controller = field(default_factory=lambda: schema.Controller(K=0))
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
        merged = OmegaConf.merge(OmegaConf.structured(Settings), asked)
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
    vllm_rules.learning(settings.gate, controller, ranks)
    if not 0 < controller.max_k <= most:
        raise ConfigError(
            f"{KEY}.controller: asks for up to {controller.max_k}; must be from 1 to num_speculative_tokens={most}"
        )
    if not (controller.low or 0) <= controller.K <= controller.max_k:
        raise ConfigError(
            f"{KEY}.controller.K={controller.K}: must be from {controller.low or 0} to {controller.max_k}"
        )
    check_gate(settings.gate)
    check_controller(controller)
    return settings


def arguments(plan: Plan, head: Path | None = None) -> dict[str, Any]:
    """What makes ``vllm.LLM(...)`` draft as a plan says; ``vllm serve`` takes the same as JSON.

    Args:
        head: the plan's fitted head; ``None`` where it has none.

    Raises:
        ConfigError: the plan asks for what cannot be done inside vLLM.
    """
    draft = plan.draft
    if draft.name not in vllm_rules.EARLY:
        raise ConfigError(f"draft={draft.name}: no early exit; inside vLLM run {', '.join(vllm_rules.EARLY)}")
    if not plan.policy.verify:
        raise ConfigError("policy.verify=false: vLLM verifies what is drafted")
    vllm_rules.chain(draft)
    given = {
        "exit_layer": draft.exit_layer,
        "head": None if head is None else str(head.resolve()),
        "gate": _given(plan.gate),
        "controller": _given(plan.controller),
        "seed": plan.seed,
    }
    most = plan.controller.max_k
    parse(given, most, plan.engine.tensor_parallel or 1)
    return {"speculative_config": {"model": PROPOSER, "num_speculative_tokens": most, KEY: given}}


def _given(group: schema.Gate | schema.Controller) -> dict[str, Any]:
    """A group as JSON, less what is not set."""
    values = {key: value for key, value in asdict(group).items() if value is not None}
    return {key: value.name if isinstance(value, Enum) else value for key, value in values.items()}
