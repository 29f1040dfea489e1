"""Shared by all tests: a tiny random Llama in float32, a tiny prompt file, and a cache of their own."""

import asyncio
import inspect
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import hypothesis
import pytest
import tiny
from gcs import Proxy, emulator

if TYPE_CHECKING:
    from selfspec.engine.torch.engine import TorchEngine
    from selfspec.soak.server import Server

OF_THE_USER = (
    *("FORCE_COLOR", "GIT_", "HYDRA_", "LOCUST_", "MLFLOW_", "NO_COLOR", "OPENAI_", "PROMETHEUS_", "PYTHONWARNINGS"),
    *("SBATCH_", "SELFSPEC_", "SLURM_", "TTY_", "COLUMNS", "LINES"),
)
"""How the names of environment variables begin that are meant for a user's own runs, or for the shell around us."""
FOR_TESTS = ("SELFSPEC_CACHE", "SELFSPEC_OFFLINE", "SLURM_CONF", "SLURM_TEST")
for name in [name for name in os.environ if name.startswith(OF_THE_USER) and name not in FOR_TESTS]:
    del os.environ[name]
for name in ("no_proxy", "NO_PROXY"):  # servers of tests are on this machine
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # each computes on its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


SLOW_FIXTURES = {"gcs_emulator", "uri"}
"""Who asks for one of them is slow: it starts a process, or makes MLflow's store."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``fast`` is what has no other tier; ``nightly`` is run where ``-m`` names it, and for tests given by name."""
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if not any(item.get_closest_marker(tier) for tier in ("slow", "nightly", "real", "vllm")):
            item.add_marker("fast")
    if "nightly" not in config.getoption("markexpr") and not any("::" in asked for asked in config.args):
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine is run to its end, in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


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
def engine(overrides: list[str]) -> "Callable[..., TorchEngine]":
    """The engine of a plan on the tiny model, in one thread, with further overrides."""
    from plans import planned

    from selfspec.engine.torch.engine import TorchEngine

    return lambda *more: TorchEngine(planned(*overrides, "hardware.threads=1", *more))


@pytest.fixture
def fake(tmp_path: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for a job without a model or a tracker, with all it may write below ``tmp_path``."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    return [*tiny.fake_job(prompts_file), f"output_dir={tmp_path / 'outputs'}"]


@pytest.fixture(autouse=True)
def hydra_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``main`` sets for its process is undone after each test: the processes of later ones would inherit it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR")


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A front door's ``main`` called with such a command line: exit code, stdout, stderr."""
    from hydra.core.global_hydra import GlobalHydra

    def call(main: Callable[[], None], *argv: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        os.environ.pop("HYDRA_FULL_ERROR", None)
        # Options first: argparse wants the overrides side by side.
        monkeypatch.setattr(sys, "argv", ["selfspec", *sorted(argv, key=lambda word: not word.startswith("-"))])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run(command_line: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """``python -m selfspec.run ...`` in this process."""
    from selfspec.run import main

    return partial(command_line, main)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval of a soak lasts until it has enough answers, however slow this machine is just now.

    The server's memory is read as answers come: it does not grow while the server is stopped, and that is no news.
    """
    from selfspec.soak import load
    from selfspec.stages import soak

    watch, take, enough = soak._watch, load.Load.take, 12

    def answered(calling: load.Load) -> int:
        """Since the last interval's end."""
        lines = (calling.folder / "samples.jsonl").read_bytes()[calling._read :].rpartition(b"\n")[0].splitlines()
        return [json.loads(line)["error"] for line in lines].count(None)

    def tabled(calling: load.Load) -> bool:
        """Whether Locust has written down what it has seen, which it does once a second."""
        path = calling.folder / "locust_stats.csv"
        return path.exists() and "\nGAP," in path.read_text().replace("\r", "")

    def watching(server: "Server", calling: load.Load, until: float, interval: float) -> list[tuple[float, float]]:
        readings, seen = list[tuple[float, float]](), 0
        while time.time() < until or seen < enough or len(readings) < 2 or not tabled(calling):
            latest = watch(server, calling, time.time() + interval / 20, interval)
            if latest and (now := answered(calling)) > seen:
                readings, seen = [*readings, latest[-1]], now
        return readings

    monkeypatch.setattr(soak, "_watch", watching)
    monkeypatch.setattr(load.Load, "take", lambda self, until: take(self, max(until, time.time())))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for a module: making one costs seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which all calls are refused; it is held, so that nothing else on this machine comes to listen there."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a millisecond whenever it is looked at, and never by itself.

    So what is learned from times is the same on every machine.
    """
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
