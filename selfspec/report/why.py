"""Why a configuration is faster or slower than plain decoding, in one line, by its own figures."""

from selfspec.report.results import Result, value


def why(row: Result) -> str | None:
    """Such as ``slower: a draft step costs .41 of a pass, a cycle 2.30, and .26 of drafts stand; ...``.

    ``None`` where nothing was drafted, or its cycles were not timed.
    """
    step, cycle, stand, even, oracle = (
        value(row, f"bench/{key}") for key in ("cost_draft_step", "cost_cycle", "stand", "break_even", "oracle_speedup")
    )
    low, high = value(row, "bench/speedup_low"), value(row, "bench/speedup_high")
    if cycle is None or stand is None or oracle is None or low is None or high is None:
        return None
    word = "slower" if high < 1 else "faster" if low > 1 else "neither faster nor slower for certain"
    at = "nothing would break even" if even is None else f"it breaks even at {_share(even)}"
    costs = f"a cycle costs {cycle:.2f} passes"
    if step is not None:
        costs = f"a draft step costs {_share(step)} of a pass, a cycle {cycle:.2f},"
    return f"{word}: {costs} and {_share(stand)} of drafts stand; {at} (an oracle's drafts at that cost: {oracle:.2f}x)"


def _share(number: float) -> str:
    return f"{number:.2f}".removeprefix("0") if number < 1 else f"{number:.2f}"
