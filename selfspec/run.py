"""The front door: ``python -m selfspec.run [-m] [group=option] [handle=value]``; ``--help`` says more."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from selfspec.axes import AXES
from selfspec.config import Config
from selfspec.errors import ConfigError, Interrupted, SelfspecError, StageError
from selfspec.interrupt import process, trap
from selfspec.refusal import BY_USER, exit_with, say
from selfspec.sweep.compose import per_job

_PACKAGE = Path(__file__).parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""Installed, the configs lie in the package; in a checkout, beside it."""

ConfigStore.instance().store("schema", Config)
for axis in AXES.values():
    axis.store()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """One job, called by Hydra. Returns the speed-up, for sweepers that optimise."""
    from selfspec import job, plan, provenance
    from selfspec.report import results, tables
    from selfspec.sweep_context import SweepContext

    settings = HydraConfig.get()
    folder, todo = Path(settings.runtime.output_dir), plan.make(cfg)
    alone = settings.mode is not RunMode.MULTIRUN
    if alone:
        try:
            result = job.run(todo, folder, SweepContext.from_env())
        except (*BY_USER, SelfspecError) as error:
            exit_with(error)  # from here: Hydra would print a line of its own first
    else:
        try:
            result = job.run(todo, folder, SweepContext.load(Path(settings.sweep.dir)))
        except Exception as error:  # one failed job hides no other: it becomes a row of the table
            say(error)
            results.failed(todo, folder, error, provenance.collect())
            return None
    tables.show([result], explain=alone)  # a sweep explains its words and its failures once, at its end
    if alone and result["status"] == "failed":
        exit_with(StageError(f"{result['label']}: {result['error']}"))
    return result["measurements"].get("bench/speedup")


def _groups(hydra: Hydra, wanted: Callable[[str], bool], compact: bool = True) -> str:
    """What ``--help`` lists. Hydra's own would list schemas too, and copies all it knows for every group: 1.5 s."""
    if wanted("hydra/launcher"):
        return _hydras_groups(hydra, wanted, compact) if "--hydra-help" in sys.argv else ""
    found = dict[str, list[str]]()
    for path in sorted(CONF.glob("*/**/*.yaml")):
        group = path.parent.relative_to(CONF).as_posix()
        if wanted(f"{group}/"):
            found.setdefault(group, []).append(path.stem)
    return "".join(f"{group}: {', '.join(options)}\n" for group, options in sorted(found.items()))


_hydras_groups = Hydra.format_config_groups
Hydra.format_config_groups = _groups  # type: ignore[assignment, method-assign]


def ordered(argv: list[str]) -> list[str]:
    """The command line with Hydra's flags last: argparse wants what is none in one piece.

    Raises:
        ConfigError: a flag that Hydra does not have; it would take it for another that begins so.
    """

    def refuse(said: str) -> NoReturn:
        word = said.removeprefix("unrecognized arguments: ").split()[0]
        setting = word.lstrip("-")
        if word == said or not word.startswith("-"):
            raise ConfigError(said)
        raise ConfigError(f"{word}: no such flag; a setting is given as {setting}{'' if '=' in setting else '=...'}")

    parser = get_args_parser()
    parser.allow_abbrev, parser.error = False, refuse  # type: ignore[assignment]
    settings: list[str] = parser.parse_intermixed_args(argv).overrides
    flags = list(argv)
    for setting in settings:
        flags.remove(setting)
    return [*settings, *flags]


def main() -> None:
    """Runs Hydra; an error the user can put right ends in one line and exit code 2."""
    full_errors = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing in its own way
    try:
        sys.argv[1:] = per_job(ordered(sys.argv[1:]))
        with trap():
            run()
    except Interrupted as interrupted:
        print(f"{interrupted}: finished work is kept; the same command carries on", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    except Exception as error:
        if full_errors:
            raise
        exit_with(error)


if __name__ == "__main__":
    process(main)
