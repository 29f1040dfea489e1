"""A SkyPilot for tests: what ``_sky.py`` asks of the real one, with processes of this machine for managed jobs.

Jobs outlive whoever launched them, as SkyPilot's do: each is a folder below ``$FAKE_SKY``. One whose process is
killed has lost its machine, and is started again; one that fails has failed. Its clouds: ``gcp``, with H100s in two
regions, and ``slurm``, which knows no spot machines.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from . import catalog, clouds, exceptions, jobs

__all__ = ["Task", "catalog", "clouds", "exceptions", "get", "jobs"]
__version__ = os.environ.get("FAKE_SKY_VERSION", "0.14.1")
_KNOWN = {"name", "workdir", "resources", "file_mounts", "envs", "secrets", "setup", "run"}


@dataclass
class Resources:
    """What a task runs on."""

    cloud: clouds.Cloud | None
    region: str | None
    accelerators: dict[str, float] | None
    use_spot: bool


class Task:
    """A task, as read from its YAML."""

    def __init__(self, config):
        self.config = config
        wanted = config.get("resources", {})
        name, _, count = wanted.get("accelerators", "").partition(":")
        places = [place["infra"] for place in wanted.get("any_of", [])] or [wanted.get("infra")]
        self.resources = [
            Resources(
                clouds.named(place.split("/")[0]) if place else None,
                place.split("/")[1] if place and "/" in place else None,
                {name: float(count or 1)} if name else None,
                wanted.get("use_spot", False),
            )
            for place in places
        ]

    @classmethod
    def from_yaml_config(cls, config):
        unknown = set(config) - _KNOWN
        if unknown:
            raise ValueError(f"Invalid task YAML: unknown {sorted(unknown)}")
        return cls(config)

    def validate(self, skip_file_mounts=False):
        workdir = self.config.get("workdir")
        if workdir is not None and not Path(workdir).is_dir():
            raise ValueError(f"Workdir must be a valid directory. {workdir} not found.")


def get(request):
    """What came of a request, which here is done when it is made."""
    if isinstance(request, Exception):
        raise request
    return request
