"""The other front door: ``python -m selfspec.serve [group=option] [handle=value]`` serves a plan over HTTP.

The groups and handles are those of ``selfspec.run``; ``serve`` says where, and what callers may ask for.
"""

import os
import sys

import hydra
from omegaconf import DictConfig

from selfspec.errors import ConfigError, Interrupted, SelfspecError
from selfspec.interrupt import process, trap
from selfspec.refusal import BY_USER, exit_with
from selfspec.run import CONF, ordered

_NOTHING_WRITTEN = ("hydra.run.dir=.", "hydra.output_subdir=null", "~hydra.callbacks.selfspec")
"""A server leaves no result, and has no job's folder."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def serve(cfg: DictConfig) -> None:
    """Called by Hydra."""
    from selfspec import plan
    from selfspec.serve import server

    try:
        server.run(plan.make(cfg))
    except (*BY_USER, SelfspecError) as error:
        exit_with(error)  # from here: Hydra would print a line of its own first


def main() -> None:
    """Runs Hydra; an error the user can put right ends in one line and exit code 2."""
    full_errors = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing in its own way
    try:
        if {"-m", "--multirun"} & set(sys.argv):
            raise ConfigError("--multirun: a gateway serves one plan; start one for each")
        sys.argv[1:] = ordered([*sys.argv[1:], *_NOTHING_WRITTEN])
        with trap():
            serve()
    except Interrupted:
        pass  # before it served anything; later the server sees to it
    except Exception as error:
        if full_errors:
            raise
        exit_with(error)


if __name__ == "__main__":
    process(main)
