"""The committed locks: what ``pyproject.toml`` asks for is in them, at versions that it allows, and nothing else is."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
VLLM = {"python_version": "3.11", "platform_machine": "x86_64", "sys_platform": "linux", "extra": ""}


def asked(*extras: str) -> Iterator[Requirement]:
    """What ``selfspec[extras]`` asks for directly."""
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]:
        requirement = Requirement(line)
        if requirement.name == "selfspec":
            yield from asked(*requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate(VLLM):
            yield requirement


def locked(name: str) -> dict[str, Version]:
    """Package -> version, of a file in which every other line is a comment."""
    lines = [line.split("#")[0].strip() for line in (REPO / "infra" / name).read_text().splitlines()]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines if line]
    assert all(pins), "a pin is a name and a version: no path, no address, no marker"
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}


@pytest.mark.parametrize(
    ("name", "extras"),
    [("lock.txt", [extra for extra in EXTRAS if extra != "vllm"]), ("lock-vllm.txt", ["dev", "vllm"])],
)
def test_holds_what_is_asked_for_within_its_range(name: str, extras: list[str]) -> None:
    pins = locked(name)
    outside = [
        f"{wanted}: {pins.get(canonicalize_name(wanted.name))}"
        for wanted in asked(*extras)
        if pins.get(canonicalize_name(wanted.name), Version("0")) not in wanted.specifier
    ]
    assert not outside, f"infra/{name} is older than pyproject.toml; .ci/lock renews it"


def test_vllms_leaves_out_what_breaks_transformers() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec"} & locked("lock-vllm.txt").keys()


def test_is_what_every_page_installs_from() -> None:
    """The ranges alone are for those who say so: ``.ci/newest``, and what asks for no checkout."""
    pages = [
        REPO / "README.md",
        REPO / "CONTRIBUTING.md",
        *(REPO / "docs").glob("*.md"),
        *(REPO / "infra").glob("[Ds]*"),
    ]
    commands = [
        line
        for page in [*pages, REPO / "infra" / "README.md", REPO / "conf/hydra/launcher/skypilot.yaml"]
        for line in page.read_text().splitlines()
        if "pip install" in line and re.search(r" -e ['.]|'\.\[", line) and "`" not in line
    ]
    assert len(commands) >= 8
    assert not [line for line in commands if "infra/lock" not in line]
