"""Composing a sweep's jobs: once for each choice of groups, whatever the sweep handles are.

Hydra composes a job's config from some thirty files, 0.2 s each time, and does so for every job three times: for
our checks, for its own, and to launch it. Jobs that differ in sweep handles alone differ in nothing that is
composed: a handle is a plain value at the root, and what refers to it is resolved when it is read.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from selfspec.axes import AXES
from selfspec.config import GROUPS, HANDLES
from selfspec.errors import ConfigError

_MOST = 32
"""Compositions kept, about half a megabyte each."""


class Composer(ConfigLoaderImpl):
    """Hydra's loader, quicker at the jobs of a sweep: what it gives is what Hydra gives.

    It is worth knowing Hydra's internals for: without it, the checks of ``tests/benchmarks/sweep_size.py`` took 172 ms
    of CPU a job in the place of 32 (100 jobs, one run each on a busy machine, Hydra's own loader put in by hand).
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._known: dict[tuple[str, ...], DictConfig] = {}

    def __getstate__(self) -> dict[str, Any]:  # a launcher sends it to every job
        return {**self.__dict__, "_known": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of one job of the sweep that ``master_config`` is of.

        Raises:
            HydraException: an override that is none, or that has no place or a wrong value.
        """
        asked = [_parsed(override) for override in sweep_overrides]
        rest = tuple(each for each, parsed in zip(sweep_overrides, asked, strict=True) if not _is_handle(parsed))
        if rest not in self._known:
            if len(self._known) == _MOST:
                del self._known[next(iter(self._known))]
            self._known[rest] = super().load_sweep_config(master_config, [*rest])
        config = copy.deepcopy(self._known[rest])
        self._apply_overrides_to_config([each for each in asked if _is_handle(each)], config)
        ours = [each for each in asked if not each.is_hydra_override()]
        config.hydra.overrides.task = [each.input_line for each in ours]
        naming = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            ours, kv_sep=naming.kv_sep, item_sep=naming.item_sep, exclude_keys=naming.exclude_keys
        )
        OmegaConf.copy_cache(from_config=master_config, to_config=config)  # what time it is, among others
        return config


def job(loader: ConfigLoader, sweep: DictConfig, overrides: Sequence[str], number: int) -> tuple[DictConfig, Path]:
    """The config of a job of ``sweep``, as Hydra's own launcher composes it, and the folder the job is given."""
    config = loader.load_sweep_config(sweep, list(overrides))
    with open_dict(config):
        config.hydra.job.id, config.hydra.job.num = str(number), number
    with hydras(config):
        return config, Path(sweep.hydra.sweep.dir) / config.hydra.sweep.subdir


def per_job(argv: Sequence[str]) -> list[str]:
    """A sweep's command line, on which settings of an option that is swept over are sweeps of one value.

    Hydra composes a config of the sweep's own first, without what is swept; there ``draft.max_match=5`` would be
    applied to the default draft, which may not have it, in the place of those of ``draft=ngram,suffix``.
    """
    parsed = {word: override for word in argv if (override := _override(word)) is not None}
    for override in parsed.values():
        if override.key_or_group in GROUPS:
            refuse_several(override.key_or_group, override._value)
    swept = {o.key_or_group for o in parsed.values() if o.is_sweep_override()} & AXES.keys()
    if not swept or not {"-m", "--multirun"} & {*argv}:
        return list(argv)
    return [_once(word, parsed[word]) if word in parsed and _group(parsed[word]) in swept else word for word in argv]


def refuse_several(group: str, choice: Any) -> None:
    """Refuses several options of a group, which Hydra would lay one over the other.

    Raises:
        ConfigError: with what was perhaps meant.
    """
    if isinstance(choice, (list, ListConfig)):
        names = ",".join(map(str, choice))
        raise ConfigError(f"{group}=[{names}]: must be one option; to sweep over them, -m {group}={names}")


def _override(word: str) -> Override | None:
    try:
        return None if word.startswith("-") else _parsed(word)
    except HydraException:  # it says so itself, in time
        return None


def _group(override: Override) -> str:
    return override.key_or_group.partition(".")[0] if "." in override.key_or_group else ""


def _once(word: str, override: Override) -> str:
    """The override as a sweep over its one value, if it is none."""
    key, _, value = word.partition("=")
    return word if override.is_sweep_override() else f"{key}=choice({value})"


@contextmanager
def hydras(config: DictConfig) -> Iterator[None]:
    """``${hydra:...}`` means what stands in this config, as it will when its job runs."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)
    OmegaConf.set_readonly(config.hydra, None)
    try:
        yield
    finally:
        hydra.cfg = before


def given(overrides: ListConfig) -> list[str]:
    """Overrides as they were given: what they refer to is for the job to look up, and may be a secret."""
    return cast("list[str]", OmegaConf.to_container(overrides, resolve=False))


def task(config: DictConfig) -> DictConfig:
    """A config less Hydra's own part.

    Raises:
        ConfigError: several options were chosen of one group.
    """
    for group in GROUPS:
        refuse_several(group, config.hydra.runtime.choices.get(group))
    ours = config.copy()
    with open_dict(ours):
        del ours["hydra"]
    return ours


def quoted(value: object) -> str:
    """Any text as the value of an override."""
    return QuotedString(str(value), Quote.single).with_quotes()


def _is_handle(override: Override) -> bool:
    return override.key_or_group in HANDLES and override.package is None and override.type is OverrideType.CHANGE


@lru_cache(maxsize=4096)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_overrides([override])[0]
