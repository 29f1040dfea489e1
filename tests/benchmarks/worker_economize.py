"""A worker (``worker.py``) run by an interpreter that has economize: it decodes one prompt greedily.

Its options are ``{"model": folder, "mode": "lookup" or "hybrid", "threads": n, "k": draft tokens a cycle, "longest":
match, "exit_layer": of the hybrid's fallback, "min_confidence": below which that stops}``. It is asked as
``worker_vllm.py`` is, and answers with the prompt's tokens and the seconds after the first.
"""

import time
from collections.abc import Callable
from typing import Any

import economize
import torch
from economize.techniques.early_exit import EarlyExitConfig
from economize.techniques.hybrid import HybridConfig
from economize.techniques.lookup import LookupConfig
from transformers import AutoModelForCausalLM
from worker import answer


def make(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Loads the model."""
    torch.set_num_threads(options["threads"])
    base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()
    exit = EarlyExitConfig(options["exit_layer"], head="shared")
    modes = {"lookup": LookupConfig(options["longest"]), "hybrid": HybridConfig(exit, max_ngram=options["longest"])}
    confidence = options["min_confidence"] if options["mode"] == "hybrid" else None
    cycles = economize.DecodeConfig(cycle_length=options["k"] + 1, min_confidence=confidence)
    model = economize.apply(base, modes[options["mode"]], decoding=cycles)

    @torch.inference_mode()
    def decode(asked: dict[str, Any]) -> dict[str, Any]:
        (prompt,), first = asked["prompts"], 0.0

        def watch(sequence: torch.Tensor) -> bool:
            """Called with what is decoded so far; never stops."""
            nonlocal first
            first = first or time.perf_counter()
            return False

        done = model.decode(torch.tensor(prompt), asked["new_tokens"], stop=watch)
        return {"tokens": [done.tokens.tolist()], "seconds": time.perf_counter() - first}

    return decode


answer(make)
