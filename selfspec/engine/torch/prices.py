"""What a cycle costs on this machine now: ways to decode, in turn, so that what slows one down hits all."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from statistics import median
from typing import TypeVar

from selfspec.speculation.decode import Speculation
from selfspec.speculation.gate.base import Gate
from selfspec.types import Completion, Request

CYCLES = 8
"""Tokens that a draft of which nothing stands is decoded for in a turn."""
TURNS = 3
PROMPT = 32
"""Tokens at the fewest of the prompt that is answered."""

W = TypeVar("W", bound=Hashable)


def endless(gate: Gate) -> Gate:
    """The same gate, at the same cost, which never stops a draft: so all cycles are of the length asked for."""
    made = copy(gate)
    made.stops = lambda signal: False  # type: ignore[method-assign]
    return made


def cycle_ms(
    ways: Mapping[W, Speculation],
    decode: Callable[[Speculation, Sequence[Request]], Sequence[Completion]],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: int,
) -> dict[W, float]:
    """Of every way, the median of its whole cycles in the turn in which it was least disturbed, in ms.

    Args:
        decode: requests, in such a way.
        pairs: (prompt, answer); a short prompt is decoded on from.
        batch: requests decoded at once.
    """
    prompt = min((prompt for prompt, _ in pairs if len(prompt) >= PROMPT), key=len, default=pairs[0][0])
    most = max(way.controller.k for way in ways.values())
    requests = [Request(tuple(prompt), 1 + CYCLES + most, ignore_eos=True)] * batch
    took = defaultdict[W, list[float]](list)
    for _ in range(TURNS):
        for name, way in ways.items():
            k, answers = way.controller.k, decode(way, requests)
            cycles = [cycle for answer in answers for cycle in answer.cycles if cycle.k_asked == k]
            took[name] += [median(cycle.draft_ms + cycle.verify_ms for cycle in cycles)]
    return {name: min(times) for name, times in took.items()}
