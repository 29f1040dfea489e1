"""Shared by the tests of early exit inside vLLM: tiny random models, and vLLM in this process.

Attention on a CPU has no heads smaller than 32 numbers, so the models are not conftest's. Engines are kept until
the process ends: when the first one goes, vLLM takes down what all of them share.
"""

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

LAYERS, VOCABULARY = 6, 64
BLOCK = 32
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_KEPT: list[Any] = []


@cache
def model_folder(family: str, parent: Path) -> Path:
    """Random weights of one of vLLM's families; late layers do less than early ones, so that exits are often right."""
    import transformers

    name = family.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = getattr(transformers, family)(config)
        for number, layer in enumerate(model.model.layers):
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix.data *= 2.5 / (number + 1)
        model.save_pretrained(parent / family)
    return parent / family


def prompts(count: int = 8) -> list[list[int]]:
    """Of 5 to 60 tokens; every other one begins with the same two blocks."""
    chance = random.Random(0)
    shared = [chance.randrange(2, VOCABULARY) for _ in range(2 * BLOCK)]
    own = [[chance.randrange(2, VOCABULARY) for _ in range(5 + 8 * i)] for i in range(count)]
    return [shared + prompt if i % 2 else prompt for i, prompt in enumerate(own)]


def look_at(family: str) -> None:
    """Imports a model's code here and now; vLLM would do it for each model in a process of its own, for 10 seconds."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(family, ModelRegistry.models[family].load_model_cls())


def leave_unswept(engine: Any) -> None:
    """Spares the process's end what vLLM does of every engine then: to search all memory for garbage, for 2 seconds."""
    engine.engine_core._finalizer.atexit = False


class Inside:
    """vLLM in this process; with ``settings``, an early exit drafts in it."""

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None, k: int = 4, **options: Any) -> None:
        speculative = {"model": "selfspec.vllm_plugin.EarlyExit", "num_speculative_tokens": k, "selfspec": settings}
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": 1 << 24,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        drafted = {} if settings is None else {"speculative_config": speculative}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in IN_PROCESS.items():
                patch.setenv(name, value)
            patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # which vLLM takes away
            from vllm import LLM

            look_at(folder.name)
            self.llm = LLM(model=str(folder), **(defaults | drafted | options))
        self.core: Any = self.llm.llm_engine.engine_core.engine_core
        self.runner: Any = self.core.model_executor.driver_worker.worker.model_runner
        _KEPT.append(self)
        leave_unswept(self.llm.llm_engine)

    def drafting(self, settings: dict[str, Any]) -> "Inside":
        """Drafts so from now on: with another proposer, made and given the model as vLLM does, and the same vLLM."""
        from selfspec.vllm_plugin import EarlyExit

        config = self.runner.vllm_config
        config.additional_config["selfspec"] = settings
        proposer = EarlyExit(config)
        proposer.load_model(self.runner.model)
        self.runner.drafter = proposer
        return self

    def __call__(self, asked: Sequence[Sequence[int]], new: int | Sequence[int] = 40, **how: Any) -> list[list[int]]:
        """The new tokens of each prompt."""
        from vllm import SamplingParams

        counts = [new] * len(asked) if isinstance(new, int) else new
        sampling = [SamplingParams(**{"temperature": 0, "ignore_eos": True} | how, max_tokens=n) for n in counts]
        answers = self.llm.generate([{"prompt_token_ids": list(prompt)} for prompt in asked], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    @property
    def totals(self) -> Counter[str]:
        """What has been drafted."""
        totals: Counter[str] = self.runner.drafter.record.totals
        return totals

    def metric(self, name: str) -> float:
        """One of vLLM's own counts."""
        return float(next(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}"))

    def cached(self) -> dict[Any, list[Tensor]]:
        """Keys and values of every block that is cached as a prefix, by what it holds; one tensor a layer."""
        pool = self.core.scheduler.kv_cache_manager.block_pool
        blocks = {block.block_hash: block.block_id for block in pool.blocks if block.block_hash is not None}
        return {what: [layer[number].clone() for layer in self.runner.kv_caches] for what, number in blocks.items()}


def take_all(
    drafted: Tensor, counts: list[int], most: int, _: Any, __: Any, ___: Any, bonus: Tensor, *____: Any, **_____: Any
) -> Tensor:
    """A sampler that lets every draft token stand."""
    tokens = torch.full((len(counts), most + 1), -1, dtype=torch.int32)
    for row, (own, last) in enumerate(zip(torch.split(drafted, counts), bonus.flatten(), strict=True)):
        tokens[row, : len(own)], tokens[row, len(own)] = own, last
    return tokens
