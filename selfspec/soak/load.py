"""Locust, in a process of its own, and what its callers saw."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfspec.files import create, write_atomic
from selfspec.plan import Plan
from selfspec.soak.config import SoakServer
from selfspec.soak.guard import Guarded, guarded
from selfspec.soak.judge import rounded
from selfspec.soak.server import environment
from selfspec.types import Prompt

TABLES = ("stats", "stats_history", "failures")
"""The CSV files that Locust writes, as ``locust_<name>.csv``."""
_LOCUSTFILE = Path(__file__).with_name("locustfile.py")


@dataclass
class Load(Guarded):
    """A running Locust.

    Attributes:
        folder: of its files.
    """

    folder: Path

    def __post_init__(self) -> None:
        self._read = 0
        self._samples: list[dict[str, Any]] = []

    def take(self, until: float) -> dict[str, Any]:
        """What was answered, or failed, up to ``until`` (seconds since the epoch) and was not taken before."""
        with (self.folder / "samples.jsonl").open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._samples += [json.loads(line) for line in whole.splitlines()]
        self._read += len(whole) + (1 if whole else 0)
        taken = [sample for sample in self._samples if sample["at"] <= until]
        self._samples = [sample for sample in self._samples if sample["at"] > until]
        answered = [sample for sample in taken if sample["error"] is None]
        kept = ("ttft_ms", "total_ms", "tokens", "proposed", "accepted")
        return {
            "requests": [{key: sample[key] for key in kept} for sample in answered],
            "gaps": Counter(rounded(gap) for sample in answered for gap in sample["gaps_ms"]),
            "errors": Counter(sample["error"] for sample in taken if sample["error"] is not None),
        }

    def finish(self) -> dict[str, str]:
        """Ends the callers; Locust's own tables, by name."""
        self.end()
        paths = {name: self.folder / f"locust_{name}.csv" for name in TABLES}
        return {name: path.read_text() for name, path in paths.items() if path.exists()}


@contextmanager
def calling(plan: Plan, url: str, prompts: Sequence[Prompt], folder: Path) -> Iterator[Load]:
    """Callers; they are stopped with the block, at the latest."""
    soak, folder = plan.soak, folder.absolute()
    samples = folder / "samples.jsonl"
    for old in folder.glob("locust_*.csv"):
        old.unlink()
    create(samples).close()
    description = {
        "prompts": [prompt.tokens for prompt in prompts],
        "body": body(plan),
        "headers": {"X-Selfspec-Cache": "off"},  # what a cache remembers says nothing of the engine
        "samples": str(samples),
        "timeout_s": soak.timeout_s,
    }
    write_atomic(folder / "soak.json", json.dumps(description))
    command = [
        *(sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--headless", "--host", url),
        *("--users", str(soak.users), "--spawn-rate", str(soak.users)),
        *("--stop-timeout", "1", "--csv", str(folder / "locust"), "--csv-full-history", "--only-summary"),
        *("--exit-code-on-error", "0", "--soak", str(folder / "soak.json")),
    ]
    # Locust also obeys variables and files of the user's, such as a run time that would end the soak: `.locust.conf` at
    # home, `locust.conf` and `pyproject.toml` where it runs.
    kept = {key: value for key, value in environment(plan).items() if not key.startswith("LOCUST_")}
    with guarded(command, folder / "locust.log", kept | {"HOME": str(folder)}, folder) as running:
        yield Load(running.process, running.log, folder)


def body(plan: Plan) -> dict[str, Any]:
    """What every request asks for, less its prompt."""
    sampling = plan.policy.sampling
    asked: dict[str, Any] = {
        "model": plan.serve.model_name or plan.model.name,
        "max_tokens": plan.soak.new_tokens,
        "temperature": sampling.temperature,
        "seed": plan.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": plan.workload.ignore_eos,
    }
    asked |= {key: value for key in ("top_k", "top_p") if (value := getattr(sampling, key)) is not None}
    return asked | ({"selfspec": {"stats": True}} if plan.soak.server is SoakServer.selfspec else {})
