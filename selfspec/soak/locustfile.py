"""What a caller of the soak does: one streamed answer after the other, noting when each piece of it came.

    python -m locust -f selfspec/soak/locustfile.py --headless --soak SOAK.json ...

Beside its requests, Locust's tables have rows of type TTFT and GAP (from piece to piece). What each request saw
is also written, as a line of JSON, to the file that the soak's description names.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from locust import HttpUser, events, stats, task

PATH = "/v1/completions"
AFTER_AN_ERROR_S = 0.5
"""Whoever is refused waits a little: a server in trouble is not to be flooded."""
stats.CSV_STATS_FLUSH_INTERVAL_SEC = 0  # so its tables lack the last second at most, however it ends


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_option(parser: Any, **_: Any) -> None:
    parser.add_argument("--soak", type=Path, required=True, help="JSON: prompts, body, headers, samples, timeout_s")


@cache
def _soak(path: Path) -> tuple[dict[str, Any], Iterator[Any]]:
    """What the soak asks for, and its prompts in turn, shared by all callers."""
    soak = json.loads(path.read_bytes())
    return soak, itertools.cycle(soak["prompts"])


class Caller(HttpUser):
    """Reads one answer after the other."""

    def on_start(self) -> None:
        """The API key comes from the environment: it is in no file."""
        self.soak, self.prompts = _soak(self.environment.parsed_options.soak)
        self.client.trust_env = False  # neither a proxy nor a password file has to do with a server of ours
        self.headers = dict(self.soak["headers"])
        if key := os.environ.get("SELFSPEC_API_KEY"):
            self.headers["Authorization"] = f"Bearer {key}"
        self.failed = False

    def wait_time(self) -> float:
        """None, unless the last request failed."""
        return AFTER_AN_ERROR_S if self.failed else 0.0

    @task
    def answer(self) -> None:
        """One streamed answer, read to its end."""
        body = {**self.soak["body"], "prompt": next(self.prompts)}
        seen = Seen()
        options = {"json": body, "headers": self.headers, "stream": True, "timeout": self.soak["timeout_s"]}
        with self.client.post(PATH, catch_response=True, **options) as response:
            try:
                if response.error is None:
                    seen.read(response)
                else:
                    seen.broke(response.error)
            except (OSError, ValueError) as error:  # a connection that breaks, and what is not JSON
                seen.broke(error)
            response.request_meta["response_time"] = seen.total_ms
            response.request_meta["response_length"] = seen.tokens
            self.failed = seen.error is not None
            response.failure(seen.error) if seen.error is not None else response.success()
        for kind, times in (("TTFT", seen.times[:1]), ("GAP", seen.gaps_ms)):
            for milliseconds in times:
                self.environment.events.request.fire(
                    request_type=kind,
                    name=PATH,
                    response_time=milliseconds,
                    response_length=0,
                    exception=None,
                    context={},
                )
        with Path(self.soak["samples"]).open("a") as file:
            file.write(json.dumps(seen.sample()) + "\n")


def _drafts(event: dict[str, Any]) -> dict[str, int]:
    """What vLLM says of its drafts, with an answer's usage."""
    drafts = (event.get("metrics") or {}).get("speculative_decoding")
    return {"proposed": drafts["num_draft_tokens"], "accepted": drafts["num_accepted_draft_tokens"]} if drafts else {}


class ErrorInStream(ValueError):
    """The server broke off, and said so."""


class Seen:
    """What a caller saw of one answer: times in milliseconds since it asked."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.times = list[float]()
        self.total_ms = 0.0
        self.tokens = 0
        self.stats: dict[str, Any] = {}
        self.error: str | None = None

    @property
    def gaps_ms(self) -> list[float]:
        """From piece to piece."""
        return [after - before for before, after in itertools.pairwise(self.times)]

    def read(self, response: Any) -> None:
        """Reads a response to its end, so that its connection serves the next."""
        if response.status_code != 200:
            self.error, self.total_ms = f"HTTP {response.status_code}", self._now()
            response.content  # noqa: B018
            return
        self.error = "the stream ended early"
        for line in response.iter_lines():
            if line.startswith(b"data: "):
                self.total_ms = self._now()
                self._event(line.removeprefix(b"data: "))

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.error = None if self.tokens else "the stream had no tokens"
            return
        event = json.loads(data)
        if "error" in event:
            raise ErrorInStream(event["error"].get("type"))
        if any(choice.get("text") for choice in event.get("choices", ())):
            self.times.append(self.total_ms)
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        self.stats = event.get("selfspec") or _drafts(event) or self.stats

    def broke(self, error: Exception) -> None:
        """Takes what ended the answer, by its type: a message may name ports and addresses."""
        self.error, self.total_ms = type(error).__name__, self._now()

    def sample(self) -> dict[str, Any]:
        """For the soak's file."""
        return {
            "at": time.time(),
            "ttft_ms": self.times[0] if self.times else self.total_ms,
            "total_ms": self.total_ms,
            "gaps_ms": self.gaps_ms,
            "tokens": self.tokens,
            "proposed": self.stats.get("proposed", 0),
            "accepted": self.stats.get("accepted", 0),
            "error": self.error,
        }

    def _now(self) -> float:
        return 1e3 * (time.perf_counter() - self._began)
