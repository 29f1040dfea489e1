"""What came of drafts: the cycle records that gates and controllers learn from, pieced together from vLLM's steps.

A draft is made at the end of one step and judged in the next one that its request is in.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfspec.types import Cycle


@dataclass(slots=True)
class Drafted:
    """What was drafted for a request and not yet judged; ``k_asked``: how much was to be, where there was room."""

    k_asked: int
    tokens: list[int] = field(default_factory=list)
    signals: list[float] = field(default_factory=list)


class Record:
    """Drafts that are to be judged, and the cycles of the requests that are being decoded.

    Attributes:
        totals: cycles, draft steps, tokens run in them, proposed and accepted tokens, and seconds spent drafting.
    """

    def __init__(self) -> None:
        self.pending: dict[str, Drafted] = {}
        self.cycles: dict[str, list[Cycle]] = {}
        self.totals: Counter[str] = Counter()
        self._began = self._ended = 0.0

    def judge(
        self, ids: Sequence[str], sampled: Sequence[Sequence[int]], verified: Sequence[list[int]], now: float
    ) -> list[Cycle]:
        """The cycles that a step has completed.

        A draft that was not verified as it was made (its request was preempted, or its last tokens did not fit)
        says nothing about drafting, and is forgotten. So it is near the model's greatest length, where vLLM does
        not ask for drafts and verifies zeros.

        Args:
            ids: the batch's requests, in vLLM's order.
            sampled: the tokens each was given; none where its prompt is still being read.
            verified: the draft tokens that were verified for each.
            now: ``perf_counter`` before anything new is drafted.
        """
        judged = list[tuple[str, Drafted, int]]()
        for id, tokens, those in zip(ids, sampled, verified, strict=True):
            drafted = self.pending.pop(id, None)
            if drafted is not None and tokens and those == drafted.tokens:
                judged.append((id, drafted, len(tokens)))
        cycles = [
            Cycle(
                k_asked=drafted.k_asked,
                proposed=len(drafted.tokens),
                depth=len(drafted.tokens),
                accepted=new - 1,
                new_tokens=new,
                signals=tuple(drafted.signals),
                draft_ms=1e3 * (self._ended - self._began),
                verify_ms=1e3 * (now - self._ended),
                batch=len(judged),
            )
            for _, drafted, new in judged
        ]
        for (id, _, _), cycle in zip(judged, cycles, strict=True):
            self.cycles.setdefault(id, []).append(cycle)
            self.totals.update(cycles=1, proposed=cycle.proposed, accepted=cycle.accepted)
        return cycles

    def history(self, id: str) -> list[Cycle]:
        """A request's cycles so far."""
        return self.cycles.get(id, [])

    def drafted(self, drafts: Mapping[str, Drafted], began: float, ended: float) -> None:
        """Takes up what is to be judged next."""
        self.pending |= drafts
        self._began, self._ended = began, ended
        self.totals.update(seconds=ended - began)  # type: ignore[call-overload]

    def forget(self, alive: Mapping[str, Any]) -> None:
        """Drops requests that are no more."""
        for gone in [id for id in {**self.cycles, **self.pending} if id not in alive]:
            self.cycles.pop(gone, None)
            self.pending.pop(gone, None)
