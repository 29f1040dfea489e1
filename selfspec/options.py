"""What an option of an axis is: a dataclass of its settings beside the code that reads them, found by looking.

An axis is a group of ``conf/`` whose options are code: draft, gate, controller, policy, engine (``axes.py``). A module
of its package is an option if it has a dataclass ``Options``; the module's name is the option's, and the dataclass is
Hydra's schema of ``conf/<axis>/<name>.yaml``, which begins with ``defaults: [<name>_schema, _self_]``. Nothing else
names it: one file and one YAML are a new option.
"""

import importlib
import pkgutil
import re
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from omegaconf import MISSING

from selfspec.errors import ConfigError, one_line

AUTO = "auto"
"""The value of a setting that the fit stage chooses."""


def bounded(default: Any, low: float, high: float | None = None, auto: bool = False, **marks: bool) -> Any:
    """A field whose value, unless it is ``None``, must be from ``low`` to ``high``; ``None`` there: any above.

    Args:
        auto: ``auto`` is a value, too.
        marks: what :func:`setting` takes.
    """
    return setting(default, low=low, high=high, auto=auto, **marks)


def setting(default: Any, **metadata: Any) -> Any:
    """A field of an option.

    Args:
        use: it says how a fitted draft is used; what is fitted does not depend on it.
        fact: a head that was fitted with another value does not fit.
    """
    return field(default=default, metadata=metadata)


def within(key: str, value: float | str | None, low: float, high: float | None = None, auto: bool = False) -> None:
    """Refuses a number that is too small or too large, and a word that is none.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if value is None or (auto and value == AUTO):
        return
    if not isinstance(value, str) and low <= value and (high is None or value <= high):
        return  # a NaN fails both comparisons, and so is refused
    allowed = f">= {low}" if high is None else f"from {low} to {high}"
    raise ConfigError(f"{key}={value}: must be {allowed}" + (f", or {AUTO}" if auto else ""))


def check_bounds(of: Any, prefix: str = "") -> None:
    """Refuses what one value alone gets wrong: in every field of a dataclass, and of those within it.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if isinstance(of, Option) and of.name != type(of).name:
        group = prefix.rstrip(".")
        raise ConfigError(f"{group}.name={of.name}: is {type(of).name}; another is chosen as {group}=...")
    for f in fields(of):
        key, value = f"{prefix}{f.name}", getattr(of, f.name)
        if is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif "low" in f.metadata:
            if f.metadata["auto"] and isinstance(value, str) and value.isdecimal():
                setattr(of, f.name, value := int(value))  # of the environment, all values are words
            within(key, value, f.metadata["low"], f.metadata["high"], f.metadata["auto"])
        elif isinstance(value, list):
            for at, item in enumerate(value):
                if is_dataclass(item):
                    check_bounds(item, f"{key}[{at}].")
        elif isinstance(value, dict):
            for name, item in value.items():
                if is_dataclass(item):
                    check_bounds(item, f"{key}.{name}.")
    if isinstance(of, Option):
        of.check()


@dataclass
class Option:
    """The base of every option's settings."""

    name: str = MISSING

    asked: ClassVar[str] = "make(self)"
    """How the method that makes the thing looks."""
    made_elsewhere: ClassVar[bool] = False
    """Whether it has no such method, as an engine has the thing itself."""

    def make(self, *args: Any) -> Any:
        """What the settings ask for."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuses what its own settings get wrong together.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """

    def get(self, key: str, default: Any = None) -> Any:
        """A setting that not every option of the axis has, or the default."""
        return getattr(self, key, default)

    def changed(self) -> dict[str, Any]:
        """The settings that are not at their default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


O = TypeVar("O", bound=Option)  # noqa: E741


@dataclass(frozen=True)
class Axis(Generic[O]):
    """A group of options that are code: ``base`` is what all of them inherit, ``package`` where they lie."""

    group: str
    package: str
    base: type[O]

    @cached_property
    def options(self) -> dict[str, type[O]]:
        """All that are whole, by name."""
        return self.others("")

    def new(self, name: str, **settings: Any) -> O:
        """An option's settings."""
        return self.options[name](**settings)

    def others(self, name: str) -> dict[str, type[O]]:
        """All but one: what that one asks for, while it is being imported."""
        found = {
            module.name: self.load(module.name)
            for module in pkgutil.iter_modules([str(self._folder)])
            if module.name != name
        }
        return {name: option for name, option in found.items() if not isinstance(option, str)}

    def load(self, name: str) -> type[O] | str:
        """An option's settings, or what is missing of it."""
        path = self._folder / name / "__init__.py" if (self._folder / name).is_dir() else self._folder / f"{name}.py"
        shown = f"{self.package.replace('.', '/')}/{path.relative_to(self._folder)}"
        if not path.is_file():
            return f"{shown} is missing"
        if not re.search(r"^(class )?Options\b", path.read_text(), re.M):  # a helper, which may be heavy to import
            return f"{shown} has no Options"
        try:
            option = importlib.import_module(f"{self.package}.{name}").Options
        except SyntaxError as error:
            return f"{shown}, line {error.lineno}: {error.msg}"
        except Exception as error:
            return f"{shown} cannot be imported: {one_line(error)}"
        if not (isinstance(option, type) and issubclass(option, self.base) and is_dataclass(option)):
            return f"{shown}: Options must be a dataclass, and inherit {self.base.__name__}"
        if option.name != name:
            return f"{shown}: Options.name must be {name!r}"
        if option.make is self.base.make and not option.made_elsewhere:
            return f"{shown}: Options has no {option.asked}"
        return option

    @cached_property
    def _folder(self) -> Path:
        (folder,) = importlib.import_module(self.package).__path__
        return Path(folder)

    def store(self) -> None:
        """Gives Hydra the schema of every option."""
        from hydra.core.config_store import ConfigStore

        for name, option in self.options.items():
            ConfigStore.instance().store(f"{name}_schema", option, group=self.group)
