"""Where a result comes from: hardware, versions, git."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

import selfspec

PACKAGES = ("torch", "transformers", "mlflow", "hydra-core")
GIT_TIMEOUT_S = 2.0

_CHECKOUT = Path(__file__).resolve().parents[1]


def hardware() -> dict[str, object]:
    """The machine as far as this process may use it. Names no host, no user and no path."""
    logical = _usable_cpus()
    return {
        "cpu": _cpu_model(),
        "physical_cores": _physical_cores(logical),
        "logical_cores": len(logical),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def fingerprint(extra: Mapping[str, object] = {}) -> str:
    """A short hash of the hardware; timings with different ones are never pooled.

    Args:
        extra: what else timings depend on, as the engine reports it: device name, dtype, threads.
    """
    canonical = json.dumps({"hardware": hardware(), "extra": dict(extra)}, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of Python, selfspec and the packages that results depend on; what is not installed is left out."""
    found = {"python": platform.python_version(), "selfspec": selfspec.__version__}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git() -> dict[str, str]:
    """``sha`` and ``dirty`` of the checkout selfspec runs from; empty if it runs from none, or git fails.

    Files that are not tracked count as dirty: a new draft is one.
    """
    if not (_CHECKOUT / ".git").exists():  # an installed package may lie within somebody else's checkout
        return {}
    command = ["git", "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=normal"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a hook's GIT_DIR
    env |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            command,
            cwd=_CHECKOUT,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.splitlines()
    sha = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    if sha == "(initial)":  # no commit yet
        return {}
    return {"sha": sha, "dirty": "false" if all(line.startswith("#") for line in lines) else "true"}


def collect(extra: Mapping[str, object] = {}) -> dict[str, object]:
    """All of the above in one, for the journal and the tracker; ``extra`` as in :func:`fingerprint`."""
    return {
        "hardware": hardware(),
        "extra": dict(extra),
        "fingerprint": fingerprint(extra),
        "versions": versions(),
        "git": git(),
    }


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _physical_cores(logical: list[int]) -> int:
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in logical]
    try:
        return len({path.read_text() for path in siblings})
    except OSError:  # no Linux
        return min(psutil.cpu_count(logical=False) or len(logical), len(logical))


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout.strip()
    return platform.processor() or platform.machine()
