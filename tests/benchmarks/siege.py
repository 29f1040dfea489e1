"""How late the honest are answered while the worst clients and the worst back end do what they can.

    python tests/benchmarks/siege.py [--turns 5] [override ...]

One gateway on the real model, a process of its own; 32 users ask for a chat's answer of 12 tokens, twice each, and
wait for the whole of it: in turn alone, and under siege (``tests/siege.py``: so many hostile clients of ten kinds, and
a back end that means harm). The ratio of the 99th percentiles is over all turns; its interval is a bootstrap's, over
turns. Hostile clients run on the same cores as the gateway, as do the users: what they take of these counts, too.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import siege

MODEL = "SmolLM2-135M-Instruct"


async def measure(turns: int, overrides: list[str]) -> None:
    """Prints percentiles, and how the worst of them compare."""
    with tempfile.TemporaryDirectory() as folder:
        async with siege.serving(Path(folder), os.environ, *overrides) as served:
            await siege.honest(served.port, MODEL)  # warms up
            quiet, loud, told = list[list[float]](), list[list[float]](), Counter[tuple[str, int]]()
            for turn in range(turns):
                quiet.append((await siege.honest(served.port, MODEL, 2))[1])
                hostile = siege.Siege(served.port, MODEL, turn)
                besieging = asyncio.ensure_future(hostile.run())
                loud.append((await siege.honest(served.port, MODEL, 2))[1])
                await besieging
                told.update((kind, status) for kind, status, _ in hostile.told)
                await siege.settled(served.port)
    for name, rounds in (("quiet", quiet), ("siege", loud)):
        p50, p99 = np.percentile(np.concatenate(rounds), [50, 99])
        print(f"{name}: {sum(map(len, rounds))} answers, p50 {p50:.2f} s, p99 {p99:.2f} s")
    chance = np.random.default_rng(0)

    def ratio(chosen: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> float:
        p99 = [np.percentile(np.concatenate([rounds[at] for at in chosen]), 99) for rounds in (loud, quiet)]
        return float(p99[0] / p99[1])

    sampled = [ratio(chance.integers(0, turns, turns)) for _ in range(1000)]
    low, high = np.percentile(sampled, [2.5, 97.5])
    print(f"p99 under siege / quiet: {ratio(np.arange(turns)):.2f} [{low:.2f}, {high:.2f}]")
    print(
        "hostile clients were told:", ", ".join(f"{kind} {status}: {n}" for (kind, status), n in sorted(told.items()))
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    asyncio.run(measure(options.turns, options.overrides or ["draft=suffix", "draft.corpus=false"]))


if __name__ == "__main__":
    main()
