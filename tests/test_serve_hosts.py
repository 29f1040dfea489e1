"""By which names a gateway may be called, and from whose pages: a page may give this machine any name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import pytest
from plans import planned
from serving import Scripted, listening, says

from selfspec.serve.build import Fixed
from selfspec.serve.gateway import Gateway
from selfspec.serve.metrics import Metrics

PATHS = (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/"))
FOREIGN = (
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost"),
    *("localhost@evil.example", "evil.example#localhost", "localhost evil.example", "", "[::1", "[evil]", "0.0.0.0"),
    *("10.0.0.1", "[fe80::1]", "[::ffff:10.0.0.1]", "xn--lcalhost-1ja", "localhost:evil", "http://localhost", "é"),
)
OURS = ("localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.2:9", "[::1]", "[::1]:8000")


@contextmanager
def gateway(key: str | None = None, **settings: Any) -> Iterator[str]:
    serve = replace(planned("engine=fake", "draft=none").serve, **settings)
    with listening(Gateway(serve, Fixed(["m"], Scripted(says("a"))), None, Metrics()), key) as url:
        yield url.removeprefix("http://")


def status(there: str, method: str, path: str, **headers: str) -> int:
    connection = HTTPConnection(there)
    try:
        connection.putrequest(method, path, skip_host="host" in headers)
        body = json.dumps({"model": "m", "prompt": "x"}).encode() if method == "POST" else b""
        for name, value in ({"content-type": "application/json", "content-length": str(len(body))} | headers).items():
            connection.putheader(name, value.encode())
        connection.endheaders(body)
        response = connection.getresponse()
        said = json.loads(response.read()) if response.headers.get_content_type() == "application/json" else {}
        assert response.status != 403 or said["error"]["code"] == "forbidden"
        return response.status
    finally:
        connection.close()


def refused(there: str, **headers: str) -> set[bool]:
    return {status(there, *asked, **headers) in (400, 403) for asked in PATHS}


def test_without_a_key_only_this_machines_names_are_heard() -> None:
    with gateway() as there:
        assert [host for host in FOREIGN if refused(there, host=host) != {True}] == []
        assert [host for host in OURS if refused(there, host=host) != {False}] == []


def test_without_a_key_no_other_sites_page_is_heard() -> None:
    with gateway() as there:
        foreign = (
            "http://evil.example",
            "null",
            "https://localhost.evil.example",
            "http://localhost:1",
            "http://127.0.0.1:1",
            "file://",
        )
        assert [origin for origin in foreign if refused(there, origin=origin) != {True}] == []
        assert refused(there, origin=f"http://{there}") == {False}


def test_names_are_configured() -> None:
    for key in (None, "secret"):
        ours = {} if key is None else {"authorization": f"Bearer {key}"}
        with gateway(key, allowed_hosts=["Gateway.example", "10.0.0.1"], host="192.0.2.1") as there:
            for host in ("gateway.example:80", "10.0.0.1", "localhost", "192.0.2.1"):
                assert refused(there, host=host, origin="https://gateway.example", **ours) == {False}
            assert refused(there, host="evil.example", **ours) == {True}
            assert refused(there, host="10.0.0.1", origin="http://evil.example", **ours) == {True}


def test_with_a_key_any_name_will_do_and_the_key_is_asked_for() -> None:
    with gateway("secret") as there:
        assert refused(there, host="gateway.example", authorization="Bearer secret") == {False}
        assert status(there, "GET", "/v1/models", host="gateway.example") == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_everywhere_is_no_name(host: str) -> None:
    with gateway(host=host) as there:
        assert refused(there, host="[::]" if host == "::" else host) == {True}
