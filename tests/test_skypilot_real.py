"""What we give SkyPilot, judged by SkyPilot itself, where it is installed (``sky`` on ``PATH``); nothing is launched.

Whole sweeps on a real API server are ``skypilot/e2e.sh``'s.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hydra_plugins.skypilot_launcher import _bridge, _task
from hydra_plugins.skypilot_launcher.launcher import _typed
from selfspec import plan
from selfspec.errors import ConfigError
from selfspec.run import CONF

REPO = Path(__file__).parents[1]
installed = shutil.which("sky") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed, reason="SkyPilot is not installed (tests/skypilot/up.sh does)"),
]


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_bridge.Bridge]:
    """SkyPilot with a catalog of prices that are made up, and no credentials."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        shutil.copytree(REPO / "tests" / "skypilot" / "catalog", home / ".sky" / "catalogs" / "v8")
        patch.setenv("HOME", str(home))
        patch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
        patch.chdir(REPO)
        bridge = _bridge.Bridge([_bridge._python(), str(_bridge._SCRIPT)])
        yield bridge
        bridge.close()


def h100_spot(*overrides: str) -> dict[str, Any]:
    """The task of one job."""
    asked = ["hardware=h100_spot", "checkpoint.dir=gs://bucket/x", "gate=varH", *overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", asked, return_hydra_config=True)
        made = plan.make(compose("config", asked))
    launcher = {key: value for key, value in config.hydra.launcher.items() if key != "_target_"}
    return _task.make(_typed(launcher), made, asked)


def test_a_job_of_the_h100_preset(sky: _bridge.Bridge) -> None:
    task = h100_spot("hydra.launcher.max_restarts=2", "hydra.launcher.mounts={/data: 'gs://bucket/data'}")
    prepared = sky.ask("prepare", task=task)
    assert prepared["said"] == [] and prepared["hourly"] == 3.0
    assert prepared["task"] == task


def test_regions(sky: _bridge.Bridge) -> None:
    prepared = sky.ask("prepare", task=h100_spot("hydra.launcher.regions=[us-east4]", "hydra.launcher.use_spot=false"))
    assert prepared["hourly"] == 12.0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("accelerators=H1000:1", "accelerators=H1000:1: GCP has none; known are H100"),
        ("accelerators=H100:3", "accelerators=H100:3: GCP has none; H100 comes in other numbers"),
        ("regions=[us-nowhere1]", "Invalid region 'us-nowhere1'"),
        ("infra=gpc", "'gpc' does not match"),
        ("recovery=NOPE", "'NOPE' is not a valid jobs recovery strategy"),
        ("recover_on=[300]", "300 is greater than the maximum of 255"),
        ("mounts={/ck: {source: 'gs://b', mode: MOUNTED}}", "'MOUNTED' is not one of"),
        ("workdir=/no/such", "/no/such not found"),
        ("disk_size=-1", "disk_size"),
    ],
)
def test_what_skypilot_refuses(sky: _bridge.Bridge, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"^hydra\.launcher: ") as refused:
        sky.ask("prepare", task=h100_spot(f"hydra.launcher.{override}"))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_infra_selfspec_yaml(sky: _bridge.Bridge) -> None:
    task = yaml.safe_load((REPO / "infra" / "selfspec.yaml").read_text())
    task["envs"]["BUCKET"], task["secrets"]["HF_TOKEN"] = "bucket", "token"
    assert sky.ask("prepare", task=task)["hourly"] == 3.0
