"""Shared by all tests: a tiny random Llama in float32, a tiny prompt file, and a cache of their own."""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import tiny
from gcs import Proxy, emulator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # each computes on its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the Hugging Face layout."""
    return tiny.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 short conversations in ShareGPT's form."""
    return tiny.prompts(tmp_path_factory.mktemp("prompts") / "prompts.json")


@pytest.fixture
def overrides(tmp_path: Path, tiny_folder: Path, prompts_file: Path) -> list[str]:
    """Command-line overrides: the tiny model and prompts, float32, results in ``tmp_path``, nothing tracked."""
    return [*tiny.torch_job(tiny_folder, prompts_file), f"output_dir={tmp_path / 'outputs'}"]


@pytest.fixture
def fake(tmp_path: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for a job without a model or a tracker, with all it may write below ``tmp_path``."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    return [*tiny.fake_job(prompts_file), f"output_dir={tmp_path / 'outputs'}"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``python -m selfspec.run ...`` in this process: exit code, stdout, stderr."""
    from hydra.core.global_hydra import GlobalHydra

    from selfspec.run import main

    def call(*argv: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["selfspec.run", *argv])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for a module: making one costs seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a millisecond whenever it is looked at, and never by itself."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1e3)


@pytest.fixture(scope="module")
def inference() -> Iterator[None]:
    """No gradients, and one thread: tiny products are slower on two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[str]:
    """The URL of a real HTTP server that keeps to Google Cloud Storage's protocol."""
    with emulator() as url:
        yield url


@pytest.fixture
def gcs(gcs_emulator: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before it that all clients use; ``gs://bucket`` is there and empty, and no client pauses in vain."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs.retry

    async def at_once(seconds: float) -> None:
        pass

    proxy = Proxy(gcs_emulator)
    with proxy.serving() as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # for processes that tests start
        monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=at_once))
        fs = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True, use_listings_cache=False)
        if "bucket/" not in fs.buckets:
            fs.mkdir("bucket")
        yield proxy
        for fault in proxy.faults:
            fault.times = 0
        for path in fs.find("bucket"):
            fs.rm_file(path)
