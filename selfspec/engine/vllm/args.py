"""A plan in vLLM's own arguments: the same for an engine in this process and for ``vllm serve``. Imports no vLLM."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfspec.plan import Plan
from selfspec.vllm_plugin import settings

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": "auto"}


def arguments(plan: Plan, model: Path) -> dict[str, Any]:
    """What decodes plainly.

    Args:
        model: the folder of the weights.
    """
    engine = asdict(plan.engine)
    asked = {
        "model": str(model),
        "dtype": _DTYPES[plan.hardware.dtype.name],
        "seed": plan.seed,
        "quantization": engine.get("quantization"),
        "tensor_parallel_size": engine.get("tensor_parallel"),
        "kv_cache_memory_bytes": int(engine["kv_gib"] * 2**30) if "kv_gib" in engine else None,
        "enforce_eager": engine.get("eager"),
    }
    return {key: value for key, value in asked.items() if value is not None}


def speculation(plan: Plan, drafter: Path | None = None, head: Path | None = None) -> dict[str, Any]:
    """What makes it draft as the plan says, and tell of every draft.

    Args:
        drafter: the folder of the draft's model or heads, where it has one.
        head: the file that the fit stage made, where it has one.
    """
    draft = plan.draft
    if not draft.speculates:
        return {}
    if draft.inside_vllm:
        return settings.arguments(plan, head) | {"per_request_spec_decode_metrics": "detailed"}
    method = draft.vllm(drafter) | {"num_speculative_tokens": plan.controller.k}
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
