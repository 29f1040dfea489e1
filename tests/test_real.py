"""On SmolLM2-135M-Instruct and ShareGPT: golden tokens, losslessness in half width, and a fit that is worth it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from plans import planned

from selfspec import heads
from selfspec.data import workload
from selfspec.engine.torch.engine import TorchEngine
from selfspec.metrics import first_difference
from selfspec.types import Request

pytestmark = pytest.mark.real
EXIT, NEW = 24, 16
GOLDEN = {
    "What is the capital of France?": [504, 3575, 282, 4649, 314, 7042, 30, 2],
    "Explain why the sky is blue.": [
        *(504, 6376, 314, 4461, 30, 657, 506, 253, 4959, 1909, 281, 2092, 284, 984, 338, 553),
    ],
}
LSQ = "draft=lsq draft.ridge=0.1 gate=varH tau_v=4"
DRAFTS = (
    LSQ,
    "draft=medusa draft.ridge=0.1",
    "draft=eagle draft.ridge=0.1",
    "draft=ngram",
    "draft=suffix",
    "draft=hybrid draft.ridge=0.1",
)
Maker = Callable[..., TorchEngine]


@pytest.fixture(scope="module")
def engine() -> Maker:
    cut = ("workload.max_prompt_tokens=64", f"exit_layer={EXIT}", "hardware=cpu_fp32")
    return lambda *overrides: TorchEngine(planned(*cut, *overrides))


@pytest.fixture(scope="module")
def pairs(engine: Maker) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest fit data: 20 prompts and the model's own answers, 32 tokens each."""
    made = engine("draft=none", "scale=smoke")
    scale = made.plan.scale
    chosen = workload.select(
        made.plan.workload, "fit", scale.fit_prompts, 0, lambda text: made.tokenizer.encode(text, True)
    )
    requests = [Request(prompt.tokens, scale.fit_new_tokens) for prompt in chosen]
    answers = made.generate(requests, plain=True, max_batch=len(requests))
    return [(request.tokens, answer.tokens) for request, answer in zip(requests, answers, strict=True)]


@pytest.fixture(scope="module")
def fitted(engine: Maker, pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A head for a draft, from so little data with a stronger ridge; made once."""

    @cache
    def fit(draft: str) -> Path:
        made, path = engine(*draft.split()), tmp_path_factory.mktemp("head") / "head.safetensors"
        made.fit(pairs, path, {"model": made.plan.model_id, "exit_layer": made.plan.draft.get("exit_layer")})
        return path

    return fit


def test_golden_tokens(engine: Maker) -> None:
    """Recorded once; transformers gives the same."""
    import torch
    from transformers import AutoModelForCausalLM

    made = engine("draft=none")
    theirs = AutoModelForCausalLM.from_pretrained(made.weights.folder, dtype=torch.float32)
    for text, golden in GOLDEN.items():
        prompt = made.tokenizer.encode(text, chat=True)
        (got,) = made.generate([Request(tuple(prompt), NEW)], plain=True)
        ids = torch.tensor([prompt])
        answer = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert list(got.tokens) == answer[0, len(prompt) :].tolist() == golden


def test_a_fitted_head_agrees_more_often_than_the_raw_exit(fitted: Callable[[str], Path]) -> None:
    facts = heads.facts(fitted(LSQ))
    assert facts["exit_layer"] == EXIT and facts["heldout_tokens"] > 50
    assert facts["agreement"] > facts["raw_agreement"] + 0.05


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_speculation_is_lossless(engine: Maker, fitted: Callable[[str], Path], draft: str, dtype: str) -> None:
    made = engine(*draft.split(), f"hardware.dtype={dtype}", "engine.max_batch=2")
    if made.plan.draft.fitted:
        made.use_head(fitted(draft))
    prompts = workload.select(made.plan.workload, "bench", 2, 0, lambda text: made.tokenizer.encode(text, True))
    requests = [Request(prompt.tokens, NEW) for prompt in prompts]
    drafted = accepted = 0
    together = made.generate(requests)
    for request, batched in zip(requests, together, strict=True):
        (plain,) = made.generate([request], plain=True)
        for got in (batched, *made.generate([request])):
            at = first_difference(plain.tokens, got.tokens)
            if at is not None:
                assert dtype == "bf16" and at < min(len(plain.tokens), len(got.tokens))
                context = (*request.tokens, *plain.tokens[:at])
                assert made.ties.compare(context, plain.tokens[at], got.tokens[at]).explains
            drafted += sum(cycle.proposed for cycle in got.cycles)
            accepted += sum(cycle.accepted for cycle in got.cycles)
    assert accepted < drafted and (accepted > 0 or not made.plan.draft.fitted), (
        "in so few tokens a lookup may find none"
    )
