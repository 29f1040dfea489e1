"""What the gateway adds to the time to the first token, at one user.

    python tests/benchmarks/gateway.py [--requests 100] [override ...]

The gateway is a process of its own, on a real model; the client sends one streamed chat request after another over
real HTTP, on one connection. Of each request it subtracts the engine's time (from when the session got it to its
first token, as the answer's own statistics tell) from its own (from before it sends to when it has read the first
text). What is left is HTTP both ways, validation, the chat template, tokenisation, the queue between the event loop
and the engine's thread, detokenisation, and the client. Both of OpenAI's client and of a bare one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from statistics import quantiles
from typing import Any

PLAN = ["draft=suffix", "draft.corpus=false"]
TEXT = "why is the sky blue and how do birds know where to fly in winter when all roads look alike from above"


def bare(port: int) -> Callable[[dict[str, Any]], tuple[float, float]]:
    """Asks by the standard library; gives the client's and the engine's milliseconds."""
    connection = HTTPConnection("127.0.0.1", port)

    def ask(body: dict[str, Any]) -> tuple[float, float]:
        began, first = time.perf_counter(), 0.0
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        stats: dict[str, float] = {}
        for line in connection.getresponse():
            first = first or time.perf_counter()
            if line.startswith(b"data: {"):
                stats = json.loads(line[6:]).get("selfspec") or stats
        return 1e3 * (first - began), stats["ttft_ms"]

    return ask


def official(port: int) -> Callable[[dict[str, Any]], tuple[float, float]]:
    """Asks by OpenAI's client."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def ask(body: dict[str, Any]) -> tuple[float, float]:
        body = {key: value for key, value in body.items() if key != "selfspec"}
        began = time.perf_counter()
        events = iter(client.chat.completions.create(**body, extra_body={"selfspec": {"stats": True}}))
        next(events)
        first = time.perf_counter()
        *_, last = events
        return 1e3 * (first - began), last.selfspec["ttft_ms"]

    return ask


def main() -> None:
    """Prints the median and the tail, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    command = [sys.executable, "-m", "selfspec.serve", "serve.port=0", *(options.overrides or PLAN)]
    environment = {key: value for key, value in os.environ.items() if key != "SELFSPEC_API_KEY"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            ready = server.stdout.readline().strip()
            print(ready)
            port, chance = int(ready.rpartition(":")[2]), random.Random(0)
            with closing(HTTPConnection("127.0.0.1", port)) as connection:
                connection.request("GET", "/v1/models")
                model = json.loads(connection.getresponse().read())["data"][0]["id"]
            clients = {"bare client": bare(port), "openai client": official(port)}
            seen: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
            for turn in range(options.requests + 5):
                for name, ask in clients.items():
                    text = " ".join(chance.choices(TEXT.split(), k=20))
                    body = {
                        **{"model": model, "messages": [{"role": "user", "content": text}], "stream": True},
                        **{"max_tokens": 8, "temperature": 0, "selfspec": {"stats": True}},
                    }
                    took = ask(body)
                    if turn >= 5:  # the first ones warm up both ends
                        seen[name].append(took)
        finally:
            server.send_signal(signal.SIGTERM)
    for name, pairs in seen.items():
        for what, values in (
            ("gateway TTFT", [gateway for gateway, _ in pairs]),
            ("engine TTFT", [engine for _, engine in pairs]),
            ("difference", [gateway - engine for gateway, engine in pairs]),
        ):
            cuts = quantiles(values, n=100)
            print(f"{name:14} {what:13} p50 {cuts[49]:7.2f} ms   p95 {cuts[94]:7.2f}   p99 {cuts[98]:7.2f}")


if __name__ == "__main__":
    main()
