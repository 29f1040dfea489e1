"""The gateway on SmolLM2-135M-Instruct: what is served is what the engine generates."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from plans import planned
from serving import serving

from selfspec.engine.torch.engine import TorchEngine
from selfspec.plan import Plan
from selfspec.serve.config import Order
from selfspec.types import Request

pytestmark = pytest.mark.real

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours, one a line. Use emoji.",
    "Repeat after me: one two three one two three one two three.",
    "Schreibe einen Satz über Vögel.",
)
NEW = 24


@pytest.fixture(scope="module")
def made() -> Plan:
    limits = ("serve.max_batch=3", "serve.max_model_len=256")
    return planned("draft=suffix", "draft.corpus=false", "K=4", "hardware=cpu_fp32", *limits)


@pytest.fixture(scope="module")
def engine(made: Plan) -> TorchEngine:
    return TorchEngine(made)


@pytest.mark.parametrize("order", [Order.fcfs, Order.chunked_prefill])
def test_what_is_served_is_what_the_engine_generates(made: Plan, engine: TorchEngine, order: Order) -> None:
    """Four streams at once on three rows; in float32, token for token plain greedy decoding's."""
    import openai

    requests = [Request(tuple(engine.tokenizer.encode(question, chat=True)), NEW) for question in QUESTIONS]
    wanted = [engine.tokenizer.decode(done.tokens) for done in engine.generate(requests, plain=True)]
    with serving(replace(made, serve=replace(made.serve, scheduler=order, chunk=16)), lambda: engine) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=None)

        def ask(question: str) -> tuple[str, Any]:
            asked: Any = {"model": made.model.name, "messages": [{"role": "user", "content": question}]}
            asked |= {"max_tokens": NEW, "temperature": 0, "stream": True, "extra_body": {"selfspec": {"stats": True}}}
            events = list(client.chat.completions.create(**asked))
            texts = [choice.delta.content or "" for event in events for choice in event.choices]
            return "".join(texts), events[-1].selfspec

        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            got = list(pool.map(ask, QUESTIONS))
        client.close()
        assert server.gateway.active == 0 and server.local._load == (0, 0, 0.0)
    assert [text for text, _ in got] == wanted
    assert all(stats["backend"] == "local" and stats["cycles"] > 0 for _, stats in got)
    assert sum(stats["accepted"] for _, stats in got) > 0
