"""Early-exit drafting inside stock vLLM: the target's first layers draft through its own paged KV cache.

    vllm serve MODEL --speculative-config '{"model": "selfspec.vllm_plugin.EarlyExit", "num_speculative_tokens": 4,
        "selfspec": {"exit_layer": 24, "head": "head.safetensors"}}'

``settings.py`` says what can be asked for, ``hooks.py`` where vLLM is taken hold of, ``docs/vllm.md`` how it works.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """``EarlyExit``, imported when a worker of vLLM's asks for it: who only wants settings does without torch."""
    if name != "EarlyExit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selfspec.vllm_plugin.early_exit import EarlyExit

    return EarlyExit
