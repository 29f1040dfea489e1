"""A worker (``worker.py``) run by an interpreter that has vLLM: it decodes prompts together, greedily, to one length.

Its options are keyword arguments of ``vllm.LLM``. It is asked ``{"prompts": [[ids], ...], "new_tokens": n}``, and
answers with the tokens of each prompt; how many came after all had one, in how many seconds and steps; and what our
plugin counted of its drafts, where it drafts in this process.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from worker import answer


def make(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Starts vLLM."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(**options).llm_engine
    core = getattr(engine.engine_core, "engine_core", None)  # it may be in a process of its own
    runner = None if core is None else core.model_executor.driver_worker.worker.model_runner
    record = getattr(getattr(runner, "drafter", None), "record", None)
    asked_before = 0

    def decode(asked: dict[str, Any]) -> dict[str, Any]:
        nonlocal asked_before
        asked_before += 1
        before = Counter(record.totals if record else {})
        how = SamplingParams(
            temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        for place, prompt in enumerate(asked["prompts"]):
            engine.add_request(f"{asked_before}.{place}", {"prompt_token_ids": prompt}, how)
        tokens: list[list[int]] = [[] for _ in asked["prompts"]]
        counted, steps, first = 0, 0, 0.0
        while engine.has_unfinished_requests():
            for output in engine.step():
                new = output.outputs[0].token_ids
                tokens[int(output.request_id.split(".")[1].split("-")[0])] += new
                counted += len(new) if first else 0
            steps += bool(first)
            if not first and all(tokens):
                first = time.perf_counter()
        seconds = time.perf_counter() - first
        after = Counter(record.totals if record else {})
        totals = {key: after[key] - before[key] for key in after}
        return {"tokens": tokens, "counted": counted, "seconds": seconds, "steps": steps, "totals": totals}

    return decode


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    answer(make)
