"""Connections that ask for nothing: they hold nothing for long, keep nobody out, and fill no log."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from served import GOOD, HEAD, LONG, Gateway, ask, serving

pytestmark = pytest.mark.slow

FEW = 200
"""Descriptors, of which the gateway has some fifty in use."""
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
UNSENT = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF_BODY = HEAD + b"Content-Length: 1000\r\n\r\n{"
BEGINNINGS = (b"", b"G", HALF, HALF_BODY, UNSENT, METRICS + HALF, METRICS * 400)


def connected(gateway: Gateway, sent: bytes) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.settimeout(60)
    connection.connect(gateway[:2])
    with suppress(OSError), ExitStack() as stack:
        connection.setblocking(False)
        stack.callback(connection.settimeout, 60)
        connection.send(sent)
    return connection


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Iterator[Gateway]:
    """One that waits for ever, and has few descriptors."""
    with serving(tmp_path_factory.mktemp("patient"), prompts_file, 1e6, descriptors=FEW) as started:
        yield started


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Iterator[Gateway]:
    """One that hardly waits."""
    with serving(tmp_path_factory.mktemp("impatient"), prompts_file, 0.5) as started:
        yield started


@pytest.mark.parametrize("sent", BEGINNINGS, ids=range(len(BEGINNINGS)))
def test_the_silent_keep_nobody_out(patient: Gateway, sent: bytes) -> None:
    """However many they are, at once and one after the other; the system's limit is never met."""
    with ExitStack() as stack:
        for _ in range(3 * FEW):
            stack.enter_context(connected(patient, sent))
        for _ in range(5):
            assert ask(patient, b"", "/health", "GET")[0] == 200
            assert ask(patient, GOOD)[0] == 200
        assert patient.process.num_fds() < FEW
    told(patient, 0)


def told(gateway: Gateway, lines: int) -> None:
    """The log, but for the line that says that it is ready."""
    assert len(gateway.log.read_text().splitlines()) <= 1 + lines, gateway.log.read_text()[-3000:]


@pytest.mark.parametrize("sent", BEGINNINGS, ids=range(len(BEGINNINGS)))
def test_whoever_says_nothing_more_is_given_up(impatient: Gateway, sent: bytes) -> None:
    until_closed(impatient, lambda: connected(impatient, sent))


@pytest.mark.parametrize("sent", [HALF, UNSENT], ids=["head", "body"])
def test_a_trickle_is_given_up(impatient: Gateway, sent: bytes) -> None:
    """A byte now and then is no sign of life."""

    def trickling() -> socket.socket:
        connection = connected(impatient, sent)

        def trickle() -> None:
            with suppress(OSError):
                while True:
                    connection.send(b"x")
                    time.sleep(0.02)

        threading.Thread(target=trickle, daemon=True).start()
        return connection

    until_closed(impatient, trickling)


def until_closed(gateway: Gateway, connect: Callable[[], socket.socket]) -> None:
    """It hangs into the test's time-out where a connection is left open."""
    connections = [connect() for _ in range(20)]
    ours = {one.getsockname()[1] for one in connections}
    while ours & {each.raddr.port for each in gateway.process.net_connections("tcp") if each.raddr}:
        time.sleep(0.02)
    for connection in connections:
        connection.close()
    assert ask(gateway, GOOD)[0] == 200
    told(gateway, 0)


def test_a_system_without_descriptors_is_worth_a_line(tmp_path: Path, prompts_file: Path) -> None:
    """A minute; and it serves on."""
    with serving(tmp_path, prompts_file, 1e6, descriptors=40) as gateway:
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(connected(gateway, b""))
            assert ask(gateway, GOOD)[0] == 200
        told(gateway, 1)


def test_it_stops_quietly_whoever_is_connected(tmp_path: Path, prompts_file: Path) -> None:
    body = json.dumps(LONG).encode()
    streams = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with serving(tmp_path, prompts_file, 1e6, "serve.drain_s=0.1") as gateway, ExitStack() as stack:
        for sent in (*BEGINNINGS, METRICS * 2000, streams) * 3:
            stack.enter_context(connected(gateway, sent))
        assert ask(gateway, b"", "/health", "GET")[0] == 200
        gateway.process.terminate()
        gateway.process.wait()
        told(gateway, 0)


def test_so_many_from_one_address(tmp_path: Path, prompts_file: Path) -> None:
    """Those that are being answered stay; others take each other's place."""
    more = ("serve.max_connections_per_client=3", "serve.max_connections=5")
    with serving(tmp_path, prompts_file, 1e6, *more) as gateway, ExitStack() as stack:
        gateway.hold.touch()
        body = json.dumps(GOOD).encode()
        asking = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        busy = [stack.enter_context(connected(gateway, asking)) for _ in range(2)]
        assert ask(gateway, b"", "/health", "GET")[0] == 200  # they came before it
        silent = [stack.enter_context(connected(gateway, b"")) for _ in range(3)]
        assert [one.recv(1) for one in silent[:2]] == [b"", b""]
        third = stack.enter_context(connected(gateway, asking))
        assert silent[2].recv(1) == b""
        while is_answered(gateway):  # until all three are busy, and there is no room
            time.sleep(0.02)
        gateway.hold.unlink()
        for one in (*busy, third):
            assert one.recv(15) == b"HTTP/1.1 200 OK"
        told(gateway, 0)


def is_answered(gateway: Gateway) -> bool:
    """Whether there is room for one more."""
    try:
        return bool(ask(gateway, b"", "/health", "GET")[0] == 200)
    except OSError:
        return False


@pytest.mark.parametrize("rudely", [False, True])
def test_those_who_leave_in_the_middle_are_not_worth_a_line(patient: Gateway, rudely: bool) -> None:
    body = json.dumps(LONG).encode()
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(12):
                asking = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
                connection = stack.enter_context(connected(patient, asking))
                if rudely:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                assert connection.recv(8)
    while "batch_rows 0" not in ask(patient, b"", "/metrics", "GET")[1]:
        time.sleep(0.02)
    told(patient, 0)
