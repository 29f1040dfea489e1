"""A real ``vllm serve``: half a minute of the soak stage, and the openai engine's cycles from its metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from plans import planned, run_job

from selfspec import job
from selfspec.data import workload
from selfspec.engine import factory
from selfspec.plan import Plan
from selfspec.soak.server import Server, serving
from selfspec.stages import bench, soak

pytest.importorskip("vllm", reason="vLLM is not installed here; .ci/vllm has it in an environment of its own")
pytestmark = [
    *(pytest.mark.vllm, pytest.mark.real, pytest.mark.filterwarnings("default")),
    pytest.mark.usefixtures("unhurried"),
]

LOAD = ("soak.seconds=30", "soak.interval=10", "soak.warmup=4", "soak.users=3", "soak.new_tokens=24", "soak.prompts=8")
LIMITS = ("soak.sentinels=2", "soak.start_s=1e6", "soak.max_memory_slope=100000", "soak.max_drift=1")
"""What a server gains in its first half minute says nothing, and which prompts fall into which third is chance."""


def made(*overrides: str) -> Plan:
    small = (
        "workload.max_prompt_tokens=64",
        "workload.new_tokens=32",
        "scale=smoke",
        "hardware=cpu_fp32",
        "tracking=none",
    )
    return planned("K=4", *small, *LOAD, *LIMITS, *overrides)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all of these."""
    asked = made("engine=vllm", "engine.eager=true", "draft=ngram", "soak.server=vllm")
    with serving(asked, tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server


def test_half_a_minute_of_load(drafting: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("engine=vllm", "engine.eager=true", "draft=ngram", "soak.server=vllm", "stages=[soak]")
    asked = made(*more, f"output_dir={tmp_path / 'out'}")

    @contextmanager
    def the_one(plan: Plan, log: Path) -> Iterator[Server]:
        yield drafting

    monkeypatch.setattr(soak, "serving", the_one)
    job.check(asked)
    result = run_job(asked, tmp_path / "job")
    assert result["status"] == "finished", result["error"]
    found = result["measurements"]
    assert found["soak/requests"] > 3 and found["soak/error_rate"] == 0
    assert 0 < found["soak/acceptance"] < 1 and found["soak/sentinels_differing"] == 0


def test_cycles_come_over_http(drafting: Server, tmp_path: Path) -> None:
    """What it says of its drafts adds up to the answers that it gave."""
    over = ("engine=openai", "draft=served", f"engine.url={drafting.url}", f"engine.plain_url={drafting.url}")
    asked = made(*over, "stages=[bench]", "scale.prompts=3", "scale.repeats=1", "scale.warmup=0")
    engine: Any = factory.make(asked)
    prompts = workload.select(asked.workload, "bench", 3, 0, lambda text: engine.tokenizer.encode(text, True))
    for one in engine.generate([bench.request(asked, prompt) for prompt in prompts]):
        cycles = one.cycles
        assert sum(c.new_tokens for c in cycles) == len(one.tokens) - 1
        assert all(c.accepted <= c.proposed <= c.k_asked <= 4 and c.new_tokens <= c.accepted + 1 for c in cycles)
        assert any(c.proposed for c in cycles) and 0 < one.ttft_s < one.total_s
