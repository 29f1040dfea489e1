"""What drafting costs and what it brings, by the cycles of a bench; where it breaks even, and which K pays. Pure.

Everything is in units that a bench has measured itself:

- a *pass* is a cycle of plain decoding at the same batch size: so long a token takes without a draft;
- a *draft step* is one position ahead: the draft's milliseconds over the positions that it looked at;
- *stand*: accepted draft tokens / those and the first ones that fell: the chance a of a token all of whose forerunners
  stood. Acceptance by position says how far it is the same everywhere;
- *break-even*: the chance at which a cycle brings as many tokens as passes it costs,
  1 + sum over j of P(drafts reach j) a^j = cost of a cycle in passes;
- the *oracle* drafts at the same cost as many tokens, all of which stand: nothing above it can come of a better draft.

``profile`` goes on to other K and batch sizes than were asked for, as ``docs/profile.md`` says.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfspec.metrics import Packed, Unit
from selfspec.types import Measurements

VERSION = 1
"""Of the form of ``speculation_profile.json``."""
STALL = 2.0
"""A time above so many medians of its like counts as this many: the machine was busy elsewhere."""
KNOWN = 8
"""Cycles after which what a batch size costs is known."""

Array = NDArray[np.float64]


class Step(NamedTuple):
    """One pass of a batch: a cycle of each of its requests.

    Attributes:
        batch: requests that shared it, and its milliseconds.
        k, steps, accepted: of each: positions asked for, looked at, and accepted.
        depth, nodes: of each: positions that it proposed for, and tokens for them (more, of a tree).
    """

    draft_ms: float
    verify_ms: float
    batch: int
    k: Array
    steps: Array
    depth: Array
    nodes: Array
    accepted: Array

    @property
    def whole(self) -> bool:
        """Whether all its requests are here: an engine may tell the times of each by itself."""
        return len(self.k) == self.batch


def measured(units: Sequence[Unit]) -> Measurements:
    """What drafting cost and brought, without a unit; nothing where nothing was drafted, or no cycle was timed."""
    passes = _passes(units)
    timed = [step for step in _steps(units, "configured") if step.whole and step.batch in passes]
    plain_ms = sum(passes[step.batch] for step in timed)
    depth, accepted = (_joined(timed, name) for name in ("depth", "accepted"))
    if not plain_ms or not depth.any():
        return {}
    looked = sum(passes[step.batch] * step.steps.max() for step in timed)
    rows = [_rows(step) for step in timed]
    draft_ms, verify_ms = (_cut([getattr(step, name) for step in timed], rows) for name in ("draft_ms", "verify_ms"))
    cost = (draft_ms + verify_ms).sum() / plain_ms
    found = {
        "cost_cycle": cost,
        "stand": accepted.sum() / (accepted + (accepted < depth)).sum(),
        "oracle_speedup": (1 + depth.mean()) / cost,
    }
    if draft_ms.any():  # where drafting is not told apart, it is in the cycle's
        found["cost_draft_step"] = draft_ms.sum() / looked
    if (even := break_even(depth, cost)) is not None:
        found["break_even"] = even
    return {name: float(value) for name, value in found.items()}


def break_even(depth: Array, cost: float) -> float | None:
    """The chance at which drafts so deep bring what they cost, in passes; ``None``: none does.

    Args:
        depth: of every cycle, positions proposed for.
    """
    reach = np.asarray([(depth >= j).mean() for j in range(1, int(depth.max(initial=0)) + 1)])
    powers = np.arange(1, len(reach) + 1)
    low, high = 0.0, 1.0
    if 1 + reach.sum() < cost:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 + (reach * middle**powers).sum() >= cost else (middle, high)
    return high


def profile(units: Sequence[Unit]) -> dict[str, Any]:
    """Acceptance, costs and the K that pays, as JSON values; the fields are told in ``docs/profile.md``."""
    steps = [*_steps(units, "configured")]
    k, depth, accepted = (_joined(steps, name) for name in ("k", "depth", "accepted"))
    return {
        "version": VERSION,
        "acceptance": _by_position(k, depth, accepted),
        "accepted_lengths": np.bincount(accepted.astype(int)).tolist(),
        "cost": (costs := [*_costs(units, steps)]),
        "schedule": [{"batch": cost["batch"], **max(cost["k"], key=lambda one: one["speedup"])} for cost in costs],
    }


def _by_position(k: Array, depth: Array, accepted: Array) -> list[dict[str, float]]:
    found = []
    for j in range(1, int(depth.max(initial=0)) + 1):
        reached = (depth >= j) & (accepted >= j - 1)
        asked, stood = k >= j, accepted >= j
        one = {"position": j, "asked": int(asked.sum()), "drafted": int((depth >= j).sum())}
        shares = {
            "conditional": float(stood.sum() / reached.sum()) if reached.any() else None,
            "marginal": float((stood & asked).sum() / asked.sum()) if asked.any() else None,
        }
        found.append(one | {name: share for name, share in shares.items() if share is not None})
    return found


def _costs(units: Sequence[Unit], steps: Sequence[Step]) -> Iterator[dict[str, Any]]:
    """By batch size: what a pass, a draft step and a verified row take, and what each K would bring."""
    passes, most = _passes(units), int(max((step.k.max() for step in steps), default=0))
    drafting = [step for step in steps if step.k.any()]
    tokens = [1.0]
    for k in range(1, most + 1):  # what a longer draft brought tells what a shorter one would have brought
        accepted = _joined(drafting, "accepted")[_joined(drafting, "k") >= k]
        tokens.append(1 + float(np.minimum(accepted, k).mean()))
    for batch, pass_ms in sorted(passes.items()):
        own = [step for step in drafting if step.whole and step.batch == batch]
        if len(own) < KNOWN:
            continue
        draft = line([step.steps.max() for step in own], [step.draft_ms for step in own])
        verify = line([_rows(step) for step in own], [step.verify_ms for step in own])
        ks = [{"K": 0, "speedup": 1.0}]
        for k in range(1, most + 1):
            if of := [step for step in own if step.k.max() >= k]:
                looked = np.mean([min(step.steps.max(), k) for step in of])
                rows = np.mean([_rows(step, k) for step in of])
                ms = draft[0] + draft[1] * looked + verify[0] + verify[1] * rows
                ks.append({"K": k, "speedup": float(tokens[k] * pass_ms / ms)})
        yield {
            "batch": batch,
            "cycles": len(own),
            "pass_ms": pass_ms,
            "draft_ms": draft[0],
            "draft_step_ms": draft[1],
            "verify_ms": verify[0],
            "verify_row_ms": verify[1],
            "k": ks,
        }


def _rows(step: Step, k: float = np.inf) -> float:
    """Tokens that it would have verified of drafts of up to k positions: of a tree, as many a position as it had."""
    return float((1 + step.nodes * np.minimum(step.depth, k) / np.maximum(step.depth, 1)).sum())


def line(x: Sequence[float], ms: Sequence[float]) -> tuple[float, float]:
    """Least squares ``a + b x`` of times, neither less than 0; of one x alone, all is b x."""
    at = np.asarray(x, float)
    seen = np.unique(at)
    cut = _cut(ms, at)
    typical = np.asarray([cut[at == one].mean() for one in seen])
    weight = np.asarray([(at == one).sum() for one in seen], float)
    if len(seen) == 1:
        return (0.0, float(typical[0] / seen[0])) if seen[0] else (float(typical[0]), 0.0)
    middle, mean = (weight * seen).sum() / weight.sum(), (weight * typical).sum() / weight.sum()
    slope = (weight * (seen - middle) * (typical - mean)).sum() / (weight * (seen - middle) ** 2).sum()
    slope = float(min(max(slope, 0.0), mean / middle))  # the line meets 0 at no x above 0
    return float(mean - slope * middle), slope


def _passes(units: Sequence[Unit]) -> dict[int, float]:
    """Milliseconds of a cycle of plain decoding, by batch size; none where nobody has timed it."""
    times: dict[int, list[float]] = {}
    for step in _steps(units, "plain"):
        times.setdefault(step.batch, []).append(step.draft_ms + step.verify_ms)
    return {
        batch: ms
        for batch, own in times.items()
        if len(own) >= KNOWN and (ms := float(_cut(own, [batch] * len(own)).mean()))
    }


def _cut(ms: Sequence[float], like: Sequence[float] | Array) -> Array:
    """Times, with stalls cut off among those of the same kind: a rate is of mean times, of which they would be most."""
    found, kinds = np.asarray(ms, float), np.asarray(like)
    for kind in np.unique(kinds):
        own = kinds == kind
        found[own] = np.minimum(found[own], STALL * np.median(found[own]))
    return found


def _joined(steps: Sequence[Step], name: str) -> Array:
    return np.concatenate([np.zeros(0), *(getattr(step, name) for step in steps)])


def _steps(units: Sequence[Unit], way: str) -> Iterator[Step]:
    """The cycles of all units, those of one pass together: its requests have the same times, to the last digit."""
    for unit in units:
        passes: dict[tuple[float, ...], list[Mapping[str, Any]]] = {}
        for answer in unit[way]:
            seen: Counter[tuple[float, ...]] = Counter()
            for cycle in _cycles(answer):
                times = (cycle["draft_ms"], cycle["verify_ms"], cycle["batch"])
                seen[times] += 1  # two cycles of one request are two passes, however alike
                passes.setdefault((*times, seen[times]), []).append(cycle)
        for (draft_ms, verify_ms, batch, _), those in passes.items():
            k, steps, depth, nodes, accepted = np.asarray(
                [[c["k_asked"], _looked(c), c["depth"], c["proposed"], c["accepted"]] for c in those], float
            ).T
            yield Step(draft_ms, verify_ms, int(batch), k, steps, depth, nodes, accepted)


def _cycles(answer: Packed) -> Iterator[Mapping[str, Any]]:
    columns = answer["cycles"]
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _looked(cycle: Mapping[str, Any]) -> int:
    """Positions that were drafted for: of a chain, with the token that the gate doubted."""
    depth: int = cycle["depth"]
    chain = cycle["proposed"] == depth
    return max(depth, min(len(cycle["signals"]), cycle["k_asked"])) if chain else depth
