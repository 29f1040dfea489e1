"""Plain greedy decoding against transformers' ``generate``, and against what memory bandwidth allows.

    python tests/benchmarks/plain.py [--prompts 8] [--new-tokens 64] [--rounds 3]

The two decode the same ShareGPT prompts in turn, in this process, in the same dtype; the ratio is per
prompt, its interval a bootstrap over prompts. The floor is the time to read all weights once, at the
bandwidth that the model's own matrix-vector products reach when nothing else is done.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from selfspec import metrics
from selfspec import plan as plans
from selfspec.data import workload
from selfspec.engine.torch.engine import TorchEngine
from selfspec.model.linear import linear, packed, plain
from selfspec.model.tree import Tree
from selfspec.run import CONF
from selfspec.types import Request


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = plans.make(compose("config", ["draft=none", "tracking=none"]))
    engine = TorchEngine(settings)
    local, encode = engine.weights, partial(engine.tokenizer.encode, chat=True)
    theirs = AutoModelForCausalLM.from_pretrained(local.folder, dtype=local.dtype).to(local.device).eval()
    prompts = workload.select(settings.workload, "bench", options.prompts, 0, encode)

    def ours(tokens: tuple[int, ...]) -> None:
        engine.generate([Request(tokens, options.new_tokens, ignore_eos=True)], plain=True)

    def transformers(tokens: tuple[int, ...]) -> None:
        ids = torch.tensor([tokens], device=engine.weights.device)
        length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
        theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)

    ours(prompts[0].tokens), transformers(prompts[0].tokens)
    ratios, rates = [], []
    for prompt in prompts:
        pairs = [(timed(ours, prompt.tokens), timed(transformers, prompt.tokens)) for _ in range(options.rounds)]
        ratios.append(median(slow / fast for fast, slow in pairs))
        rates.append(options.new_tokens / median(fast for fast, _ in pairs))
    low, high = metrics.bootstrap_median(ratios, seed=0)
    step = 1 / median(rates)
    weights, head = products(engine)
    print(engine.describe())
    print(f"ours / transformers, end to end: {median(ratios):.2f}x [{low:.2f}, {high:.2f}]")
    print(f"ours: {median(rates):.1f} tok/s, {1e3 * step:.2f} ms a token")
    print(f"  matrix products alone, nothing between them: {1e3 * weights:.2f} ms ({weights / step:.0%} of a token)")
    print(f"  of which the language-model head: {1e3 * head:.2f} ms")
    others = {name: products(engine, lay_out)[0] for name, lay_out in LAYOUTS.items()}
    print("  the same by layout of the weights, ms:", {name: round(1e3 * each, 2) for name, each in others.items()})
    print(
        "  a pass at 200 tokens of context, ms by rows:", {rows: round(1e3 * a_pass(engine, rows), 2) for rows in ROWS}
    )
    size = sum(
        plain(w).numel() * engine.weights.dtype.itemsize for layer in engine.model.layers for w in matrices(layer)
    )
    size += engine.model.lm_head.numel() * engine.model.lm_head.element_size()
    print(f"  weights read: {size / 1e6:.0f} MB a token, {size / weights / 1e9:.1f} GB/s while they are")


ROWS = (1, 4, 8, 12, 16)
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as stored": plain,
    "oneDNN's": lambda weight: packed(plain(weight), own=False),
}


@torch.inference_mode()
def a_pass(engine: TorchEngine, rows: int, rounds: int = 30) -> float:
    """Median seconds of the whole model over a binary tree of so many tokens."""
    model, cache = engine.model, engine.model.new_cache(256)
    index, prompt = cache.admit(), Tree.chain(range(200))
    at = cache.place([prompt])
    model.run(model.embed(prompt.tokens, at), cache, at, 0, model.shape.layers)
    cache.commit(index, range(len(prompt)))
    tree, spent = Tree([1] * rows, [-1, *((node - 1) // 2 for node in range(1, rows))]), []
    for _ in range(rounds):
        begin = time.perf_counter()
        at = cache.place([tree])
        model.logits(model.norm(model.run(model.embed(tree.tokens, at), cache, at, 0, model.shape.layers)))
        spent.append(time.perf_counter() - begin)
    return median(spent)


def timed(decode: Callable[[tuple[int, ...]], None], tokens: tuple[int, ...]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    decode(tokens)
    return time.perf_counter() - begin


def matrices(layer: object) -> list[torch.Tensor]:
    """A layer's four projections."""
    return [getattr(layer, name) for name in ("qkv", "out", "gate_up", "down")]


@torch.inference_mode()
def products(
    engine: TorchEngine, lay_out: Callable[[torch.Tensor], torch.Tensor] | None = None, rounds: int = 30
) -> tuple[float, float]:
    """Median seconds of one token's matrix-vector products, and of the head's among them, as the engine has them."""
    model = engine.model
    sizes = [plain(weight).shape[1] for layer in model.layers for weight in matrices(layer)]
    weights = [weight if lay_out is None else lay_out(weight) for layer in model.layers for weight in matrices(layer)]
    head = packed(model.lm_head, model.native) if lay_out is None else lay_out(model.lm_head)
    inputs = {size: torch.randn(1, size).to(model.device, model.dtype) for size in sizes}
    all_of_them, heads = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        for size, weight in zip(sizes, weights, strict=True):
            linear(inputs[size], weight)
        middle = time.perf_counter()
        linear(inputs[model.shape.hidden], head)
        all_of_them.append(time.perf_counter() - begin)
        heads.append(time.perf_counter() - middle)
    return median(all_of_them), median(heads)


if __name__ == "__main__":
    main()
