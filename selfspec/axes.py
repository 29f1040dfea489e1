"""The five axes, and what the rest of the program may ask of any option of each."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from omegaconf import MISSING

from selfspec.errors import ConfigError
from selfspec.options import AUTO, Axis, Option, bounded
from selfspec.types import Sampling

AUTO_K = 4
"""The most that ``K=auto`` comes to, and what it is where no exit layer is chosen."""


@dataclass
class DraftOptions(Option):
    """How tokens are proposed."""

    asked: ClassVar[str] = "make(self, model, head)"
    speculates: ClassVar[bool] = True
    """Whether tokens are drafted and verified here; plain decoding drafts none, and a server verifies its own."""
    role: ClassVar[Literal["lookup", "learned"] | None] = None
    """Which of the two drafts of a hybrid it can be."""
    can_go_unverified: ClassVar[bool] = False
    """Whether ``policy.verify=false`` makes a decoder of it."""
    inside_vllm: ClassVar[bool] = False
    """Whether our plugin runs it inside vLLM: as a chain of likeliest tokens, with our gates and controllers."""
    chooses_exit: ClassVar[bool] = False
    """Whether ``exit_layer=auto`` means anything to it."""
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The engines that have such a draft themselves, and the settings that they read."""

    @property
    def learned_from_states(self) -> bool:
        """Whether the fit stage fits something to the model's states."""
        return False

    @property
    def fitted(self) -> bool:
        """Whether it needs what the fit stage makes."""
        return self.learned_from_states

    @property
    def open(self) -> bool:
        """Whether its exit layer is still to be chosen, which the fit stage does."""
        return bool(self.get("exit_layer") == AUTO)

    def at(self, exit_layer: int) -> Self:
        """The same early exit at another layer."""
        there: dict[str, Any] = {"exit_layer": exit_layer}
        return replace(self, **there)

    @property
    def raw_exits(self) -> bool:
        """Whether any layer would do for an exit, as nothing is fitted to one."""
        return False

    @property
    def label(self) -> str:
        """A short name for tables and run lists, such as ``lsq12``."""
        return self.name

    def make(self, model: Any, head: Any) -> Any:
        """The draft, a :class:`~selfspec.speculation.draft.base.Draft`.

        Args:
            head: what :meth:`fit` made; ``None`` where nothing is fitted.
        """
        raise NotImplementedError

    def fit(self, model: Any, train: Any, heldout: Any, seed: int) -> Any:
        """What it is to be fitted: a :class:`~selfspec.speculation.head.Head`, from traces of the model's answers."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a head must have been fitted for, as JSON values."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("fact")}
        return {k: v.name if isinstance(v, Enum) else v for k, v in found.items()} | {"draft": self.name}

    def vllm(self, folder: Path | None) -> dict[str, Any]:
        """What makes vLLM draft so: of its ``speculative_config``, all but how many tokens.

        Args:
            folder: of the draft's own model or heads, where it has any.
        """
        raise NotImplementedError

    def check_here(self) -> None:
        """Refuses, without loading it, what is not installed.

        Raises:
            ConfigError: with what is needed.
        """


@dataclass
class GateOptions(Option):
    """Keep drafting, or stop now?"""

    asked: ClassVar[str] = "make(self, seed)"
    stops: ClassVar[bool] = True
    """Whether it ever stops a draft."""
    learns: ClassVar[bool] = False
    """Whether it learns from times as it decodes."""

    @property
    def label(self) -> str:
        """A short name for tables and run lists, such as ``varH=4``."""
        threshold = self.get("threshold")
        return self.name if threshold is None else f"{self.name}={threshold:g}"

    def make(self, seed: int = 0) -> Any:
        """The gate, a :class:`~selfspec.speculation.gate.base.Gate`."""
        raise NotImplementedError


@dataclass
class ControllerOptions(Option):
    """How many tokens to draft next?"""

    K: int | str = bounded(MISSING, 1, 64, auto=True)
    """As many; where K changes, what it starts from or the most there may be. ``auto``: chosen with the exit layer."""

    asked: ClassVar[str] = "make(self, seed)"
    adapts: ClassVar[bool] = True
    """Whether K changes, so that the best fixed one is worth measuring beside it."""
    learns: ClassVar[bool] = False
    """Whether it learns from times as it decodes."""

    @property
    def k(self) -> int:
        """K as a number; of ``auto``, the most that is ever chosen."""
        return self.K if isinstance(self.K, int) else AUTO_K

    @property
    def least_k(self) -> int:
        """The smallest K that it may begin with."""
        return 0

    @property
    def max_k(self) -> int:
        """The largest K it can ask for."""
        return self.k

    @property
    def chosen_exits(self) -> Sequence[int]:
        """The exit layers it chooses from, request by request; none: the draft's own."""
        return ()

    @property
    def constant(self) -> bool:
        """Whether every cycle of every request asks for the same."""
        return not self.adapts and not self.chosen_exits

    @property
    def label(self) -> str:
        """A short name for tables and run lists."""
        return self.name

    def make(self, seed: int = 0) -> Any:
        """The controller, a :class:`~selfspec.speculation.controller.base.Controller`."""
        raise NotImplementedError


@dataclass
class PolicyOptions(Option):
    """Which drafted tokens stand?"""

    verify: bool = True
    """``False`` on an early-exit draft is plain layer skipping: lossy."""

    lossy: ClassVar[bool] = False
    """Whether a token may stand that plain decoding would not have given."""

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn; at temperature 0 each is the likeliest."""
        return Sampling()

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; else each is the likeliest."""
        return self.sampling.temperature > 0

    @property
    def relaxed(self) -> bool:
        """Whether tokens may differ from what plain decoding gives, by design."""
        return not self.verify or self.lossy

    @property
    def label(self) -> str:
        """A short name for tables and run lists."""
        return self.name

    def make(self) -> Any:
        """The policy, a :class:`~selfspec.speculation.policy.base.Policy`."""
        raise NotImplementedError


@dataclass
class EngineOptions(Option):
    """What runs the model."""

    max_batch: int = bounded(1, 1, 256)
    """Requests decoded at once."""

    asked: ClassVar[str] = "make(self, plan)"
    runs_ours: ClassVar[bool] = True
    """Whether it runs every draft that can be made here; else those that name it (``DraftOptions.engines``)."""
    can: ClassVar[tuple[type, ...]] = ()
    """What it can do besides decoding (``engine/base.py``); the engine's class has these among its bases."""
    reads_model: ClassVar[bool] = True
    """Whether the model is to be on this disk."""
    chooses: ClassVar[bool] = False
    """Whether it can tell which exit layer is best."""
    alike: ClassVar[Sequence[int]] = ()
    """Exit layers that are all the same to it, as it runs none: of equals, the first is best."""

    @property
    def label(self) -> str:
        """What tables and run lists say of it; nothing where it is as expected."""
        return ""

    def runs(self, draft: type[DraftOptions]) -> bool:
        """Whether it can decode with such a draft."""
        return (self.runs_ours and not draft.made_elsewhere) or self.name in draft.engines

    def make(self, plan: Any) -> Any:
        """The engine, a :class:`~selfspec.engine.base.Engine`; nothing is loaded before it is asked for something."""
        raise NotImplementedError

    def refuse(self, plan: Any) -> None:
        """Refuses what it cannot do of a plan, or of a config on its way to one.

        Raises:
            ConfigError: with the setting, and what can be used in its place.
        """
        if not self.runs(type(plan.draft)):
            able = ", ".join(name for name, option in DRAFT.options.items() if self.runs(option))
            raise ConfigError(f"draft={plan.draft.name}: engine={self.name} cannot run it; it runs {able}")
        if plan.draft.open and not self.chooses:
            able = ", ".join(name for name, option in ENGINE.options.items() if option.chooses)
            raise ConfigError(f"exit_layer={AUTO}: engine={self.name} cannot choose one, {able} can; give a number")

    def check_here(self) -> None:
        """Refuses, without loading it, an engine that is not installed.

        Raises:
            ConfigError: with what is needed.
        """

    def int8(self) -> "EngineOptions":
        """The same with weights in 8 bits, where it has them."""
        return self

    @property
    def fits_as(self) -> dict[str, Any]:
        """What of it changes the model's own answers, which heads are fitted to."""
        return {}


DRAFT = Axis("draft", "selfspec.speculation.draft", DraftOptions)
GATE = Axis("gate", "selfspec.speculation.gate", GateOptions)
CONTROLLER = Axis("controller", "selfspec.speculation.controller", ControllerOptions)
POLICY = Axis("policy", "selfspec.speculation.policy", PolicyOptions)
ENGINE = Axis("engine", "selfspec.engine", EngineOptions)
AXES: dict[str, Axis[Any]] = {axis.group: axis for axis in (DRAFT, GATE, CONTROLLER, POLICY, ENGINE)}


def foreign(option: type[Option], key: str) -> str:
    """What is said of a key that an option does not have."""
    axis = next(axis for axis in AXES.values() if issubclass(option, axis.base))
    group, own = axis.group, _keys(option)
    said = f"{group}.{key}: means nothing to {group}={option.name}"
    said += f"; its settings are {', '.join(own)}" if own else "; it has no settings"
    if close := difflib.get_close_matches(key, own, n=1):
        return f"{said}; did you mean {group}.{close[0]}?"
    keys = {name: _keys(other) for name, other in axis.options.items()}
    for near in difflib.get_close_matches(key, {k for each in keys.values() for k in each}, n=1):
        having = [name for name, each in keys.items() if near in each]
        what = "it" if near == key else f"{group}.{near}"
        return f"{said}; {group}={', '.join(having)} {'has' if len(having) == 1 else 'have'} {what}"
    return said


def _keys(option: type[Option]) -> list[str]:
    """Its settings, those that others do not inherit first."""
    keys = [f.name for f in fields(option) if f.name != "name"]
    return sorted(keys, key=lambda key: key not in option.__annotations__)
