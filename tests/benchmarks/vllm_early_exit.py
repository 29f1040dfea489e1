"""Early exit inside vLLM against vLLM alone and its n-gram: tokens, acceptance, time.

    python tests/benchmarks/vllm_early_exit.py [--head head.safetensors] [--exit-layer 24] [-K 3] [--gate maxp=0.4]
        [--batches 1 4 8] [--prompts 8] [--new-tokens 48] [--rounds 2] [--dtype bfloat16] [--compiled]
    python tests/benchmarks/vllm_early_exit.py --check 50 --dtype float32 --head ... [--overrides ...]

Run by an interpreter that has vLLM (``pip install selfspec[vllm]``; ``pip install intel-openmp`` too: without it vLLM
warns that drafting is slow). Every configuration is a process of its own, kept running and asked in turn, batch by
batch, from another one on each time; while others run it is stopped (SIGSTOP). All decode the same ShareGPT prompts
greedily to the same length.

Printed: tok/s from the first token on, median over batches; the median of per-batch ratios to plain vLLM with a
bootstrap 95% interval; acceptance; and what a draft step takes, beside a plain step and the share of it that the
layers it runs would be. ``--check N``: instead, whether the tokens of N prompts are plain vLLM's, one at a time and
eight at a time, with prompts read in pieces and with prefixes cached; and the same prompts, head and K by our own
engine, whose acceptance must be the same within noise.
"""

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from worker import Worker

BATCH = 8
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class Answer(NamedTuple):
    """Of a batch: tokens by prompt; those after the first of all, in so many seconds and steps; what was drafted."""

    tokens: list[list[int]]
    counted: int
    seconds: float
    steps: int
    totals: dict[str, float]

    @property
    def rate(self) -> float:
        """Decode tok/s."""
        return self.counted / self.seconds


class Decoder(Worker):
    """A process that has one vLLM."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(sys.executable, "worker_vllm", arguments, VLLM_ENABLE_V1_MULTIPROCESSING="0")

    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Answer:
        """Decodes prompts together."""
        return Answer(**self({"prompts": [[*prompt] for prompt in prompts], "new_tokens": new_tokens}))


def gate_of(text: str | None) -> dict[str, Any]:
    """``maxp=0.4`` -> settings."""
    if text is None:
        return {}
    name, _, threshold = text.partition("=")
    return {"gate": {"name": name, "threshold": float(threshold)}}


def configurations(options: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """vLLM's arguments by configuration; the first is plain."""
    plain = {
        "model": model,
        "dtype": options.dtype,
        "max_model_len": 1024,
        "max_num_seqs": max(BATCH, *options.batches),
        "enforce_eager": not options.compiled,
        "kv_cache_memory_bytes": 1 << 28,
        "enable_prefix_caching": False,
    }

    def drafted(how: dict[str, Any]) -> dict[str, Any]:
        return plain | {"speculative_config": {"num_speculative_tokens": options.K} | how}

    def early(**settings: Any) -> dict[str, Any]:
        return drafted({"model": "selfspec.vllm_plugin.EarlyExit", "selfspec": settings})

    found = {"plain": plain}
    if not options.check:
        found["n-gram"] = drafted({"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2})
    if options.head is None:
        found[f"exit {options.exit_layer}"] = early(exit_layer=options.exit_layer, **gate_of(options.gate))
    for head in options.head or []:
        from selfspec import heads

        facts = heads.facts(Path(head))
        name = f"lsq {facts['exit_layer']}" + (f"/{facts['vocab'] // 1000}k" if facts.get("vocab") else "")
        settings = {"exit_layer": facts["exit_layer"], "head": head}
        found[name] = early(**settings)
        if options.gate and not options.check:
            found[f"{name} {options.gate}"] = early(**settings, **gate_of(options.gate))
    return found


def prompts_of(options: argparse.Namespace, count: int) -> tuple[Any, list[tuple[int, ...]]]:
    """A plan of ours that is as near as can be, and its prompts."""
    from hydra import compose, initialize_config_dir

    from selfspec import plan
    from selfspec.data import workload
    from selfspec.engine import factory
    from selfspec.run import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = plan.make(compose("config", ["tracking=none", "draft=none", *options.overrides]))
    engine = factory.make(made)
    chosen = workload.select(made.workload, "bench", count, made.seed, lambda text: engine.tokenizer.encode(text, True))
    return made, [prompt.tokens for prompt in chosen]


def compare(options: argparse.Namespace) -> None:
    """The tables of speed."""
    from selfspec import metrics
    from selfspec.engine import factory

    made, prompts = prompts_of(options, options.prompts)
    with ExitStack() as stack:
        runs = {}
        for name, arguments in configurations(options, str(factory.weights(made))).items():
            runs[name] = Decoder(arguments)
            stack.callback(runs[name].close)
            runs[name].decode(prompts[:2], 8)
        for size in options.batches:
            names, answers = list(runs), {name: list[Answer]() for name in runs}
            batches = [prompts[at : at + size] for at in range(0, len(prompts) - size + 1, size)] * options.rounds
            for turn, batch in enumerate(batches):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    answers[name].append(runs[name].decode(batch, options.new_tokens))
            print(f"\nbatch {size}, {len(batches)} batches of {options.new_tokens} tokens, {options.dtype}", flush=True)
            print("| configuration | tok/s | of plain | acceptance | tokens per step | draft step ms | step ms |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for name in names:
                print(row(name, answers[name], answers["plain"], size, metrics), flush=True)


def row(name: str, own: list[Answer], plain: list[Answer], size: int, metrics: Any) -> str:
    """A line of a table."""
    totals: Counter[str] = Counter()
    for answer in own:
        totals.update(answer.totals)
    ratios = [a.rate / b.rate for a, b in zip(own, plain, strict=True)]
    low, high = metrics.bootstrap_median(ratios, 0)
    steps = sum(answer.steps for answer in own)
    per_step = sum(answer.counted for answer in own) / steps / size
    seconds = sum(answer.seconds for answer in own)
    drafting = f"{1e3 * totals['seconds'] / totals['steps']:.1f}" if totals["steps"] else "-"
    acceptance = f"{totals['accepted'] / totals['proposed']:.3f}" if totals["proposed"] else "-"
    rest = 1e3 * (seconds - totals["seconds"]) / steps
    ratio = f"{median(ratios):.2f} ({low:.2f}-{high:.2f})"
    rate = median(a.rate for a in own)
    return f"| {name} | {rate:.1f} | {ratio} | {acceptance} | {per_step:.2f} | {drafting} | {rest:.1f} |"


def check(options: argparse.Namespace) -> None:
    """Tokens against plain vLLM's, and acceptance against our own engine's."""
    from selfspec.engine import factory

    made, prompts = prompts_of(options, options.check)
    odd = {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "block_size": 32}
    wanted = dict[int, list[list[int]]]()
    for name, arguments in configurations(options, str(factory.weights(made))).items():
        with closing(Decoder(arguments if name == "plain" else arguments | odd)) as decoder:
            for size in (1, BATCH):
                answers = [decoder.decode(batch, options.new_tokens) for batch in in_batches(prompts, size)]
                tokens = [tokens for answer in answers for tokens in answer.tokens]
                totals: Counter[str] = Counter()
                for answer in answers:
                    totals.update(answer.totals)
                wanted.setdefault(size, tokens)
                same = sum(a == b for a, b in zip(tokens, wanted[size], strict=True))
                said = f"{name}, {size} at a time: {same} of {len(tokens)} prompts as plain"
                print(said + (f"; {accepted(totals)}" if totals else ""), flush=True)
    for head in options.head or []:
        print(f"our engine, {ours(options, Path(head), prompts)}", flush=True)


def ours(options: argparse.Namespace, head: Path, prompts: list[tuple[int, ...]]) -> str:
    """The acceptance of the same head, K and gate in our own engine, one prompt at a time."""
    from hydra import compose, initialize_config_dir

    from selfspec import heads, plan
    from selfspec.engine.torch.engine import TorchEngine
    from selfspec.run import CONF
    from selfspec.types import Request

    facts = heads.facts(head)
    rank = ["draft.rank=128"] if facts["form"] == "low_rank" else []
    asked = [f"draft.form={facts['form']}", *rank, f"draft.previous={facts['previous']}", f"K={options.K}"]
    asked += [f"exit_layer={facts['exit_layer']}", f"draft.vocab={facts['vocab'] or 'null'}"]
    asked += [f"hardware.dtype={DTYPES[options.dtype]}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = plan.make(compose("config", ["tracking=none", "draft=lsq", *asked, *options.overrides]))
    engine = TorchEngine(made)
    engine.use_head(head)
    totals: Counter[str] = Counter()
    for done in engine.generate([Request(prompt, options.new_tokens, ignore_eos=True) for prompt in prompts]):
        for cycle in done.cycles:
            totals.update(cycles=1, proposed=cycle.proposed, accepted=cycle.accepted)
    return f"{made.label}: {accepted(totals)}"


def accepted(totals: Counter[str]) -> str:
    """Acceptance, in words."""
    rate, cycles = totals["accepted"] / max(totals["proposed"], 1), totals["cycles"]
    return f"acceptance {rate:.4f}, {totals['accepted']} of {totals['proposed']} in {cycles} cycles"


def in_batches(prompts: list[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Prompts, so many at a time."""
    for at in range(0, len(prompts), size):
        yield prompts[at : at + size]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", nargs="*", help="files that our fit stage made; none: the raw exit")
    parser.add_argument("--exit-layer", type=int, default=24, help="of the raw exit")
    parser.add_argument("-K", type=int, default=3)
    parser.add_argument("--gate", help="beside no gate, such as maxp=0.4")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="compiled steps in the place of eager ones")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="compare tokens, not times, on N prompts")
    parser.add_argument("--overrides", nargs="*", default=[], help="for the prompts, as of selfspec.run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and close the workers on the way
    (check if options.check else compare)(options)


if __name__ == "__main__":
    main()
