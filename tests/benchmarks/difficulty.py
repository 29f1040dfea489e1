"""What foretells, before anything is run, how unsure the model will be of its answer? Rank correlations.

    python tests/benchmarks/difficulty.py [--prompts 200] [--new-tokens 48]

How unsure it was is the mean surprisal of its own greedy answer, under itself. Each measure of the prompt is compared
with that by Spearman's rank correlation, with a bootstrap 95% interval over prompts. ``rank`` is what
``serve.router.policy=difficulty`` uses; its quantiles help to choose ``serve.router.hardest``. ``own surprisal`` is the
model's at the prompt, and costs a pass; the others cost nothing.
"""

import argparse
import random
import re
from statistics import mean, quantiles

import numpy as np
from hydra import compose, initialize_config_dir

from selfspec import plan as plans
from selfspec.data import workload
from selfspec.engine.torch.engine import TorchEngine
from selfspec.run import CONF
from selfspec.serve.difficulty import difficulty
from selfspec.types import Request


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = plans.make(compose("config", ["draft=none", "tracking=none"]))
    engine = TorchEngine(settings)
    prompts = workload.select(settings.workload, "bench", options.prompts, 0, lambda text: engine.encode(text, True))
    requests = [Request(prompt.tokens, options.new_tokens) for prompt in prompts]
    answers = [completion.tokens for completion in engine.generate(requests, plain=True, max_batch=16)]
    unsure = [
        -mean(engine.score(r.tokens, [a], plain=True)[0].logprobs) for r, a in zip(requests, answers, strict=True)
    ]

    frame = len(engine.encode("", True))
    measures: dict[str, list[float]] = {name: [] for name in ("rank", "length", "symbols", "own surprisal")}
    for request in requests:
        text = engine.decode(request.tokens)
        measures["rank"].append(difficulty(request.tokens))
        measures["length"].append(len(request.tokens))
        measures["symbols"].append(len(re.findall(r"[^\w\s]", text)) / max(len(text), 1))
        half = min(frame, len(request.tokens) - 1)
        scored = engine.score(request.tokens[:half], [request.tokens[half:]], plain=True)[0]
        measures["own surprisal"].append(-mean(scored.logprobs))

    print(f"{len(requests)} ShareGPT prompts; rank correlation with the surprisal of the model's own answer")
    chance = random.Random(0)
    for name, values in measures.items():
        draws = [[chance.randrange(len(values)) for _ in values] for _ in range(1000)]
        found = sorted(_spearman([values[i] for i in draw], [unsure[i] for i in draw]) for draw in draws)
        print(f"{name}\t{_spearman(values, unsure):+.2f} [{found[25]:+.2f}, {found[975]:+.2f}]")
    print("rank, deciles:", " ".join(f"{value:.2f}" for value in quantiles(measures["rank"], n=10)))


def _spearman(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
