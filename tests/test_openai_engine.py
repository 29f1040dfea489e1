"""The openai engine against the real gateway: the same definitions over HTTP give the same tokens and cycles."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hydra.errors import HydraException
from plans import planned, run_job
from serving import Scripted, listening, says, serving

from selfspec import job, refusal
from selfspec.checkpoint import Journal
from selfspec.config import Resume
from selfspec.engine.openai import client as served
from selfspec.errors import ConfigError, StageError
from selfspec.plan import Plan
from selfspec.serve.backend import Chunk
from selfspec.serve.build import Fixed
from selfspec.serve.config import Serve
from selfspec.serve.errors import Failed
from selfspec.serve.gateway import Gateway
from selfspec.serve.metrics import Metrics
from selfspec.types import Request

pytestmark = pytest.mark.slow

Make = Callable[..., Plan]
SMALL = ("hardware.threads=1", "stages=[bench]", "serve.max_model_len=512", "serve.max_prompt_tokens=256")


@pytest.fixture
def make(overrides: list[str], prompts_file: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    return partial(planned, *overrides, *SMALL)


def tokens(made: Plan) -> list[list[list[int]]]:
    with Journal.open(job.place(made), made.id, {}, Resume.require) as journal:
        return [[one["tokens"] for one in record.data["configured"]] for record in journal.records("bench")]


def test_a_served_bench_is_the_local_one(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make("draft=layerskip")
    local = run_job(ours, tmp_path / "local")
    with serving(ours) as drafting, serving(make("draft=none")) as plain:
        over = ("engine=openai", "draft=served", f"engine.url={drafting.url}", f"engine.plain_url={plain.url}/v1")
        theirs = make(*over)
        result = run_job(theirs, tmp_path / "served")
        assert (result["lossless"], result["status"], result["label"]) == ("yes", "finished", "served over HTTP")
        assert tokens(theirs) == tokens(ours)
        assert result["acceptance_by_position"] == local["acceptance_by_position"] != []
        for name in ("acceptance", "acceptance_length", "new_tokens", "prompts", "k_mean"):
            assert result["measurements"][f"bench/{name}"] == local["measurements"][f"bench/{name}"], name
        assert {"bench/speedup", "bench/tok_s", "bench/plain_tok_s", "bench/ttft_ms"} <= set(result["measurements"])
        assert result["provenance"]["extra"] == {"engine": "openai", "model": "tiny"}

        monkeypatch.setattr(served, "_MORE", {})  # as a server that is not ours: text, and nothing of drafts
        foreign = run_job(make(*over, "seed=1"), tmp_path / "foreign")
        assert foreign["lossless"] == "yes" and "bench/acceptance" not in foreign["measurements"]
        batched = run_job(make(*over, "engine.max_batch=3"), tmp_path / "batched")
        assert batched["lossless"] == "yes" and batched["label"] == "served over HTTP batch=3"

        lossy = ("draft=layerskip", "exit_layer=1", "policy.verify=false")
        with serving(make(*lossy)) as broken:
            result = run_job(make(*over, f"engine.url={broken.url}"), tmp_path / "broken")
        assert result["status"] == "failed" and "not lossless" in str(result["error"])

        alone = run_job(make("engine=openai", "draft=none", f"engine.url={plain.url}"), tmp_path / "alone")
        assert (alone["lossless"], alone["label"]) == ("reference", "none over HTTP")


def test_an_answer_that_breaks_off_fails_the_stage() -> None:
    script = says("w1 ", "w2 ")
    for end in (Failed("the engine broke"), ValueError("unforeseen")):
        backend = Scripted([script[0], Chunk("", 1), end])
        gateway = Gateway(Serve("test"), Fixed(["tiny"], backend), None, Metrics())
        with listening(gateway) as url:
            server = served.Server("engine.url", url, None, lambda text, stopped: list(text.encode()))
            with pytest.raises(StageError, match=f"engine.url={url}: "):
                server.answer(Request((1, 2), 4))
            with pytest.raises(StageError, match="max_tokens"):
                server.answer(Request((1, 2), 100_000))


def test_no_server_is_said_in_a_line(make: Make, tmp_path: Path, closed_port: int) -> None:
    url = f"engine.url=http://127.0.0.1:{closed_port}"
    with pytest.raises(ConfigError, match=f"{url}: no OpenAI-compatible server answers: Conn"):
        run_job(make("engine=openai", "draft=none", url), tmp_path / "job")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["engine=openai"], "draft=lsq: engine=openai cannot run it; it runs none, served"),
        (["draft=served"], "draft=served: engine=torch cannot run it"),
        (["engine=openai", "draft=none"], "engine.url=null: engine=openai needs one"),
        (["engine=openai", "draft=served", "engine.url=http://x"], "engine.plain_url=None: draft=served is compared"),
        (["engine=openai", "draft=none", "engine.url=http://x", "engine.plain_url=http://y"], "draft=none with none"),
        (["engine=openai", "draft=none", "engine.url=http://me:secret@x"], "engine.url=http://x: must be .* no cred"),
        (["engine=openai", "draft=none", "engine.url=x"], "engine.url=x: must be http"),
        (["engine.url=http://x"], "engine.url: means nothing to engine=torch; .* engine=openai has it"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(make: Make, more: list[str], says: str) -> None:
    with pytest.raises((ConfigError, HydraException)) as refused:
        make(*more)
    said = refusal.sentence(refused.value)
    assert re.search(says, said) and "secret" not in said
