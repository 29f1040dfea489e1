"""A soak of hostility: the real gateway answers honest users rightly, whatever else comes, and keeps none of it."""

import asyncio
import os
from pathlib import Path

import psutil
import pytest
import siege

pytestmark = pytest.mark.real

MODEL = "SmolLM2-135M-Instruct"
PLAN = ("draft=suffix", "draft.corpus=false", "K=4", "hardware=cpu_fp32", "serve.max_model_len=256")


async def test_the_honest_are_answered_rightly_whatever_else_comes(tmp_path: Path) -> None:
    async with siege.serving(tmp_path, os.environ, *PLAN) as served:
        wanted, _ = await siege.honest(served.port, MODEL)  # in float32 nobody else's presence changes a token
        assert all(len(said) == 1 for said in wanted.values()), wanted
        seen = []
        for turn in range(2):
            hostile = siege.Siege(served.port, MODEL, turn)
            (said, _), _ = await asyncio.gather(siege.honest(served.port, MODEL), hostile.run())
            assert said == wanted
            refused(hostile)
            seen.append(await at_rest(served))
    first, last = seen
    assert last["tasks"] <= first["tasks"] and last["descriptors"] <= first["descriptors"], seen
    assert last["memory"] - first["memory"] < 64, seen
    assert served.log.read_text().count("\n") == 1, served.log.read_text()[-3000:]


def refused(hostile: siege.Siege) -> None:
    """Nobody was told what was not his."""
    for kind, status, text in hostile.told:
        assert siege.KEY not in text
        assert status in {"malformed": (400, 413), "rebinding": (403,), "rogue": (200, 400, 500, 503)}[kind], text
    assert {kind for kind, *_ in hostile.told} == {"malformed", "rebinding", "rogue"}


async def at_rest(served: siege.Served) -> dict[str, float]:
    """What it holds when those it waits for have been given up: it hangs into the time-out where one never is."""
    while True:
        found = await siege.settled(served.port)
        connections = [each for each in served.process.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
        if len(connections) <= 1:
            break
        await asyncio.sleep(0.1)
    memory = served.process.memory_info().rss / 2**20
    return {"tasks": found["selfspec_tasks"], "descriptors": served.process.num_fds(), "memory": memory}
