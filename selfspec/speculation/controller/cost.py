"""The K that gives the most tokens per second, by what cycles have cost and how much of their drafts stood.

    rate(K) = (1 + sum over j <= K of a_1 ... a_j) / cost(K)

a_i is the chance that position i stands where all before it do, cost(K) what a cycle takes in which K was
asked for. Both are measured, as they come out: with what gates stop, lookups do not find and trees add.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from omegaconf import MISSING

from selfspec.axes import ControllerOptions
from selfspec.lazy import np
from selfspec.options import bounded
from selfspec.speculation.controller.base import Controller
from selfspec.types import Cycle

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARE = 0.005
"""Of all time, how much may be lost by trying what is not thought best."""
KNOWN = 3
"""Cycles after which a cost is known: the fewest that have a median."""
RECENT = 9
"""Cycles that tell the machine's present pace."""
STALL = 2.0
"""A cycle above so many medians counts as this many: the machine was busy elsewhere."""
EVIDENCE = 8
"""Cycles of a request's own that weigh as much as what is known of all requests."""
REQUESTS = 8
"""Windows of drafted cycles for which what is known of all requests is remembered."""
HOPE = 0.5
"""The acceptance taken for granted before anything is known."""

Array: TypeAlias = "NDArray[np.float64]"


@dataclass
class Options(ControllerOptions):
    """The most that K may be, and how much is remembered."""

    name: str = "cost"
    window: int = bounded(MISSING, 1)
    """How many cycles are looked back on."""

    learns: ClassVar[bool] = True

    def make(self, seed: int = 0) -> Cost:
        """A controller that has learned nothing yet."""
        return Cost(self.k, self.window)


class Costs:
    """Milliseconds of a cycle by batch size and the K asked for, in which the machine's pace is set apart.

    A neighbour that slows the machine down slows every K down: without a common pace, whatever K is in use
    would look dear beside memories of better times. The pace is how the last few cycles compare with what is
    usual of them; that being a median over many more, the change of a few does not reach it.
    """

    def __init__(self, most: int, window: int) -> None:
        self.most, self.window = most, window
        self._times: dict[int, dict[int, deque[float]]] = {}
        self._recent: deque[float] = deque([1.0] * RECENT, RECENT)
        self._usual: dict[int, dict[int, float]] = {}
        self._typical: dict[int, dict[int, float]] = {}
        self._curves: dict[int, Array] = {}

    @property
    def pace(self) -> float:
        """How long cycles take now, in units of what they usually take."""
        return median(self._recent)

    def observe(self, batch: int, k: int, ms: float) -> None:
        """What a cycle took."""
        if k in self._usual.get(batch, {}):
            # Before this cycle is stored: what is stored is free of the pace, this cycle's share in it included.
            self._recent.append(ms / self._usual[batch][k])
        times = self._times.setdefault(batch, {}).setdefault(k, deque(maxlen=self.window))
        times.append(ms / self.pace)
        self._learn(batch, k)

    def _learn(self, batch: int, k: int) -> None:
        times = self._times[batch][k]
        if len(times) >= KNOWN:
            usual = median(times)
            self._usual.setdefault(batch, {})[k] = usual
            # A rate is of mean times, so it is the mean that counts; stalls are cut off, as they would be most of it.
            self._typical.setdefault(batch, {})[k] = fmean(min(ms, STALL * usual) for ms in times)
            # All of them: other batch sizes may have borrowed this one's shape.
            self._curves.clear()

    def _spanned(self, batch: int) -> bool:
        return {0, self.most} <= self._typical.get(batch, {}).keys()

    def unknown(self, batch: int) -> int | None:
        """The K to ask for before there is a :meth:`curve`: 0; and the most in turn, where no batch has one yet."""
        times = self._times.get(batch, {})
        # Trying the largest K costs most, so once is enough: other batch sizes take that curve's shape.
        ends = (0,) if any(map(self._spanned, self._typical)) else (0, self.most)
        fewest = min(ends, key=lambda k: len(times.get(k, ())))
        return fewest if len(times.get(fewest, ())) < KNOWN else None

    def curve(self, batch: int) -> Array:
        """Float64 ``[most + 1]``: what a cycle takes at each K, in milliseconds; never less than at a smaller one.

        What was not measured is interpolated. A batch size of which only the near end is known has the nearest
        one's curve, scaled to what is.
        """
        if batch not in self._curves:
            shape = np.ones(self.most + 1)
            if not self._spanned(batch):
                nearest = min(filter(self._spanned, self._typical), key=lambda other: abs(other - batch))
                shape = self.curve(nearest) / self.pace
            known = sorted(self._typical[batch].items())
            scale = np.interp(range(self.most + 1), [k for k, _ in known], [ms / shape[k] for k, ms in known])
            # More tokens never cost less: a dip is noise, and would draw the choice to itself.
            self._curves[batch] = np.maximum.accumulate(shape * scale)
        return self.pace * self._curves[batch]

    def state(self) -> dict[str, Any]:
        """All cycles it remembers."""
        times = {str(batch): {str(k): [*ms] for k, ms in own.items()} for batch, own in self._times.items()}
        return {"recent": [*self._recent], "times": times}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.__init__(self.most, self.window)  # type: ignore[misc]
        self._recent.clear()
        self._recent.extend(state["recent"])
        for batch, own in state["times"].items():
            self._times[int(batch)] = {int(k): deque(ms, self.window) for k, ms in own.items()}
            for k in own:
                self._learn(int(batch), int(k))


class Cost(Controller):
    """Asks for the K of the highest rate, and seldom for another, to see whether that is still so.

    A row decoded alone has a K of its own, by its own acceptance so far; the rows of a batch share the
    costs of a cycle, and so the choice.
    """

    def __init__(self, k: int, window: int) -> None:
        super().__init__(k)
        self.window = window
        self.costs = Costs(k, window)
        self._all = np.zeros((2, k + 1))
        self._purse = 0.0
        self._plain_next = True
        self._asked: int | None = None
        self._settled: tuple[int, float] | None = None

    def num_draft_tokens(self, history: Sequence[Cycle], batch: int) -> int:
        """One answer for all rows of a cycle."""
        # Called for each row, answered once a cycle: a second answer would charge the purse for one trial twice.
        if self._asked is None and self._stays_plain(history, batch):
            self._asked = 0
        if self._asked is None:
            # Plain cycles say nothing about acceptance; with them, a window would forget it while nothing is drafted.
            drafted = islice((cycle for cycle in reversed(history) if cycle.k_asked), self.window)
            self._asked = self._choose(_counts(drafted if batch == 1 else (), self.k), batch)
        return self._asked

    def _stays_plain(self, history: Sequence[Cycle], batch: int) -> bool:
        """Whether nothing has been learned, or saved up, since it was best to draft nothing: no need to think."""
        settled, self._settled = self._settled, None
        if settled is None or settled[0] != batch or self._purse >= settled[1] or (batch == 1 and not history):
            return False
        self._settled = settled
        return True

    def _choose(self, own: Array, batch: int) -> int:
        unknown = self.costs.unknown(batch)
        if unknown is not None:
            return unknown
        tokens, cost = self._tokens(own), self.costs.curve(batch)
        rate = tokens / cost
        ranked = np.argsort(-rate, kind="stable")
        best, other = int(ranked[0]), int(ranked[1])
        if best > 0 and self._plain_next:
            other = 0
        # Milliseconds that `other` takes longer than the best K does for as many tokens.
        loses = float(cost[other] - tokens[other] / rate[best])
        if loses > self._purse:
            # Plain cycles teach nothing of acceptance: the choice stands until the purse holds a trial's price.
            self._settled = (batch, loses) if best == 0 else None
            return best
        self._purse -= loses
        self._plain_next = not self._plain_next
        return other

    def _tokens(self, own: Array) -> Array:
        """Float64 ``[K + 1]``: the tokens expected of a cycle at each K."""
        stood, tried = _stood(own)
        all_stood, all_tried = _stood(self._all)
        chance, chances = HOPE, []
        for j in range(self.k):  # a position of which little is known is like the one before
            chance = (all_stood[j] + KNOWN * chance) / (all_tried[j] + KNOWN)
            chances.append((stood[j] + EVIDENCE * chance) / (tried[j] + EVIDENCE))
        return 1 + np.concatenate(([0.0], np.cumsum(np.cumprod(chances))))

    def observe(self, cycles: list[Cycle]) -> None:
        """Learns what the cycle cost and how much stood."""
        ms = cycles[0].draft_ms + cycles[0].verify_ms
        # A pass is as deep as its row that drafts furthest; rows near their end asked for less.
        self.costs.observe(len(cycles), max(cycle.k_asked for cycle in cycles), ms)
        self._purse += SHARE * ms
        drafted = [cycle for cycle in cycles if cycle.k_asked]
        # Decays by drafted cycles only, for the same reason as `history` is filtered: plain ones are no evidence.
        self._all *= (1 - 1 / (REQUESTS * self.window)) ** len(drafted)
        self._all += _counts(drafted, self.k)
        self._asked = None

    def state(self) -> dict[str, Any]:
        """Costs, acceptance, and what may be spent on trying."""
        return {"costs": self.costs.state(), "acceptance": self._all.tolist(), "purse": self._purse}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.costs.restore(state["costs"])
        self._all, self._purse = np.array(state["acceptance"]), state["purse"]


def _counts(cycles: Iterable[Cycle], most: int) -> Array:
    """Float64 ``[2, most + 1]``: cycles by how many tokens stood; and those of them in which no more were asked for."""
    counts = np.zeros((2, most + 1))
    for cycle in cycles:
        counts[0, cycle.accepted] += 1
        counts[1, cycle.accepted] += cycle.accepted == cycle.k_asked
    return counts


def _stood(counts: Array) -> tuple[list[float], list[float]]:
    """For each position: how often it stood, and in how many cycles it was asked for and all before it stood."""
    at_least = counts[0, ::-1].cumsum()[::-1]
    return at_least[1:].tolist(), (at_least - counts[1])[:-1].tolist()
