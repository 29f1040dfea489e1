"""What a user is told when Hydra, OmegaConf or selfspec refuses: one line with key, value and what is allowed."""

import errno
import re
import sys
import traceback
from dataclasses import is_dataclass
from typing import NoReturn

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from selfspec.axes import AXES
from selfspec.config import RENAMED, unknown
from selfspec.errors import SelfspecError, UserError, one_line, printable
from selfspec.serve.config import BackendConfig

BY_USER = (UserError, HydraException, OmegaConfBaseException, yaml.YAMLError)
"""What the user can put right: told in one line, exit code 2."""


def exit_with(error: Exception) -> NoReturn:
    """Says what happened and exits: with 2 for what the user can put right, else with 1."""
    say(error)
    sys.exit(getattr(error, "exit_code", UserError.exit_code if foreseen(error) else 1))


def say(error: Exception) -> None:
    """One line on stderr for what selfspec or Hydra refuse or find; a traceback for what nobody foresaw."""
    if isinstance(error, SelfspecError) or foreseen(error):
        print(f"error: {one_line(sentence(error))}", file=sys.stderr)
    else:
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr, end="")


def foreseen(error: Exception) -> bool:
    """Whether the user can put it right."""
    return isinstance(error, BY_USER) or _of_the_disk(error) or _of_hydra(error)


def sentence(error: Exception) -> str:
    """The error in one line."""
    cause = error.__cause__ or (error.__context__ if isinstance(error, HydraException) else None)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if not group:
            return f"--config-name={option}: there is no such config"
        if group in AXES and option.endswith("_schema"):
            name = option.removesuffix("_schema")
            return f"{group}={name}: {AXES[group].load(name)}"
        if f"{group}={option}" in RENAMED:
            return f"{group}={option}: is now {RENAMED[f'{group}={option}']}"
        known = [name for name in error.options or () if not name.endswith("_schema")]
        return f"{group}={option}: no such option; allowed are {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        reason = error.message.splitlines()[0]
        return f"{error.override}: {reason} (a value with special characters needs quotes: 'key=\"value\"')"
    if isinstance(cause, ConfigKeyError) or type(cause).__name__ == "ConfigAttributeError":
        return ": ".join(filter(None, (_composing(error), _unknown_key(cause))))
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        if file := _composing(error):
            return ": ".join(filter(None, (file, getattr(cause, "full_key", ""), str(cause).splitlines()[0])))
        asked = str(error).removeprefix("Error merging override ").splitlines()[0]
        if asked in RENAMED:
            return f"{asked}: is now {RENAMED[asked]}"
        said = str(cause).splitlines()[0]
        return f"{asked}: " + ("must have a value" if "is not Optional" in said else said)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        said = one_line(ValueError(error.problem or error.context))
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: is no YAML: {said}"
    if file := _being_read(error):
        return f"{file}: cannot be read: {one_line(error)[:300]}"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: cannot be written: {str(error.strerror).lower()}"
    said = one_line(error) if str(error) else _where(error)
    return said if len(said) <= _MOST else f"{said[:_MOST]}..."


def _of_the_disk(error: Exception) -> bool:
    """Whether a file of Hydra's could not be written; ours say so themselves."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _composing(error: Exception) -> str:
    """The file in which Hydra found what is wrong, if it says so."""
    found = re.match(r"In '(.+)': \w+ raised while composing config", str(error))
    return f"{found[1]}.yaml" if found else ""


def _being_read(error: Exception) -> str:
    """The YAML that was being read, if one was."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_config" and "full_path" in frame.f_locals:
            return str(frame.f_locals["full_path"])
    return ""


def _where(error: Exception) -> str:
    """Of an assertion that says nothing, at least what it is of."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__} in {frame.name} of {frame.filename}: {frame.line}"
    return f"the configuration is not as Hydra expects it: {what}"


def _of_hydra(error: Exception) -> bool:
    """Whether it arose in Hydra or what Hydra reads with: it asserts, of what the user gave, that it is as expected.

    Our own modules that are called by it are no part of it.
    """
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", "")).split(".")[0]
        found = name if name in _HYDRA or name in _OURS else found
    return found in _HYDRA


_MOST = 600
"""Characters of a line, should a library say more."""
_HYDRA, _OURS = ("hydra", "omegaconf", "yaml", "antlr4"), ("selfspec", "hydra_plugins", "__main__")


def _unknown_key(error: BaseException | None) -> str:
    key = str(getattr(error, "full_key", ""))
    owner = getattr(error, "object_type", None)
    if owner is BackendConfig:  # an item of a list: OmegaConf does not say of which
        key = f"serve.backends[].{key}"
    if not (isinstance(owner, type) and is_dataclass(owner)):
        return f"{key}: no such key"
    return unknown(owner, key)
