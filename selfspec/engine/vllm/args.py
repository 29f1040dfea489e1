"""A plan in vLLM's own arguments: the same for an engine in this process and for ``vllm serve``. Imports no vLLM."""

import json
from pathlib import Path
from typing import Any

from selfspec.plan import Plan
from selfspec.vllm_plugin import settings
from selfspec.vllm_rules import EARLY

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": "auto"}


def arguments(plan: Plan, model: Path) -> dict[str, Any]:
    """What decodes plainly.

    Args:
        model: the folder of the weights.
    """
    engine = plan.engine
    asked = {
        "model": str(model),
        "dtype": _DTYPES[plan.hardware.dtype.name],
        "seed": plan.seed,
        "quantization": engine.quantization,
        "tensor_parallel_size": engine.tensor_parallel,
        "kv_cache_memory_bytes": None if engine.kv_gib is None else int(engine.kv_gib * 2**30),
        "enforce_eager": engine.eager,
    }
    return {key: value for key, value in asked.items() if value is not None}


def speculation(plan: Plan, drafter: Path | None = None, head: Path | None = None) -> dict[str, Any]:
    """What makes it draft as the plan says, and tell of every draft.

    Args:
        drafter: the folder of the draft's model or heads, where it has one.
        head: the file that the fit stage made, where it has one.
    """
    draft = plan.draft
    if draft.name == "none":
        return {}
    if draft.name in EARLY:
        return settings.arguments(plan, head) | {"per_request_spec_decode_metrics": "detailed"}
    method: dict[str, Any] = {
        "method": draft.name,
        "num_speculative_tokens": plan.controller.K,
    }
    if draft.name == "ngram":
        method |= {"prompt_lookup_max": draft.max_match, "prompt_lookup_min": draft.min_match}
    if draft.name == "suffix":
        method |= {"suffix_decoding_max_tree_depth": draft.max_match}
        method |= {} if draft.cross_request else {"suffix_decoding_max_cached_requests": 0}
    if drafter is not None:
        method |= {"model": str(drafter)}
        if draft.name == "eagle":
            method |= {"method": _eagle(drafter)}
    return {"speculative_config": method, "per_request_spec_decode_metrics": "detailed"}


def flags(asked: dict[str, Any]) -> list[str]:
    """Arguments as the command line of ``vllm serve`` has them."""
    found = []
    for key, value in asked.items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            found += [name] if value else []
        else:
            found += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def _eagle(folder: Path) -> str:
    """EAGLE-3 reads other states of the target than its forerunner, and only its checkpoint says which it is."""
    config = json.loads((folder / "config.json").read_text())
    named = [*(config.get("architectures") or ()), str(config.get("speculators_model_type", ""))]
    return "eagle3" if any("eagle3" in name.lower() for name in named) else "eagle"
