"""Intervals of a soak -> measurements, and the reasons why they will not do. Pure.

An *interval* is the ``data`` of a soak record::

    {"life": 1, "seconds": 30.0,
     "requests": [{"ttft_ms", "total_ms", "tokens", "proposed", "accepted"}, ...],   those answered in it
     "gaps": {"12.3": 41, ...},     milliseconds between pieces of an answer, three digits: how many
     "errors": {"HTTP 500": 1},
     "rss": [[seconds, MiB], ...]}  of the server, since it was started

Definitions:

- total: from the request to the last piece of its answer; TTFT: to the first; inter-token: from piece to piece,
  as a reader sees them (what one cycle accepted comes in one piece).
- drift: acceptance (accepted / proposed tokens) of the last third of the intervals less that of the first, with a
  bootstrap 95% interval over requests. It fails where the whole interval lies beyond what is allowed. Of a handful
  of requests a bootstrap knows nothing (of one, its interval has no width): then there is no drift to judge.
- memory slope: the median of the slopes between any two readings of one life of the server (Theil and Sen): a few
  steps do not move it, a leak does.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfspec.soak.config import Soak
from selfspec.types import Measurements

Interval = Mapping[str, Any]
PERCENTILES = (50, 95, 99)
RESAMPLES = 2000
_ENOUGH = 8
"""Requests that were drafted for, in the first third and in the last, or drift is not judged."""
_READINGS = 600
"""Of a life's memory: more are thinned out, as pairs are quadratic in them."""
_WORDS = {"ttft": "TTFT", "inter_token": "inter-token", "total": "total"}


def rounded(milliseconds: float) -> str:
    """To three digits, as gaps are counted."""
    return f"{milliseconds:.3g}"


def summarise(intervals: Sequence[Interval], timed: Sequence[Interval], seed: int) -> Measurements:
    """All measurements of a soak.

    Args:
        intervals: every one, in order.
        timed: those whose timings may be pooled, as they ran on one hardware.
        seed: of the bootstrap.
    """
    answered = [request for interval in intervals for request in interval["requests"]]
    errors = sum(errors_by_kind(intervals).values())
    found: Measurements = {
        "intervals": len(intervals),
        "seconds": sum(interval["seconds"] for interval in intervals),
        "requests": len(answered) + errors,
        "errors": errors,
        "error_rate": errors / max(len(answered) + errors, 1),
    }
    found |= _timings(timed)
    slope = memory_slope(intervals)
    readings = [mb for interval in intervals for _, mb in interval["rss"]]
    if slope is not None:
        found |= {"memory_slope_mb_min": slope, "memory_mb": max(readings)}
    return found | _acceptance(intervals, seed)


def per_interval(interval: Interval) -> Measurements:
    """What a tracker and the chart show of one interval."""
    errors = sum(interval["errors"].values())
    found = _timings([interval]) | {"errors": errors}
    if interval["rss"]:
        found["memory_mb"] = interval["rss"][-1][1]
    rate = _rate(interval["requests"])
    return found | ({} if rate is None else {"acceptance": rate})


def failures(found: Measurements, kinds: Mapping[str, int], soak: Soak) -> list[str]:
    """What was measured and is not allowed, in words; ``kinds``: of errors."""
    reasons = []
    if not found["requests"] or found["errors"] == found["requests"]:
        reasons.append("no request was answered")
    reasons += _senseless(found)
    if found["error_rate"] > soak.max_error_rate:
        worst = ", ".join(f"{count} x {kind}" for kind, count in Counter(kinds).most_common(3))
        reasons.append(
            f"{found['errors']:g} of {found['requests']:g} requests failed ({found['error_rate']:.2%}, "
            f"allowed {soak.max_error_rate:.2%}): {worst}"
        )
    slope = found.get("memory_slope_mb_min", 0.0)
    if slope > soak.max_memory_slope:
        reasons.append(f"the server's memory grew by {slope:.3g} MiB/min (allowed {soak.max_memory_slope:g})")
    if "acceptance_drift" in found:
        low, high = found["acceptance_drift_low"], found["acceptance_drift_high"]
        # All of the interval beyond the bound: what chance explains fails no soak.
        if low > soak.max_drift or high < -soak.max_drift:
            reasons.append(
                f"acceptance drifted from {found['acceptance_first']:.3f} to {found['acceptance_last']:.3f}, "
                f"by {found['acceptance_drift']:+.3f} [{low:+.3f}, {high:+.3f}] (allowed {soak.max_drift:g})"
            )
    for what, words in _WORDS.items():
        most, seen = getattr(soak, f"max_{what}_p99_ms"), found.get(f"{what}_p99_ms")
        if most is not None and seen is not None and seen > most:
            reasons.append(f"p99 {words} {seen:.4g} ms (allowed {most:g})")
    return reasons


def _senseless(found: Measurements) -> Iterator[str]:
    """What cannot be, or tells nothing."""
    if not 0 <= found.get("acceptance", 0.0) <= 1:
        yield f"the server says that it accepted {found['acceptance']:.2f} tokens for each it proposed"
    if "tok_s" in found and found["tok_s"] <= found["requests_s"]:
        yield "every answer is empty: its first token ends it"
    if "total_p50_ms" in found and not 0 < found["ttft_p50_ms"] <= found["total_p50_ms"]:
        yield f"answers took {found['total_p50_ms']:g} ms, their first tokens {found['ttft_p50_ms']:g} ms"
    if found.get("memory_mb") == 0:
        yield "the server's memory could not be read, so nothing is known of its growth"


def in_words(found: Measurements) -> str:
    """A soak in a sentence."""
    said = [f"{found['requests']:g} requests, {found['errors']:g} failed"]
    if "tok_s" in found:
        said.append(f"{found['tok_s']:.1f} tok/s")
    for what, words in _WORDS.items():
        if f"{what}_p50_ms" in found:
            p50, p95, p99 = (found[f"{what}_p{p}_ms"] for p in PERCENTILES)
            said.append(f"{words} p50/p95/p99 {p50:.4g}/{p95:.4g}/{p99:.4g} ms")
    if "acceptance" in found:
        said.append(f"acceptance {found['acceptance']:.3f}")
    if "acceptance_drift" in found:
        low, high = found["acceptance_drift_low"], found["acceptance_drift_high"]
        said.append(f"drift {found['acceptance_drift']:+.3f} [{low:+.3f}, {high:+.3f}]")
    elif "acceptance" in found:
        said.append("drift not judged: too few requests")
    if "memory_slope_mb_min" in found:
        said.append(f"memory {found['memory_mb']:.0f} MiB, {found['memory_slope_mb_min']:+.3g} MiB/min")
    return ", ".join(said)


def errors_by_kind(intervals: Sequence[Interval]) -> Mapping[str, int]:
    """How many requests failed in which way."""
    return sum((Counter(interval["errors"]) for interval in intervals), Counter[str]())


def memory_slope(intervals: Sequence[Interval]) -> float | None:
    """Of the server's resident memory, in MiB a minute; ``None`` where there are no two readings of one life."""
    slopes = []
    for life in dict.fromkeys(interval["life"] for interval in intervals):
        readings = np.array([r for interval in intervals if interval["life"] == life for r in interval["rss"]])
        readings = readings[:: max(1, len(readings) // _READINGS)]
        if len(readings) >= 2:
            i, j = np.triu_indices(len(readings), 1)
            between = readings[j] - readings[i]
            between = between[between[:, 0] > 0]  # two may be of one moment
            slopes.append(60 * between[:, 1] / between[:, 0])
    return float(np.median(np.concatenate(slopes))) if slopes else None


def _timings(intervals: Sequence[Interval]) -> Measurements:
    answered = [request for interval in intervals for request in interval["requests"]]
    if not answered:
        return {}
    seconds = sum(interval["seconds"] for interval in intervals)
    found: Measurements = {
        "requests_s": len(answered) / seconds,
        "tok_s": sum(request["tokens"] for request in answered) / seconds,
    }
    for name in ("ttft", "total"):
        values = [request[f"{name}_ms"] for request in answered]
        found |= {f"{name}_p{p}_ms": float(np.percentile(values, p)) for p in PERCENTILES}
    gaps = sum((Counter(interval["gaps"]) for interval in intervals), Counter[str]())
    if gaps:
        found |= {f"inter_token_p{p}_ms": _percentile(gaps, p) for p in PERCENTILES}
    return found


def _percentile(counts: Mapping[str, int], p: float) -> float:
    """The least value that at least p% of all do not exceed."""
    values = sorted((float(value), count) for value, count in counts.items())
    reached = np.cumsum([count for _, count in values])
    return values[int(np.searchsorted(reached, reached[-1] * p / 100))][0]


def _acceptance(intervals: Sequence[Interval], seed: int) -> Measurements:
    """Nothing where the server does not say what it drafted."""
    third = len(intervals) // 3
    first, last = (_drafted(some) for some in (intervals[:third], intervals[len(intervals) - third :]))
    everything = _drafted(intervals)
    if not len(everything):
        return {}
    found: Measurements = {"acceptance": _share(everything)}
    if min(len(first), len(last)) < _ENOUGH:
        return found
    random = np.random.default_rng(seed)
    # Whole requests are drawn, not tokens: those of one request stand or fall together.
    drifts = [
        _share(random.choice(last, len(last))) - _share(random.choice(first, len(first))) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(drifts, [2.5, 97.5])
    return found | {
        "acceptance_first": _share(first),
        "acceptance_last": _share(last),
        "acceptance_drift": _share(last) - _share(first),
        "acceptance_drift_low": float(low),
        "acceptance_drift_high": float(high),
    }


def _drafted(intervals: Sequence[Interval]) -> NDArray[np.float64]:
    """``[requests, 2]``: tokens proposed and accepted, of those that had any proposed."""
    requests = [request for interval in intervals for request in interval["requests"]]
    pairs = [(request["proposed"], request["accepted"]) for request in requests if request["proposed"]]
    return np.array(pairs, dtype=float).reshape(-1, 2)


def _share(pairs: NDArray[np.float64]) -> float:
    proposed, accepted = pairs.sum(axis=0)
    return float(accepted / proposed)


def _rate(requests: Sequence[Mapping[str, Any]]) -> float | None:
    pairs = _drafted([{"requests": requests}])
    return _share(pairs) if len(pairs) else None
