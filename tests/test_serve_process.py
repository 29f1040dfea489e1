"""The gateway as a process: what it says when it is ready, how it stops, and what it refuses before it starts."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from plans import planned
from serving import Gated

from selfspec.plan import Plan
from selfspec.serve import __main__ as door
from selfspec.serve import build, server
from selfspec.serve.local import Local

pytestmark = pytest.mark.slow

FAKE = ("engine=fake", "draft=layerskip", "model.name=tiny", "model.layers=16")


@contextmanager
def answering(port: int, method: str, path: str, body: str | None = None) -> Iterator[HTTPResponse]:
    """An answer that is still coming."""
    with closing(HTTPConnection("127.0.0.1", port)) as connection:
        connection.request(method, path, body, {"content-type": "application/json"})
        with connection.getresponse() as response:
            yield response


def called(port: int, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    """Status and body."""
    with answering(port, method, path, body) as response:
        return response.status, response.read().decode()


def asked(**more: object) -> str:
    return json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 30, "stream": True} | more)


def test_a_process_says_where_it_is_and_stops_when_told_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selfspec.serve", *FAKE, "serve.port=0"]
    environment = {key: value for key, value in os.environ.items() if key != build.KEY}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        ready = process.stdout.readline()
        found = re.fullmatch(r"serving layerskip1 K=4 on http://127\.0\.0\.1:(\d+)\n", ready)
        if not found:
            process.kill()
        assert found, ready + process.stderr.read()
        assert called(int(found[1]), "GET", "/health") == (200, '{"status":"ok"}')
        assert called(int(found[1]), "POST", "/v1/completions", asked())[1].endswith("data: [DONE]\n\n")
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate()
    assert (process.returncode, rest, errors) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


class TestDraining:
    def run(self, monkeypatch: pytest.MonkeyPatch, made: Plan, client: Callable[[int, Gated], None]) -> None:
        """The server in the main thread, which alone gets signals, and what is done to it in another."""
        engine, failures = Gated(made), list[BaseException]()

        @contextmanager
        def listening(settings: object) -> Iterator[socket.socket]:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen()
                thread = threading.Thread(target=work, args=(listener.getsockname()[1],))
                thread.start()
                yield listener
            thread.join()

        def work(port: int) -> None:
            try:
                while called(port, "GET", "/health")[0] != 200:
                    time.sleep(0.001)
                client(port, engine)
            except BaseException as error:
                failures.append(error)
                engine.go_on(999)
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(server, "_listening", listening)
        monkeypatch.setattr(build, "engine", lambda plan: engine)
        server.run(made)
        assert not failures, failures

    def test_a_signal_is_heard_whatever_else_wakes_the_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It hangs into the test's time-out where the signal is lost."""
        loops, held = list[asyncio.AbstractEventLoop](), threading.Event()
        monkeypatch.setattr(server, "quiet", loops.append)

        def client(port: int, engine: Gated) -> None:
            loops[0].call_soon_threadsafe(held.wait)
            for _ in range(5000):
                loops[0].call_soon_threadsafe(int)
            os.kill(os.getpid(), signal.SIGTERM)
            held.set()

        self.run(monkeypatch, planned(*FAKE), client)

    def test_answers_that_have_begun_are_ended_and_no_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def client(port: int, engine: Gated) -> None:
            engine.go_on(2)
            with answering(port, "POST", "/v1/completions", asked()) as response:
                begun = response.readline()
                assert response.status == 200 and begun.startswith(b"data: ")
                os.kill(os.getpid(), signal.SIGTERM)
                while (health := called(port, "GET", "/health"))[0] == 200:
                    time.sleep(0.001)
                assert health == (503, '{"status":"draining"}')
                status, got = called(port, "POST", "/v1/completions", asked())
                assert (status, json.loads(got)["error"]["code"]) == (503, "unavailable")
                engine.go_on(999)
                rest = (begun + response.read()).decode()
            assert rest.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in rest

        self.run(monkeypatch, planned(*FAKE, "serve.drain_s=1e6"), client)

    def test_draining_ends_after_drain_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened, locals_made = build.local, list[Local]()

        def noted(*args: Any) -> Local:
            locals_made.append(opened(*args))
            return locals_made[0]

        def client(port: int, engine: Gated) -> None:
            engine.go_on(2)
            with answering(port, "POST", "/v1/completions", asked()) as response:
                assert response.readline().startswith(b"data: ")
                engine.waits.wait()  # in the middle of the answer
                os.kill(os.getpid(), signal.SIGTERM)
                while locals_made[0]._asked.empty():  # until it is told to stop
                    time.sleep(0.001)
                engine.go_on(999)
                *_, last = response.read().decode().strip().split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"

        monkeypatch.setattr(build, "local", noted)
        self.run(monkeypatch, planned(*FAKE, "serve.drain_s=0.05"), client)


class TestRefusals:
    @pytest.fixture
    def refused(self, command_line: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
        """The one line that ``python -m selfspec.serve ...`` leaves with."""
        monkeypatch.chdir(tmp_path)

        def call(*argv: str) -> str:
            code, out, error = command_line(door.main, *argv)
            assert (code, out, error.count("\n")) == (2, "", 1) and list(tmp_path.iterdir()) == []
            return str(error)

        return call

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (("serve.scheduler=lifo",), "serve.scheduler=lifo"),
            (("serve.prot=1",), "did you mean serve.port?"),
            (("serve.port=70000",), "serve.port=70000: must be from 0 to 65535"),
            (("engine=hf", "draft=none"), "engine=hf: cannot be served; allowed are fake, torch, vllm"),
            (("-m", *FAKE), "--multirun"),
            (("draft=none", "model.source=file:/nowhere", "model.sha256=null", "serve.port=0"), "/nowhere"),
            (("serve.host=256.0.0.1", *FAKE), "serve.host=256.0.0.1"),
            (("serve.allowed_hosts=['gateway:80']", *FAKE), "serve.allowed_hosts: gateway:80: must be a name"),
            (("serve.allowed_hosts=['http://x']", *FAKE), "serve.allowed_hosts: http://x: must be a name"),
        ],
    )
    def test_bad_input_costs_one_line(self, refused: Callable[..., str], argv: tuple[str, ...], says: str) -> None:
        assert says in refused(*argv)

    def test_a_port_that_is_taken_is_refused(self, refused: Callable[..., str]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert f"serve.port={port}: cannot listen there" in refused(*FAKE, f"serve.port={port}")


def test_the_config_is_shown_without_loading_anything(tmp_path: Path) -> None:
    show = (
        "import sys; from selfspec.serve.__main__ import main; main(); assert not {'torch', 'fastapi'} & {*sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", show, "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "max_model_len: 1024" in done.stdout, done.stderr


def test_the_key_is_in_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(*FAKE, "serve.api_key=hush-hush")
    monkeypatch.delenv(build.KEY, raising=False)
    assert build.api_key(made) == "hush-hush" and "hush" not in json.dumps(made.settings())
    monkeypatch.setenv(build.KEY, "other")
    assert build.api_key(made) == "other"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_while_it_loads(tmp_path: Path, signum: int) -> None:
    """Though its engine's thread is in C++, which nobody can tell to stop."""
    command = [sys.executable, str(Path(__file__).with_name("planted.py")), "loads", *FAKE, "serve.port=0"]
    planted = {"PLANTED": str(tmp_path / "loading")}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | planted
    ) as process:
        while not (tmp_path / "loading").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signum)
        assert (*process.communicate(), process.returncode) == ("", "", 0)
