"""Config -> frozen :class:`Plan`: what will run, and its identity.

The identity is a hash of what changes results and of nothing else: not paths, not the launcher, not
tracking. What has no effect in a combination (the gate of a plan that drafts nothing) is left out of it,
so that two jobs of a sweep which come to the same work have one identity and run once.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfspec import config as schema
from selfspec import rules
from selfspec.axes import GATE, ControllerOptions, DraftOptions, EngineOptions, GateOptions, PolicyOptions
from selfspec.data import assets
from selfspec.data.config import Workload
from selfspec.errors import ConfigError
from selfspec.options import AUTO
from selfspec.quality.config import Quality
from selfspec.serve.config import Serve
from selfspec.soak.config import Soak

STAGE_VERSIONS = {"fit": 3, "bench": 4, "quality": 1, "soak": 1, "profile": 1}
"""Raise a stage's number when the same plan would give other results: old journals are then not taken."""

_OTHER_VALUE: dict[str, Callable[[Any], Any]] = {
    "tau": lambda v: 1 - v if v != 0.5 else 0.25,
    "tau_v": lambda v: v + 1,
    "tau_h": lambda v: v + 1,
    "K": lambda v: 1 if v == AUTO else v + 1 if v < 64 else v - 1,
    "exit_layer": lambda v: 1 if v == AUTO else v - 1 if v > 1 else v + 1,
    "temperature": lambda v: v + 0.5 if v < 9 else v - 0.5,
    "seed": lambda v: v + 1 if v < 2**32 - 1 else v - 1,
    "stages": lambda v: ["fit"] if list(v) != ["fit"] else ["bench"],
}


@dataclass(frozen=True)
class Plan:
    """One job, settled: every group as it will really be used."""

    name: str
    output_dir: Path
    seed: int
    stages: tuple[str, ...]
    model: schema.Model
    draft: DraftOptions
    gate: GateOptions
    controller: ControllerOptions
    policy: PolicyOptions
    engine: EngineOptions
    hardware: schema.Hardware
    workload: Workload
    scale: schema.Scale
    bench: schema.Bench
    quality: Quality
    tracking: schema.Tracking
    checkpoint: schema.Checkpoint
    serve: Serve
    soak: Soak

    @property
    def open(self) -> bool:
        """Whether the fit stage has yet to choose the exit layer, and K with it where that is ``auto``."""
        return self.draft.open

    @property
    def possible_ks(self) -> Sequence[int]:
        """Of an open plan: what K may come to be."""
        fixed = self.controller.constant and self.controller.K != AUTO
        return [self.controller.k] if fixed else range(1, self.controller.max_k + 1)

    def settled(self, exit_layer: int, k: int) -> "Plan":
        """An open plan with its choice made: what runs under this one's identity. A controller that adapts keeps K."""
        controller = replace(self.controller, K=k if self.controller.constant else self.controller.k)
        return replace(self, draft=self.draft.at(exit_layer), controller=controller)

    @property
    def speculative(self) -> bool:
        """Whether we draft and verify tokens; else every step is one plain pass, or a server's own affair."""
        return self.draft.speculates and self.policy.verify

    @property
    def exact(self) -> bool:
        """Whether tokens must be plain decoding's: the same ones, or of the same distribution where they are drawn."""
        return not self.policy.relaxed

    @property
    def fixed_ks(self) -> tuple[int, ...]:
        """The fixed K measured beside a controller that adapts."""
        return tuple(self.bench.fixed_k) if self.controller.adapts and self.speculative else ()

    @property
    def label(self) -> str:
        """A short name for tables and run lists, such as ``lsq12 varH=4 K=4``."""
        parts = [
            self.draft.label,
            self.gate.label,
            self.controller.label if self.speculative else "",
            self.policy.label if self.policy.verify else "unverified",
            f"T={self.policy.sampling.temperature:g}" if self.policy.samples else "",
            self.engine.label,
            f"batch={self.engine.max_batch}" if self.engine.max_batch > 1 else "",
        ]
        return " ".join(filter(None, parts))

    @property
    def model_id(self) -> str:
        """Identity of the weights; a fitted head carries it too."""
        return assets.identity(self.model.source, self.model.sha256)

    @property
    def _head_digest(self) -> str | None:
        """Of a head the user names: its content, not its path, changes results."""
        head: str | None = self.draft.get("head")
        if head is None or not Path(head).is_file():
            return head  # one that cannot be read is refused before anything runs
        return hashlib.sha256(Path(head).read_bytes()).hexdigest()

    @cached_property
    def answers_id(self) -> str:
        """Identity of the fit data: the model's own greedy answers to the fit prompts."""
        return _digest(
            model=self.model_id,
            prompts=(assets.identity(self.workload.source, self.workload.sha256), self.workload.chat, self.seed),
            scale=(self.scale.fit_prompts, self.scale.fit_new_tokens),
            engine=self.engine.name,
            dtype=self.hardware.dtype,
            version=STAGE_VERSIONS["fit"],
            **self.engine.fits_as,
        )

    @cached_property
    def choice_id(self) -> str:
        """Identity of what an open plan leaves to be chosen; the machine that chooses is no part of it."""
        return _digest(
            answers=self.answers_id,
            draft=asdict(self.draft),
            gate=asdict(self.gate),
            controller=asdict(self.controller),
            policy=asdict(self.policy),
            engine=asdict(self.engine),
            hardware=(self.hardware.device, self.hardware.dtype, self.hardware.threads),
        )

    @cached_property
    def head_id(self) -> str:
        """Identity of the fitted head: one head serves every job of a sweep that asks for the same."""
        fitted = {f.name: getattr(self.draft, f.name) for f in fields(self.draft) if not f.metadata.get("use")}
        return _digest(answers=self.answers_id, draft=fitted)

    @property
    def _asked(self) -> dict[str, Any]:
        """What changes which prompts are asked, and how they are answered."""

        def of(prompts: Any) -> Any:
            return replace(prompts, source=assets.identity(prompts.source, prompts.sha256), sha256=None)

        parts = {name: of(part) for name, part in self.workload.parts.items()}
        return asdict(replace(of(self.workload), name="", parts=parts))

    @property
    def _assessed(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What changes the quality stage's results."""
        documents = {task: assets.identity(data.source, data.sha256) for task, data in self.quality.data.items()}
        return asdict(replace(self.quality, name="", data={})), documents

    @property
    def _soaked(self) -> dict[str, Any]:
        """What changes a soak's results: not where the server listens, nor what its measurements are held to."""
        served, soak = asdict(self.serve), asdict(self.soak)
        for key in ("name", "host", "port", "api_key", "allowed_hosts", "model_name"):
            del served[key]
        for key in ("max_connections", "max_connections_per_client"):  # there is room for all of its callers
            del served[key]
        return {"serve": served, **{key: soak[key] for key in soak if key != "name" and not key.startswith("max_")}}

    @cached_property
    def id(self) -> str:
        """Identity of the whole plan."""
        return _digest(
            model=self.model_id,
            draft=asdict(self.draft) | {"head": self._head_digest},
            gate=asdict(self.gate),
            controller=asdict(self.controller) if self.speculative else None,
            policy=asdict(self.policy),
            engine=asdict(self.engine),
            hardware=(self.hardware.device, self.hardware.dtype, self.hardware.threads),
            workload=self._asked,
            scale=asdict(replace(self.scale, name="")),
            bench=(self.bench.baselines, self.fixed_ks),
            seed=self.seed,
            stages={stage: STAGE_VERSIONS[stage] for stage in self.stages},
            fit=STAGE_VERSIONS["fit"] if self.draft.fitted else None,
            quality=self._assessed if "quality" in self.stages else None,
            soak=self._soaked if "soak" in self.stages else None,
        )

    @property
    def hub_sources(self) -> dict[str, str]:
        """What is of the Hugging Face hub, by key, each with its commit where that is known."""
        named = {"model.source": self.model.source, "draft.source": self.draft.get("source")}
        return {key: source for key, source in named.items() if source is not None and source.startswith("hf:")}

    def settings(self) -> dict[str, Any]:
        """The plan as plain nested values, for the journal, the tracker and the report; without secrets."""
        groups = {group: _plain(asdict(getattr(self, group))) for group in schema.GROUPS}
        groups["serve"].pop("api_key")
        return {"name": self.name, "seed": self.seed, "stages": list(self.stages), **groups}


def make(cfg: DictConfig) -> Plan:
    """The plan of a composed config.

    Raises:
        ConfigError: a value that is not allowed, or a combination that cannot work, with the reason.
    """
    config = schema.load(cfg)
    draft, gate, controller, policy = config.draft, config.gate, config.controller, config.policy
    if draft.open and (exits := controller.chosen_exits or config.engine.alike):  # there is nothing left to choose
        draft = config.draft = draft.at(exits[0])
    if not draft.open:
        controller = config.controller = replace(controller, K=controller.k)
    rules.check(config)
    if not draft.speculates or not policy.verify:
        gate = GATE.new("none")  # nothing is drafted here, or nothing verified: there is nothing to stop
    if draft.name == "none":
        policy = replace(policy, verify=True)
    # Here, and once: the plan's identity, its settings and what is fetched for it all name the same commit.
    model = replace(config.model, source=assets.pinned(config.model.source))
    if (source := draft.get("source")) is not None:
        settled: dict[str, Any] = {"source": assets.pinned(source)}
        draft = replace(draft, **settled)
    stages = tuple(stage for stage in schema.STAGES if stage in config.stages)
    return Plan(
        name=config.name,
        output_dir=Path(config.output_dir),
        seed=config.seed,
        stages=stages,
        model=model,
        draft=draft,
        gate=gate,
        controller=controller,
        policy=policy,
        engine=config.engine,
        hardware=config.hardware,
        workload=config.workload,
        scale=config.scale,
        bench=config.bench,
        quality=config.quality,
        tracking=config.tracking,
        checkpoint=config.checkpoint,
        serve=config.serve,
        soak=config.soak,
    )


def idle_handles(cfg: DictConfig, handles: Iterable[str]) -> list[str]:
    """Those of the given sweep handles that have no effect: another value gives the same plan."""
    identity = make(cfg).id
    idle = []
    for handle in handles:
        other = schema.with_handle(cfg, handle, _OTHER_VALUE[handle](cfg[handle]))
        try:
            if make(other).id == identity:
                idle.append(handle)
        except ConfigError:  # another value would not do, so this one has an effect
            continue
    return idle


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _digest(**parts: Any) -> str:
    canonical = json.dumps(_plain(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
