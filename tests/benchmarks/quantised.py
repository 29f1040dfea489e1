"""What int8 weights bring our engine, and what they cost: speed by batch size, and perplexity.

    python tests/benchmarks/quantised.py [--prompts 8] [--new-tokens 48] [--scored 40] [--compared 12]

Both engines decode the same ShareGPT prompts in turn in this process, plainly and with the n-gram draft; the ratio is
per group of prompts decoded together, its interval a bootstrap. Perplexity is of ShareGPT's own answers, under each.
Where texts part is the first token of 128 that greedy decoding chooses otherwise.
"""

import argparse
import math
import time
from statistics import median

from hydra import compose, initialize_config_dir

from selfspec import metrics
from selfspec import plan as plans
from selfspec.data import workload
from selfspec.engine.torch.engine import TorchEngine
from selfspec.run import CONF
from selfspec.types import Request


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--scored", type=int, default=40)
    parser.add_argument("--compared", type=int, default=12)
    options = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        common = ["draft=ngram", "tracking=none"]
        settings = [plans.make(compose("config", [*common, f"engine.weights={name}"])) for name in ("bf16", "int8")]
    full, int8 = engines = [TorchEngine(each) for each in settings]

    def chat(text: str) -> list[int]:
        return full.tokenizer.encode(text, True)

    prompts = workload.select(settings[0].workload, "bench", options.prompts, 0, chat)
    requests = [Request(prompt.tokens, options.new_tokens, ignore_eos=True) for prompt in prompts]
    print(full.describe())

    def seconds(engine: TorchEngine, batch: list[Request], plain: bool) -> float:
        began = time.perf_counter()
        engine.generate(batch, plain=plain, max_batch=len(batch))
        return time.perf_counter() - began

    for engine in engines:
        seconds(engine, requests[:1], True)
    print("draft, requests at once, full / int8 (more than 1: int8 is faster), tok/s of int8")
    for plain in (True, False):
        for size in (1, 4, options.prompts):
            batches = [requests[at : at + size] for at in range(0, len(requests) - size + 1, size)] * (
                3 if size > 1 else 1
            )
            pairs = [(seconds(full, batch, plain), seconds(int8, batch, plain)) for batch in batches]
            ratios = [slow / fast for slow, fast in pairs]
            low, high = metrics.bootstrap_median(ratios, seed=0)
            rate = size * options.new_tokens / median(fast for _, fast in pairs)
            name = "none" if plain else "ngram"
            print(f"{name}, {size}, {median(ratios):.2f}x [{low:.2f}, {high:.2f}], {rate:.0f}", flush=True)

    compared = workload.select(settings[0].workload, "bench", options.compared, 0, chat)
    long = [Request(prompt.tokens, 128, ignore_eos=True) for prompt in compared]
    said = [[each.tokens for each in engine.generate(long, plain=True, max_batch=4)] for engine in engines]
    parted = [metrics.first_difference(*pair) for pair in zip(*said, strict=True)]
    print(f"texts part at token (None: not at all) {parted}")

    answered = workload.select(settings[0].workload, "quality", options.scored, 0, chat, answered=True)
    texts = [(prompt.tokens, full.tokenizer.encode(prompt.answer, False)[:96]) for prompt in answered]
    surprisals = [
        [-sum(engine.score(tokens, [answer], plain=True)[0].logprobs) for tokens, answer in texts] for engine in engines
    ]
    count = sum(len(answer) for _, answer in texts)
    perplexities = [math.exp(sum(each) / count) for each in surprisals]
    print(f"perplexity of {count} tokens of ShareGPT's answers: bf16 {perplexities[0]:.3f}, int8 {perplexities[1]:.3f}")


if __name__ == "__main__":
    main()
