"""On SmolLM2-135M-Instruct and ShareGPT: golden tokens, losslessness in half width, and a fit that is worth it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from selfspec import heads, plan, workload
from selfspec.engine.torch_engine import TorchEngine
from selfspec.metrics import first_difference
from selfspec.run import CONF
from selfspec.types import Request

pytestmark = pytest.mark.real
EXIT, NEW = 24, 16
GOLDEN = {
    "What is the capital of France?": [504, 3575, 282, 4649, 314, 7042, 30, 2],
    "Explain why the sky is blue.": [
        *(504, 6376, 314, 4461, 30, 657, 506, 253, 4959, 1909, 281, 2092, 284, 984, 338, 553),
    ],
}
Maker = Callable[..., TorchEngine]


@pytest.fixture(scope="module")
def engine() -> Iterator[Maker]:
    def make(*overrides: str) -> TorchEngine:
        cut = ("workload.max_prompt_tokens=64", f"exit_layer={EXIT}", "hardware=cpu_fp32")
        return TorchEngine(plan.make(compose("config", [*cut, *overrides])))

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield make


@pytest.fixture(scope="module")
def head(engine: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest fit: 20 prompts, 32 tokens each, and for so few a stronger ridge."""
    made, path = (
        engine("draft=lsq", "draft.ridge=0.1", "scale=smoke"),
        tmp_path_factory.mktemp("head") / "head.safetensors",
    )
    scale = made.plan.scale
    chosen = workload.select(made.plan.workload, "fit", scale.fit_prompts, 0, lambda text: made.encode(text, True))
    prompts = [prompt.tokens for prompt in chosen]
    answers = made.answer(prompts, scale.fit_new_tokens)
    made.fit(list(zip(prompts, answers, strict=True)), path, {"model": made.plan.model_id, "exit_layer": EXIT})
    return path


def test_golden_tokens(engine: Maker) -> None:
    """Recorded once; transformers gives the same."""
    import torch
    from transformers import AutoModelForCausalLM

    made = engine("draft=none")
    theirs = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    for text, golden in GOLDEN.items():
        prompt = made.encode(text, chat=True)
        got = made.generate(Request(tuple(prompt), NEW), plain=True)
        ids = torch.tensor([prompt])
        answer = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert list(got.tokens) == answer[0, len(prompt) :].tolist() == golden


def test_a_fitted_head_agrees_more_often_than_the_raw_exit(head: Path) -> None:
    facts = heads.facts(head)
    assert facts["exit_layer"] == EXIT and facts["heldout_tokens"] > 50
    assert facts["agreement"] > facts["raw_agreement"] + 0.05


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_speculation_is_lossless(engine: Maker, head: Path, dtype: str) -> None:
    made = engine("draft=lsq", "gate=varH", "tau_v=4", f"hardware.dtype={dtype}")
    made.use_head(head)
    prompts = workload.select(made.plan.workload, "bench", 2, 0, lambda text: made.encode(text, True))
    drafted = accepted = 0
    for prompt in prompts:
        request = Request(prompt.tokens, NEW)
        plain, got = made.generate(request, plain=True), made.generate(request)
        at = first_difference(plain.tokens, got.tokens)
        if at is not None:
            assert dtype == "bf16" and at < min(len(plain.tokens), len(got.tokens))
            context = (*prompt.tokens, *plain.tokens[:at])
            assert made.compare(context, plain.tokens[at], got.tokens[at]).explains
        drafted += sum(cycle.proposed for cycle in got.cycles)
        accepted += sum(cycle.accepted for cycle in got.cycles)
    assert 0 < accepted < drafted
