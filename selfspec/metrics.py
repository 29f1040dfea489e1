"""Measured units -> rates, speed-ups, intervals, verdicts. Pure.

A *unit* is the ``data`` of a bench record: prompts decoded together, once plainly and once as configured (and
once by every reference of ``bench.baselines``); one prompt, unless ``engine.max_batch`` is more. The definitions
are the same for every engine:

- acceptance: accepted draft tokens / proposed draft tokens; at position j, those among drafts that reach j.
- acceptance length: new tokens of cycles / cycles, the bonus token included, as vLLM counts it; the first token of a
  completion is of no cycle.
- decode tok/s: new tokens after the first / seconds after the first; of a batch, all of them / seconds from
  when all prompts have their first token. End-to-end: all new tokens / seconds since arrival.
- speed-up: for each unit, decode tok/s over plain decode tok/s of the same repeat; the mean over its
  repeats; then the median over units, with a bootstrap 95% interval (percentile method, over units).
- speed-up by total time: all new tokens after the first / all seconds for them, over plain decoding's: where both
  say the same tokens, plain decoding's seconds over the configuration's. Long answers count for more.
- without loops: of the units of which no answer loops, neither plainly nor as configured (:func:`loops`). Small models
  repeat themselves under greedy decoding, and whatever looks up what was said before then looks brilliant.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfspec.types import Completion, Cycle, Measurements

Unit = Mapping[str, Any]
Packed = Mapping[str, Any]
RESAMPLES = 2000
LOOP_WINDOW, LOOP_DISTINCT = 128, 0.3
"""Of an answer's last tokens: so many are looked at, and with fewer distinct ones a token it loops."""
LOOP_TIMES, LOOP_TOKENS = 3, 16
"""It loops, too, where it ends in the same words said so often in a row, which are so many tokens in all."""


def pack(completion: Completion) -> dict[str, Any]:
    """A completion as JSON values, its cycles as columns."""
    return {
        "tokens": list(completion.tokens),
        "ttft_s": completion.ttft_s,
        "total_s": completion.total_s,
        "finish": completion.finish,
        "cycles": {name: [getattr(cycle, name) for cycle in completion.cycles] for name in Cycle.__slots__},
    }


def loops(tokens: Sequence[int]) -> bool:
    """Whether an answer repeats itself at its end, by its last :data:`LOOP_WINDOW` tokens.

    It does where they are fewer than 0.3 distinct ones a token, or where they end in the same words three times in a
    row or more, of at least 16 tokens in all. A window, since any long text has few distinct tokens for its length.
    """
    last = tokens[-LOOP_WINDOW:]
    if len(set(last)) < LOOP_DISTINCT * len(last):
        return True
    spans = ((period, max(LOOP_TOKENS, LOOP_TIMES * period)) for period in range(1, len(last) // LOOP_TIMES + 1))
    return any(len(last) >= span and last[-span:-period] == last[period - span :] for period, span in spans)


def decode_rate(completions: Sequence[Packed]) -> float | None:
    """New tokens after the first / seconds after the (last) first; ``None``: there is none, or all came at once."""
    after, seconds = _after_the_first(completions)
    return after / seconds if after and seconds else None


def per_unit(unit: Unit) -> Measurements:
    """What a tracker shows of one unit as it finishes."""
    plain, configured = unit["plain"], unit["configured"]
    rate, plain_rate, ratio = decode_rate(configured), decode_rate(plain), speedup(unit)
    shown: Measurements = {
        "ttft_ms": 1e3 * _median(c["ttft_s"] for c in configured),
        "new_tokens": sum(len(c["tokens"]) for c in configured),
    }
    if rate and plain_rate and ratio:
        shown |= {"tok_s": rate, "plain_tok_s": plain_rate, "speedup": ratio}
    if _total(configured, "proposed"):
        shown["acceptance"] = _total(configured, "accepted") / _total(configured, "proposed")
    return {f"unit/{name}": value for name, value in shown.items()}


def table(units: Sequence[Unit]) -> list[list[object]]:
    """Names, and a line a unit: what was asked, how fast it was answered, and how much was drafted for it."""
    lines: list[list[object]] = [[*UNIT_COLUMNS]]
    for unit in units:
        configured = unit["configured"]
        cycles = sum(len(c["cycles"]["new_tokens"]) for c in configured)
        counts = [_total(configured, name) for name in ("new_tokens", "proposed", "accepted")]
        rates = (decode_rate(configured), decode_rate(unit["plain"]), speedup(unit))
        tokens = sum(unit.get("prompt_tokens", ())), sum(len(c["tokens"]) for c in configured)
        lines.append([" ".join(unit["prompts"]), *tokens, *rates, cycles, *counts, len(_looping(unit))])
    return lines


UNIT_COLUMNS = (
    *("prompts", "prompt_tokens", "new_tokens", "tok_s", "plain_tok_s", "speedup"),
    *("cycles", "cycle_tokens", "proposed", "accepted", "looping"),
)
"""Of ``units.csv``."""


def summarise(units: Sequence[Unit], seed: int) -> Measurements:
    """All measurements of a bench; at least one unit."""
    configured = [c for unit in units for c in unit["configured"]]
    plain = [c for unit in units for c in unit["plain"]]
    found: Measurements = {
        "ttft_ms": 1e3 * _median(c["ttft_s"] for c in configured),
        "plain_ttft_ms": 1e3 * _median(c["ttft_s"] for c in plain),
        "e2e_tok_s": _median(
            sum(len(c["tokens"]) for c in unit["configured"]) / _last(unit["configured"], "total_s") for unit in units
        ),
        "peak_memory_mb": max(unit["peak_memory_mb"] for unit in units),
        "cpu_utilisation": float(np.mean([unit["cpu_utilisation"] for unit in units])),
        "units": len(units),
        "prompts": len({prompt for unit in units for prompt in unit["prompts"]}),
        "new_tokens": sum(len(c["tokens"]) for c in configured),
    }
    device = [unit["device_utilisation"] for unit in units if unit["device_utilisation"] is not None]
    if device:
        found["device_utilisation"] = float(np.mean(device))
    found |= _with_interval("tok_s", _by_prompts(units, lambda unit: decode_rate(unit["configured"])), seed)
    found |= _with_interval("plain_tok_s", _by_prompts(units, lambda unit: decode_rate(unit["plain"])), seed)
    found |= _speedups(units, seed)
    for name in dict.fromkeys(name for unit in units for name in unit["against"]):
        found |= _against(name, units, seed)
    return found | _drafting(configured) | _losslessness(units)


def by_part(parts: Mapping[str, Sequence[Unit]], seed: int) -> Measurements:
    """What each set of prompts came to by itself, and the mean of their speed-ups: every set counts for the same.

    Its bootstrap is over the prompts within each set: the sets are no sample of others.
    """
    told = ("prompts", "looping", "tok_s", "plain_tok_s", "speedup", "acceptance")  # and what begins like these
    found = {
        f"part/{name}/{key}": value
        for name, units in parts.items()
        for key, value in summarise(units, seed).items()
        if key.startswith(told)
    }
    ratios = [ratios for units in parts.values() if (ratios := _by_prompts(units, speedup))]
    if ratios:
        chance = np.random.default_rng(seed)
        drawn = [np.median(chance.choice(np.asarray(own), (RESAMPLES, len(own))), axis=1) for own in ratios]
        low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
        macro = float(np.mean([np.median(own) for own in ratios]))
        found |= {"speedup_macro": macro, "speedup_macro_low": float(low), "speedup_macro_high": float(high)}
    return found


def _speedups(units: Sequence[Unit], seed: int) -> Measurements:
    """Over plain decoding, unit by unit and by total time; of all units, and without those that loop."""
    found: Measurements = {
        "looping": len({prompt for unit in units for prompt in _looping(unit)}),
        "stalled": len({prompt for unit in units for prompt in _those(unit, _stalled)}),
    }
    for suffix, some in _with_and_without_loops(units):
        ratios = _by_prompts(some, speedup)
        found |= _with_interval(f"speedup{suffix}", ratios, seed)
        found |= _by_total_time(f"speedup_total{suffix}", some, seed)
    return found


def _with_and_without_loops(units: Sequence[Unit]) -> tuple[tuple[str, Sequence[Unit]], ...]:
    """All units, and those of which no answer loops, each with what the names of its measurements end in."""
    return ("", units), ("_without_loops", [unit for unit in units if not _looping(unit)])


def _looping(unit: Unit) -> list[str]:
    return _those(unit, lambda answer: loops(answer["tokens"]))


def _those(unit: Unit, like_this: Callable[[Packed], bool]) -> list[str]:
    """Those of its prompts whose answer is like this, plainly or as configured."""
    answers = zip(unit["prompts"], unit["plain"], unit["configured"], strict=True)
    return [prompt for prompt, *both in answers if any(map(like_this, both))]


def _stalled(answer: Packed) -> bool:
    """Whether passes of ten times its median took over a tenth of its decode time: the machine did something else."""
    passes = np.asarray(answer["cycles"]["verify_ms"], dtype=float)
    usual = np.median(passes) if passes.size else 0.0
    waited = (passes - usual)[passes > 10 * usual].sum()
    return bool(waited > 100 * (answer["total_s"] - answer["ttft_s"]))


def _by_total_time(name: str, units: Sequence[Unit], seed: int) -> Measurements:
    """All tokens over all seconds, over plain decoding's; the bootstrap is over prompts, with all their repeats."""
    grouped: dict[tuple[str, ...], list[NDArray[np.float64]]] = {}
    for unit in units:
        if speedup(unit):
            both = [*_after_the_first(unit["configured"]), *_after_the_first(unit["plain"])]
            grouped.setdefault(tuple(unit["prompts"]), []).append(np.asarray(both))
    if not grouped:
        return {}
    sums = np.asarray([np.sum(repeats, axis=0) for repeats in grouped.values()])
    drawn = sums[np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))].sum(1)
    tokens, seconds, plain_tokens, plain_seconds = np.vstack([sums.sum(0), drawn]).T
    ratios = (tokens / seconds) / (plain_tokens / plain_seconds)
    found: Measurements = {name: float(ratios[0])}
    if len(sums) > 1:
        low, high = np.percentile(ratios[1:], [2.5, 97.5])
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _against(name: str, units: Sequence[Unit], seed: int) -> Measurements:
    """A reference's own rate, and the configuration's over it: above 1, the configuration is faster."""
    those = [unit for unit in units if name in unit["against"]]
    rates = _by_prompts(those, lambda unit: decode_rate(unit["against"][name]))
    found = _with_interval(f"against/{name}/tok_s", rates, seed)
    for suffix, some in _with_and_without_loops(those):
        ratios = _by_prompts(some, lambda unit: _ratio(unit, unit["against"][name]))
        found |= _with_interval(f"against/{name}/ratio{suffix}", ratios, seed)
    return found


def acceptance_by_position(units: Sequence[Unit]) -> list[float]:
    """For draft position j = 1, 2, ...: accepted there / drafts that looked as far."""
    cycles = [c["cycles"] for unit in units for c in unit["configured"]]
    depth = np.concatenate([c["depth"] for c in cycles]).astype(int)
    accepted = np.concatenate([c["accepted"] for c in cycles]).astype(int)
    return [float((accepted >= j).sum() / (depth >= j).sum()) for j in range(1, int(depth.max(initial=0)) + 1)]


def bootstrap_median(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95% percentile interval of the median over resamples with replacement; n >= 1 values."""
    draws: NDArray[np.float64] = np.random.default_rng(seed).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def _drafting(configured: Sequence[Packed]) -> Measurements:
    def column(name: str) -> NDArray[np.float64]:
        return np.concatenate([np.asarray(c["cycles"][name], dtype=float) for c in configured])

    cycles, proposed = column("proposed").size, column("proposed").sum()
    if not cycles:
        return {}
    found: Measurements = {
        "acceptance_length": float(column("new_tokens").sum() / cycles),
        "draft_ms": float(column("draft_ms").mean()),
        "verify_ms": float(column("verify_ms").mean()),
        "k_mean": float(column("k_asked").mean()),
    }
    if column("k_asked").any():
        found["proposed_share"] = float(column("depth").sum() / column("k_asked").sum())
    if proposed:
        found["acceptance"] = float(column("accepted").sum() / proposed)
    return found


def _losslessness(units: Sequence[Unit]) -> Measurements:
    verdicts = [verdict["verdict"] for unit in units for verdict in unit["verdicts"]]
    pairs = [pair for unit in units for pair in zip(unit["plain"], unit["configured"], strict=True)]
    equal = sum(_equal_prefix(*pair) for pair in pairs) / sum(len(plain["tokens"]) for plain, _ in pairs)
    return {"ties": verdicts.count("tie"), "differing": verdicts.count("differs"), "equal_tokens": equal}


def _equal_prefix(plain: Packed, configured: Packed) -> int:
    difference = first_difference(plain["tokens"], configured["tokens"])
    return len(plain["tokens"]) if difference is None else difference


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token at which two completions differ (one may have ended); ``None``: they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def speedup(unit: Unit) -> float | None:
    """Of one unit; ``None`` where one side has nothing to time."""
    return _ratio(unit, unit["plain"])


def _ratio(unit: Unit, reference: Sequence[Packed]) -> float | None:
    rate, other = decode_rate(unit["configured"]), decode_rate(reference)
    return rate / other if rate and other else None


def _by_prompts(units: Sequence[Unit], value: Callable[[Unit], float | None]) -> list[float]:
    """One value for the same prompts: the mean over their repeats; those without any are left out."""
    grouped: dict[tuple[str, ...], list[float]] = {}
    for unit in units:
        one = value(unit)
        if one is not None:
            grouped.setdefault(tuple(unit["prompts"]), []).append(one)
    return [float(np.mean(values)) for values in grouped.values()]


def _after_the_first(completions: Sequence[Packed]) -> tuple[int, float]:
    """New tokens after the first, and the seconds from when all have their first to when the last has its last."""
    tokens = sum(len(c["tokens"]) - 1 for c in completions)
    return tokens, _last(completions, "total_s") - _last(completions, "ttft_s")


def _last(completions: Sequence[Packed], name: str) -> float:
    return max(float(c[name]) for c in completions)


def _total(completions: Sequence[Packed], name: str) -> int:
    return sum(sum(c["cycles"][name]) for c in completions)


def _with_interval(name: str, values: list[float], seed: int) -> Measurements:
    """The median; of a single value no interval, which would say that it is certain."""
    found: Measurements = {name: float(np.median(values))} if values else {}
    if len(values) > 1:
        found[f"{name}_low"], found[f"{name}_high"] = bootstrap_median(values, seed)
    return found


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))
