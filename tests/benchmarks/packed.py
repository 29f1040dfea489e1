"""What it brings to leave weights as their GGUF file packs them: bit-identity to bf16, and time and memory beside it.

    python tests/benchmarks/packed.py [--same 50] [--prompts 8] [--new-tokens 64] [--rounds 9]

Both ways take turns in this process; a ratio is bf16's time over packed's, its interval a bootstrap over turns, or over
prompts. Peak memory is of a process of its own that decodes one prompt plainly.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from selfspec import metrics
from selfspec import plan as plans
from selfspec.data import workload
from selfspec.engine.torch.engine import TorchEngine
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.run import CONF
from selfspec.types import Request

WIDTHS = ("bf16", "packed")
ROWS = (1, 2, 4, 8, 12, 16, 32, 64)
PREFILL = 796


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same", type=int, default=50, help="prompts whose logits are compared")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", choices=WIDTHS, help="decode one prompt so, and print this process's peak memory")
    options = parser.parse_args()
    if options.peak:
        engine = made(options.peak)
        engine.generate([Request(tuple(range(5, 45)), options.new_tokens, ignore_eos=True)], plain=True)
        # Not ru_maxrss: a child's begins with its parent's.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(f"{options.peak} {int(status['VmHWM'].split()[0]) / 1024:.0f} MB")
        return
    engines = [made(width) for width in WIDTHS]
    full, kept = (engine.weights.model for engine in engines)
    prompts = workload.select(
        engines[0].plan.workload, "bench", max(options.same, options.prompts), 0, lambda text: encoded(engines[0], text)
    )
    print(engines[1].describe())
    equal = sum(
        all(a.equal(b) for a, b in zip(*(logits(model, prompt.tokens) for model in (full, kept)), strict=True))
        for prompt in prompts[: options.same]
    )
    print(f"logits bit by bit those of bf16: {equal} of {options.same} prompts, each read, then trees of {ROWS} tokens")

    held = [context(model, 200) for model in (full, kept)]
    for rows in ROWS:
        tree = branching(rows)
        each = [partial(a_pass, model, cache, tree) for model, cache in zip((full, kept), held, strict=True)]
        tell(f"a pass of {rows} at 200 tokens, ms", turns(each, options.rounds), 1e3)
    each = [partial(context, model, PREFILL) for model in (full, kept)]
    tell(f"a prompt of {PREFILL} tokens, tok/s", turns(each, max(3, options.rounds // 3)), PREFILL, rate=True)

    def decode(engine: TorchEngine, tokens: tuple[int, ...]) -> None:
        engine.generate([Request(tokens, options.new_tokens, ignore_eos=True)], plain=True)

    asked = prompts[: options.prompts]
    spent = [turns([partial(decode, engine, prompt.tokens) for engine in engines], 1)[0] for prompt in asked]
    tell("plain decoding, end to end, tok/s", spent, options.new_tokens, rate=True)
    for width in WIDTHS:
        print(
            "peak memory, plain:",
            subprocess.check_output([sys.executable, __file__, "--peak", width], text=True),
            end="",
        )


def made(width: str) -> TorchEngine:
    """The default model's engine."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return TorchEngine(plans.make(compose("config", ["draft=none", "tracking=none", f"engine.weights={width}"])))


def encoded(engine: TorchEngine, text: str) -> list[int]:
    """A chat's tokens."""
    return engine.tokenizer.encode(text, True)


def branching(rows: int) -> Tree:
    """A binary tree of so many tokens."""
    return Tree([5 + row for row in range(rows)], [-1, *((node - 1) // 2 for node in range(1, rows))])


@torch.inference_mode()
def context(model: Model, length: int) -> KVCache:
    """A cache with so many tokens in it, read in one pass."""
    cache = model.new_cache(2048)
    row = cache.admit()
    a_pass(model, cache, Tree.chain([5 + i % 900 for i in range(length)]))
    cache.commit(row, range(length))
    return cache


@torch.inference_mode()
def a_pass(model: Model, cache: KVCache, tree: Tree) -> Tensor:
    """The whole model over a tree: its logits."""
    at = cache.place([tree])
    return model.logits(model.norm(model.run(model.embed(tree.tokens, at), cache, at, 0, model.shape.layers)))


@torch.inference_mode()
def logits(model: Model, tokens: Sequence[int]) -> list[Tensor]:
    """Of a prompt, and of trees after it."""
    cache = model.new_cache(2048)
    row, found = cache.admit(), []
    for tree in (Tree.chain(tokens), *map(branching, ROWS)):
        found.append(a_pass(model, cache, tree))
        cache.commit(row, range(len(tree)) if tree.tokens == list(tokens) else [0])
    return found


def turns(each: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, ...]]:
    """Seconds of each, in turn."""
    spent = []
    for _ in range(rounds):
        times = []
        for run in each:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        spent.append(tuple(times))
    return spent


def tell(what: str, spent: Sequence[tuple[float, ...]], scale: float, rate: bool = False) -> None:
    """A line of the table."""
    ratios = [full / kept for full, kept in spent]
    low, high = metrics.bootstrap_median(ratios, seed=0)
    full, kept = (median(scale / t if rate else scale * t for t in times) for times in zip(*spent, strict=True))
    print(f"{what}: bf16 {full:.4g}, packed {kept:.4g}; {median(ratios):.2f}x [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
