"""A peer of ``peers.py``, run by an interpreter that has economize: one request at a time, JSON lines in and out.

The first argument is JSON: ``{"model": folder, "mode": "lookup" or "hybrid", "k": draft tokens a cycle,
"longest": match, "exit_layer": of the hybrid's fallback, "min_confidence": below which that stops}``.
Lines are those of ``worker_vllm.py``.
"""

import json
import os
import sys
import time

import economize
import torch
from economize.techniques.early_exit import EarlyExitConfig
from economize.techniques.hybrid import HybridConfig
from economize.techniques.lookup import LookupConfig
from transformers import AutoModelForCausalLM

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print is no answer
options = json.loads(sys.argv[1])
torch.set_num_threads(options["threads"])
base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()
exit = EarlyExitConfig(options["exit_layer"], head="shared")
modes = {"lookup": LookupConfig(options["longest"]), "hybrid": HybridConfig(exit, max_ngram=options["longest"])}
confidence = options["min_confidence"] if options["mode"] == "hybrid" else None
cycles = economize.DecodeConfig(cycle_length=options["k"] + 1, min_confidence=confidence)
model = economize.apply(base, modes[options["mode"]], decoding=cycles)
answers.write('"ready"\n')
for line in sys.stdin:
    asked = json.loads(line)
    first = 0.0

    def watch(sequence: torch.Tensor) -> bool:
        """Called with what is decoded so far; never stops."""
        global first
        first = first or time.perf_counter()
        return False

    with torch.inference_mode():
        done = model.decode(torch.tensor(asked["prompt"]), asked["new_tokens"], stop=watch)
    seconds = time.perf_counter() - first
    answers.write(json.dumps({"tokens": done.tokens.tolist(), "seconds": seconds}) + "\n")
