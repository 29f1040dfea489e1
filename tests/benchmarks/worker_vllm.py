"""A peer of ``peers.py``, run by an interpreter that has vLLM: one request at a time, JSON lines in and out.

The first argument is JSON: ``{"model": folder, ...}``, further keyword arguments of ``vllm.LLM``. A line in is
``{"prompt": [ids], "new_tokens": n}``, a line out ``{"tokens": [ids], "seconds": those after the first token}``.
"""

import json
import os
import sys
import time

if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(enable_prefix_caching=False, max_num_seqs=1, **json.loads(sys.argv[1])).llm_engine
    answers.write('"ready"\n')
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        sampling = SamplingParams(
            temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        engine.add_request(str(number), {"prompt_token_ids": asked["prompt"]}, sampling)
        tokens, first = list[int](), 0.0
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens += output.outputs[0].token_ids
            if tokens:
                first = first or time.perf_counter()
        answers.write(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - first}) + "\n")
