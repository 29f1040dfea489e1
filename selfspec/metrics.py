"""Measured units -> rates, speed-ups, intervals, verdicts. Pure.

A *unit* is the ``data`` of a bench record: one prompt decoded once plainly and once as configured. The
definitions are the same for every engine:

- acceptance: accepted draft tokens / proposed draft tokens; at position j, those among drafts that reach j.
- tokens per cycle: new tokens of cycles / cycles, the first token of a completion not being of any.
- decode tok/s: new tokens after the first / seconds after the first; end-to-end: all / seconds since arrival.
- speed-up: for each prompt, decode tok/s over plain decode tok/s of the same repeat; the mean over its
  repeats; then the median over prompts, with a bootstrap 95% interval (percentile method, over prompts).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfspec.types import Completion, Cycle, Measurements

RESAMPLES = 2000


def pack(completion: Completion) -> dict[str, Any]:
    """A completion as JSON values, its cycles as columns."""
    return {
        "tokens": list(completion.tokens),
        "ttft_s": completion.ttft_s,
        "total_s": completion.total_s,
        "finish": completion.finish,
        "cycles": {name: [getattr(cycle, name) for cycle in completion.cycles] for name in Cycle.__slots__},
    }


def decode_rate(completion: Mapping[str, Any]) -> float | None:
    """New tokens after the first / seconds after the first; ``None`` where there is one token only."""
    after = len(completion["tokens"]) - 1
    return after / (completion["total_s"] - completion["ttft_s"]) if after else None


def per_unit(unit: Mapping[str, Any]) -> Measurements:
    """What a tracker shows of one unit as it finishes."""
    plain, configured = unit["plain"], unit["configured"]
    cycles = configured["cycles"]
    rate, plain_rate, speedup = decode_rate(configured), decode_rate(plain), _speedup(unit)
    shown: Measurements = {"ttft_ms": 1e3 * configured["ttft_s"], "new_tokens": len(configured["tokens"])}
    if rate and plain_rate and speedup:
        shown |= {"tok_s": rate, "plain_tok_s": plain_rate, "speedup": speedup}
    if sum(cycles["proposed"]):
        shown["acceptance"] = sum(cycles["accepted"]) / sum(cycles["proposed"])
    return {f"unit/{name}": value for name, value in shown.items()}


def summarise(units: Sequence[Mapping[str, Any]], seed: int) -> Measurements:
    """All measurements of a bench; at least one unit."""
    configured = [unit["configured"] for unit in units]
    plain = [unit["plain"] for unit in units]
    found: Measurements = {
        "ttft_ms": 1e3 * _median(c["ttft_s"] for c in configured),
        "plain_ttft_ms": 1e3 * _median(c["ttft_s"] for c in plain),
        "e2e_tok_s": _median(len(c["tokens"]) / c["total_s"] for c in configured),
        "peak_memory_mb": max(unit["peak_memory_mb"] for unit in units),
        "cpu_utilisation": float(np.mean([unit["cpu_utilisation"] for unit in units])),
        "units": len(units),
        "prompts": len({unit["prompt"] for unit in units}),
        "new_tokens": sum(len(c["tokens"]) for c in configured),
    }
    device = [unit["device_utilisation"] for unit in units if unit["device_utilisation"] is not None]
    if device:
        found["device_utilisation"] = float(np.mean(device))
    found |= _with_interval("tok_s", _by_prompt(units, lambda unit: decode_rate(unit["configured"])), seed)
    found |= _with_interval("plain_tok_s", _by_prompt(units, lambda unit: decode_rate(unit["plain"])), seed)
    found |= _with_interval("speedup", _by_prompt(units, _speedup), seed)
    return found | _drafting(configured) | _losslessness(units)


def acceptance_by_position(units: Sequence[Mapping[str, Any]]) -> list[float]:
    """For draft position j = 1, 2, ...: accepted there / proposed there."""
    proposed = np.concatenate([unit["configured"]["cycles"]["proposed"] for unit in units]).astype(int)
    accepted = np.concatenate([unit["configured"]["cycles"]["accepted"] for unit in units]).astype(int)
    return [float((accepted >= j).sum() / (proposed >= j).sum()) for j in range(1, int(proposed.max(initial=0)) + 1)]


def bootstrap_median(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95% percentile interval of the median over resamples with replacement; n >= 1 values."""
    draws: NDArray[np.float64] = np.random.default_rng(seed).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def _drafting(configured: Sequence[Mapping[str, Any]]) -> Measurements:
    def column(name: str) -> NDArray[np.float64]:
        return np.concatenate([np.asarray(c["cycles"][name], dtype=float) for c in configured])

    cycles, proposed = column("proposed").size, column("proposed").sum()
    if not cycles:
        return {}
    found: Measurements = {
        "tokens_per_cycle": float(column("new_tokens").sum() / cycles),
        "draft_ms": float(column("draft_ms").mean()),
        "verify_ms": float(column("verify_ms").mean()),
    }
    if column("k_asked").any():
        found["proposed_share"] = float(proposed / column("k_asked").sum())
    if proposed:
        found["acceptance"] = float(column("accepted").sum() / proposed)
    return found


def _losslessness(units: Sequence[Mapping[str, Any]]) -> Measurements:
    verdicts = [unit["verdict"] for unit in units]
    equal = sum(_equal_prefix(unit) for unit in units) / sum(len(unit["plain"]["tokens"]) for unit in units)
    return {"ties": verdicts.count("tie"), "differing": verdicts.count("differs"), "equal_tokens": equal}


def _equal_prefix(unit: Mapping[str, Any]) -> int:
    difference = first_difference(unit["plain"]["tokens"], unit["configured"]["tokens"])
    return len(unit["plain"]["tokens"]) if difference is None else difference


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token at which two completions differ (one may have ended); ``None``: they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _speedup(unit: Mapping[str, Any]) -> float | None:
    rate, plain = decode_rate(unit["configured"]), decode_rate(unit["plain"])
    return rate / plain if rate and plain else None


def _by_prompt(units: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]) -> list[float]:
    """One value a prompt: the mean over its repeats; prompts without any are left out."""
    grouped: dict[str, list[float]] = {}
    for unit in units:
        one = value(unit)
        if one is not None:
            grouped.setdefault(unit["prompt"], []).append(one)
    return [float(np.mean(values)) for values in grouped.values()]


def _with_interval(name: str, values: list[float], seed: int) -> Measurements:
    if not values:
        return {}
    low, high = bootstrap_median(values, seed)
    return {name: float(np.median(values)), f"{name}_low": low, f"{name}_high": high}


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))
