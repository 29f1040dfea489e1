"""How much is lost by learning: controllers and the bandit gate on the fake engine, against the best fixed choice.

    python tests/benchmarks/regret.py [--requests 48] [--tokens 128] [environment ...]

Every figure is decode tokens per virtual second over all requests; regret is 1 - that of the learner / that
of the best of what it chooses from, known only afterwards. The same seed draws the same text and the same noise.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from hydra import compose, initialize_config_dir

from selfspec import plan
from selfspec.axes import CONTROLLER, GATE, ControllerOptions, GateOptions
from selfspec.engine.fake.engine import FakeEngine
from selfspec.engine.fake.session import World
from selfspec.plan import Plan
from selfspec.run import CONF
from selfspec.types import Request

MOST = 8
ARMS = [0.0, 0.2, 0.35, 0.5, 0.7]
EXITS = [6, 12, 18, 24]


class Drifting(World):
    """The draft is good, then bad, then good again: every ``period`` requests."""

    def __init__(self, good: float, bad: float, period: int, draft_ms: float) -> None:
        super().__init__(good, draft_ms)
        self.bad, self.period = bad, period

    def acceptance(self, request: Request, position: int, exit_layer: int | None) -> float:
        """By the request's number."""
        return self.bad if number(request) // self.period % 2 else self._acceptance


class Mixture(World):
    """The draft is good at a share of the prompts, and bad at the others."""

    def __init__(self, good: float, bad: float, share: float, draft_ms: float) -> None:
        super().__init__(good, draft_ms)
        self.bad, self.share = bad, share

    def acceptance(self, request: Request, position: int, exit_layer: int | None) -> float:
        """By the prompt."""
        return self._acceptance if _luck(number(request)) < self.share else self.bad


class Noisy(World):
    """A shared machine: a tenth of noise, one cycle in thirty stalls, a quarter of the time all takes twice as long."""

    def pace(self, now: float) -> float:
        """By the clock."""
        chance = random.Random(round(1e3 * now))
        spell = 2.0 if _luck(int(now / 2000)) < 0.25 else 1.0
        return spell * chance.lognormvariate(0, 0.1) * (4.0 if chance.random() < 1 / 60 else 1.0)


class Exits(World):
    """An early exit does for short prompts; long ones need a late one."""

    def acceptance(self, request: Request, position: int, exit_layer: int | None) -> float:
        """Rises with the layer, the later the longer the prompt."""
        assert exit_layer is not None
        return min(0.9, exit_layer / (8 if len(request.tokens) < 64 else 26))

    def draft_ms(self, rows: int, exit_layer: int | None) -> float:
        """Rises with the layer."""
        assert exit_layer is not None
        return 0.5 + 0.1 * exit_layer


@dataclass(frozen=True)
class Environment:
    """A world and how many requests are decoded at once in it."""

    world: World
    batch: int = 1


ENVIRONMENTS = {
    "high": Environment(World(0.85, 1.0)),
    "middling": Environment(World(0.6, 2.0)),
    "low": Environment(World(0.1, 3.0)),
    "useless": Environment(World(0.0, 10.0)),
    "dear": Environment(World(0.5, 8.0)),
    "free": Environment(World(0.3, 0.05)),
    "drifting": Environment(Drifting(0.85, 0.05, 12, 2.0)),
    "mixture": Environment(Mixture(0.85, 0.1, 0.3, 2.0)),
    "seldom good": Environment(Mixture(0.85, 0.05, 0.1, 3.0)),
    "noisy": Environment(Noisy(0.6, 2.0)),
    "noisy, useless": Environment(Noisy(0.02, 6.0)),
    "batch 8": Environment(World(0.85, 1.0), 8),
    "batch 8, low": Environment(World(0.2, 2.0), 8),
    "batch 8, noisy": Environment(Noisy(0.7, 1.5), 8),
}


def number(request: Request) -> int:
    """Which request of the stream it is."""
    return request.tokens[-2] * 256 + request.tokens[-1]


@lru_cache(maxsize=100_000)
def _luck(key: int) -> float:
    return random.Random(key).random()


def stream(requests: int, tokens: int) -> list[Request]:
    """Requests of 32 and of 96 prompt tokens."""
    return [Request((*[7] * (94 if _luck(i) < 0.5 else 30), *divmod(i, 256)), tokens) for i in range(requests)]


@cache
def _blank() -> Plan:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan.make(compose("config", ["engine=fake", "draft=layerskip", "exit_layer=12"]))


def rate(
    environment: Environment,
    requests: Sequence[Request],
    controller: ControllerOptions,
    gate: GateOptions | None = None,
    seed: int = 0,
) -> float:
    """Decode tokens per virtual second of a configuration, what it spends on learning included."""
    made = replace(_blank(), controller=controller, gate=gate or GATE.new("none"), seed=seed)
    engine = FakeEngine(made, environment.world)
    done = engine.generate(requests, max_batch=environment.batch)
    cycles = [cycle for completion in done for cycle in completion.cycles]
    spent = sum((cycle.draft_ms + cycle.verify_ms) / cycle.batch for cycle in cycles)
    return 1e3 * sum(cycle.new_tokens for cycle in cycles) / spent


def fixed(k: int) -> ControllerOptions:
    """K in every cycle."""
    return CONTROLLER.new("fixed", K=k)


def autotune(*exits: int) -> ControllerOptions:
    """A choice of these exit layers."""
    return CONTROLLER.new("autotune", K=4, exits=[*exits])


ADAPTIVE = CONTROLLER.new("adaptive", K=4, low=0, high=MOST, step=1, window=16, target=0.6)
COST = CONTROLLER.new("cost", K=MOST, window=32)
BANDIT = GATE.new("bandit", arms=ARMS)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", default=[*ENVIRONMENTS], metavar="environment")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    requests = stream(options.requests, options.tokens)

    print("| environment | plain tok/s | best fixed K | adaptive: regret, x plain | cost: regret, x plain |", end="")
    print(f" best fixed arm at K={MOST} | bandit: regret | cost + bandit: x plain |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.environments:
        environment = ENVIRONMENTS[name]
        by_k = {k: rate(environment, requests, fixed(k)) for k in range(MOST + 1)}
        plain, best = by_k[0], max(by_k, key=by_k.__getitem__)
        by_arm = {arm: rate(environment, requests, fixed(MOST), GATE.new("maxp", threshold=arm)) for arm in ARMS}
        arm = max(by_arm, key=by_arm.__getitem__)
        learners = [rate(environment, requests, learner) for learner in (ADAPTIVE, COST)]
        bandit, both = (rate(environment, requests, control, BANDIT) for control in (fixed(MOST), COST))
        cells = [name, f"{plain:.0f}", f"{best}: {by_k[best] / plain:.2f}x"]
        cells += [f"{1 - learner / by_k[best]:+.1%}, {learner / plain:.2f}x" for learner in learners]
        cells += [f"{arm:g}: {by_arm[arm] / plain:.2f}x", f"{1 - bandit / by_arm[arm]:+.1%}", f"{both / plain:.2f}x"]
        print("| " + " | ".join(cells) + " |", flush=True)

    requests, environment = stream(5 * options.requests, 32), Environment(Exits(0.0))
    by_exit = {layer: rate(environment, requests, autotune(layer)) for layer in EXITS}
    best = max(by_exit, key=by_exit.__getitem__)
    tuned = rate(environment, requests, autotune(*EXITS))
    print(f"autotune: best fixed exit layer {best}, {by_exit[best]:.0f} tok/s; by prompt length {tuned:.0f} tok/s")


if __name__ == "__main__":
    main()
