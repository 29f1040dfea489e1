"""The wheel: installed where nothing of the checkout is, and used from an empty folder, it runs the main command."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.real]  # its build back end comes from the package index
REPO = Path(__file__).parents[1]
MAIN = ("-m", "gate=varH", "tau_v=4,5,6")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment that has the wheel, and this one's packages in the place of a download of gigabytes."""
    wheels, place = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("bare")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(REPO)], check=True)
    venv.create(place, symlinks=True, with_pip=False)
    (wheel,) = wheels.glob("selfspec-*.whl")
    (packages,) = place.glob("lib/python*/site-packages")
    # A line of a `.pth` is a folder to look into; what `.pth` lie there, as an editable install's, is not heeded.
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    subprocess.run([*pip, "--python", str(place), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return place / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    """``python -m selfspec.run`` in an empty folder, by nothing of this checkout: what it says."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-m", "selfspec.run", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_main_command(
    python: Path, overrides: list[str], prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    own = [each for each in overrides if not each.startswith(("output_dir", "tracking"))]
    said = run(python, tmp_path / "empty", *MAIN, *own, "engine.kernels=torch")
    assert all(f"lsq3 varH={threshold} K=4 |" in said for threshold in (4, 5, 6)), said
    assert (tmp_path / "empty" / "outputs" / "mlflow.db").is_file()
    said = run(python, tmp_path / "plugins", "--info", "plugins")
    assert all(name in said for name in ("LocalLauncher", "SlurmLauncher", "SkyPilotLauncher")), said


@pytest.mark.nightly
def test_the_main_command_on_the_real_model(python: Path, tmp_path: Path) -> None:
    said = run(python, tmp_path / "empty", *MAIN, "scale=smoke")
    assert all(f" varH={threshold} K=" in said for threshold in (4, 5, 6)), said
