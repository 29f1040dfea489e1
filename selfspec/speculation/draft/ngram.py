"""Prompt lookup: what followed when these tokens came last (Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding).

No layer is run, and no gate is asked: there is no distribution to doubt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.speculation.draft.base import Draft, LookupOptions, Proposal
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(LookupOptions):
    """How long a match must be."""

    name: str = "ngram"

    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hf": ("max_match", "min_match"),
        "vllm": ("max_match", "min_match"),
    }

    def make(self, model: Model, head: Head | None) -> PromptLookup:
        """The lookup."""
        return PromptLookup(model, self.max_match, self.min_match)

    def vllm(self, folder: Path | None) -> dict[str, Any]:
        """Its own lookup."""
        return {"method": "ngram", "prompt_lookup_max": self.max_match, "prompt_lookup_min": self.min_match}


class PromptLookup(Draft):
    """Copies what followed the longest match of a request's last tokens in its own text, as a chain."""

    def __init__(self, model: Model, max_match: int, min_match: int) -> None:
        super().__init__(model)
        self.max_match, self.min_match = max_match, min_match

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """The k tokens after each row's match; none where there is no match."""
        return Proposal([self._tree(row, k) for row, k in zip(rows, ks, strict=True)])

    def observe(self, row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        """Notes where each run of tokens was last followed by another."""
        if row.memory is None:
            row.memory = Latest(self.max_match, self.min_match)
        row.memory.learn(row.tokens, len(row.tokens) - len(tokens))

    def _tree(self, row: Seq, k: int) -> Tree:
        memory: Latest = row.memory
        start = memory.find(row.tokens)
        return Tree.chain(row.tokens[-1:] if start is None else [row.tokens[-1], *copied(row.tokens, start, k)])


class Latest:
    """For each run of ``min_match`` to ``max_match`` tokens, the place after its latest occurrence that has one."""

    def __init__(self, max_match: int, min_match: int) -> None:
        self.lengths = range(max_match, min_match - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}

    def learn(self, tokens: Sequence[int], first: int) -> None:
        """Takes in ``tokens`` from place ``first`` on; those before are known."""
        for place in range(first, len(tokens)):
            for length in self.lengths:
                if length <= place:
                    self._after[tuple(tokens[place - length : place])] = place

    def find(self, tokens: Sequence[int]) -> int | None:
        """The place after the longest match of the last tokens."""
        places = (self._after.get(tuple(tokens[-length:])) for length in self.lengths if length <= len(tokens))
        return next((place for place in places if place is not None), None)


def copied(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """The tokens from ``start`` on; a copy that reaches the end goes on with itself, as a text that repeats does."""
    copy = list(tokens[start : start + count])
    period = len(tokens) - start
    while len(copy) < count:
        copy.append(copy[-period])
    return copy
