"""What a step of an early exit's draft costs beside its parts measured alone, and what a verified row costs.

    python tests/benchmarks/draft_step.py [--exit-layer 1] [--vocab 8192] [--width 3] [--rounds 20]

Before each measurement a whole pass goes through the CPU's caches, as verification does between two drafts: what is
not measured so looks ten times as cheap as it is. Weights of the head are random, which takes as long as any. The
price of a row, as a share of a pass, times the acceptance length, is what ``draft.worth`` should be.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from hydra import compose, initialize_config_dir

from selfspec import plan as plans
from selfspec.axes import GATE
from selfspec.engine.torch.engine import TorchEngine
from selfspec.model.tree import Tree
from selfspec.run import CONF
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import FittedExit, laid_out
from selfspec.speculation.readout import Readout
from selfspec.speculation.sequence import Seq
from selfspec.types import Request

CONTEXT, ROWS = 200, (1, 2, 3, 4, 6, 8, 12, 16)


@torch.inference_mode()
def main() -> None:
    """Prints milliseconds: medians, and the least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exit-layer", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--width", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        engine = TorchEngine(plans.make(compose("config", ["draft=none", "tracking=none"])))
    model, layer, depth = engine.model, options.exit_layer, engine.model.shape.layers
    size, chance = model.shape.hidden, torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randn(size, 2 * size, generator=chance) / 50, "bias": torch.zeros(size)}
    head = FittedExit(laid_out({k: t.to(model.dtype) for k, t in tensors.items()}, model.native), previous=True)
    readout = Readout(model, torch.randperm(model.shape.vocab, generator=chance)[: options.vocab])
    draft = EarlyExit(model, layer, head, readout, options.width)

    cache, row = model.new_cache(2 * CONTEXT), Seq(Request(tuple(range(CONTEXT + 1)), CONTEXT))
    at = cache.place([Tree.chain(row.tokens[:-1])], row=cache.admit())
    row.state = model.norm(model.run(model.embed(row.tokens[:-1], at), cache, at, 0, depth))[-1:]
    cache.commit(0, range(CONTEXT))
    root, gate = Tree.chain(row.tokens[-1:]), GATE.new("varH", threshold=1e9).make()
    at = cache.place([root])
    embedded = model.embed(root.tokens, at)
    exit = model.run(embedded, cache, at, 0, layer)
    states = head(exit, row.state)
    logits = readout(states)

    def a_pass(rows: int) -> None:
        tree = Tree([1] * rows, [-1, *((node - 1) // 2 for node in range(1, rows))])
        at = cache.place([tree])
        model.logits(model.norm(model.run(model.embed(tree.tokens, at), cache, at, 0, depth)))

    def placed() -> None:
        model.embed(root.tokens, cache.place([root]))

    parts: dict[str, Callable[[], object]] = {
        "place and embed": placed,
        "layers": lambda: model.run(embedded, cache, at, 0, layer),
        "head": lambda: head(exit, row.state),
        "readout": lambda: readout(states),
        "signal": lambda: gate.signal(logits),
        "likeliest": lambda: readout.candidates(logits, options.width, logits[:0]),
    }
    whole: dict[str, Callable[[], object]] = {
        "a step in one": lambda: draft.exit(root.tokens, row.state, cache, cache.place([root]), layer, gate),
        **{f"draft of K={k}": lambda k=k: draft.propose([row], [k], Gate(), cache) for k in (1, 2, 3)},  # type: ignore[misc]
    }
    passes: dict[str, Callable[[], object]] = {f"pass of {n}": lambda n=n: a_pass(n) for n in ROWS}  # type: ignore[misc]
    spent: dict[str, list[float]] = {name: [] for name in (*parts, *whole, *passes)}
    for _ in range(options.rounds):
        for name, call in (parts | whole | passes).items():
            a_pass(1)
            begin = time.perf_counter()
            call()
            spent[name].append(1e3 * (time.perf_counter() - begin))
    print(engine.describe())
    for name, times in spent.items():
        print(f"{name:16s} {median(times):7.3f}  {min(times):7.3f}")
    for what in (median, min):
        alone = sum(what(spent[name]) for name in parts)
        print(f"{what.__name__}: a step is {what(spent['a step in one']) / alone:.2f} of its parts ({alone:.3f})")
        price = (what(spent["pass of 8"]) - what(spent["pass of 1"])) / 7
        print(f"  a verified row costs {price:.3f}, {price / what(spent['pass of 1']):.3f} of a pass")


if __name__ == "__main__":
    main()
