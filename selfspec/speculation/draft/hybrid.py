"""Two drafts: a lookup first, and a learned one where it has nothing, or beside it.

Without ``draft.budget`` each row is served by one of them: by the learned draft where the lookup finds nothing
that it believes (``draft.min_match``). With a budget the learned draft, as a chain, is asked for every row, and the
lookup's tree is laid over it, its likeliest tokens first, up to that many tokens in all. Gates doubt the learned
draft only.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selfspec.config import Draft as DraftConfig
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.speculation.draft import suffix
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.sequence import Seq


@dataclass(slots=True)
class Memories:
    """What each of the two drafts keeps for a row."""

    lookup: Any = None
    learned: Any = None


class Hybrid(Draft):
    """A batch may hold rows served by either, and by both."""

    def __init__(self, model: Model, lookup: Draft, learned: Draft, budget: int | None) -> None:
        super().__init__(model)
        self.lookup, self.learned, self.budget, self.layers = lookup, learned, budget, learned.layers

    def nodes(self, k: int) -> int:
        """What the larger of the two needs; with a budget, whatever fills it."""
        most = max(self.lookup.nodes(k), self.learned.nodes(k))
        return most if self.budget is None else max(most, 1 + self.budget)

    def prefill(self, tokens: Sequence[int], cache: KVCache, at: AttentionMetadata, row: Seq) -> tuple[Tensor, int]:
        """The learned draft's share; a lookup has none."""
        row.memory = Memories()
        with _remembering("learned", [row]):
            return self.learned.prefill(tokens, cache, at, row)

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """The lookup's trees, and the learned draft's where they are wanted."""
        with _remembering("lookup", rows):
            found = self.lookup.propose(rows, ks, gate, cache).trees
        wanted = [k if self.budget is not None or len(tree) == 1 else 0 for k, tree in zip(ks, found, strict=True)]
        if not any(wanted):
            return Proposal(found)
        with _remembering("learned", rows):
            learned = self.learned.propose(rows, wanted, gate, cache)
        trees = [merged(base, over, self.budget) for base, over in zip(learned.trees, found, strict=True)]
        if learned.hidden is None:
            return Proposal(trees)
        return Proposal(trees, self._completed(learned, trees, cache), learned.depth)

    def observe(self, row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        """Tells both."""
        for name, draft in (("lookup", self.lookup), ("learned", self.learned)):
            with _remembering(name, [row]):
                draft.observe(row, index, tokens, states, cache)

    def _completed(self, learned: Proposal, trees: Sequence[Tree], cache: KVCache) -> Tensor:
        """The residual stream of all nodes at the learned draft's depth: the lookup's nodes are run that far, too.

        A batch is run from one node on; what some rows have run beyond it already is run again.
        """
        assert learned.hidden is not None, "asked for where layers were run"
        counts = [len(tree) for tree in learned.trees]
        if counts == [len(tree) for tree in trees]:
            return learned.hidden
        first = min(counts)
        at = cache.place(trees, first)
        tokens = [token for tree in trees for token in tree.tokens[first:]]
        rest = self.model.run(self.model.embed(tokens, at), cache, at, 0, learned.depth)
        known = [own[:first] for own in torch.split(learned.hidden, counts)]
        later = torch.split(rest, [len(tree) - first for tree in trees])
        return torch.cat([part for row in zip(known, later, strict=True) for part in row])


def merged(base: Tree, over: Tree, budget: int | None) -> Tree:
    """One tree of the nodes of both, those of ``base`` first; others are added up to ``budget`` nodes below the root.

    Tokens that were drawn stand alone: verification must know the whole of what they were drawn from.
    """
    if base.drawn_from is not None:
        return base
    tree = replace(base, tokens=list(base.tokens), parents=list(base.parents))
    places = {0: 0}
    for node, (token, parent) in enumerate(zip(over.tokens[1:], over.parents[1:], strict=True), 1):
        if parent not in places:
            continue  # there was no room for it
        place = tree.child(places[parent], token)
        if place is None and (budget is None or len(tree) <= budget):
            place = tree.add(places[parent], token)
        if place is not None:
            places[node] = place
    return tree


@contextmanager
def _remembering(name: str, rows: Sequence[Seq]) -> Iterator[None]:
    """Gives rows the memory of one of the two drafts, as if it were alone."""
    both: list[Memories] = [row.memory for row in rows]
    for row, memories in zip(rows, both, strict=True):
        row.memory = getattr(memories, name)
    try:
        yield
    finally:
        for row, memories in zip(rows, both, strict=True):
            setattr(memories, name, row.memory)
            row.memory = memories


def make(draft: DraftConfig, model: Model, head: Head | None) -> Hybrid:
    """Both drafts that a config names; ``width`` is the lookup's, and the learned draft a chain."""
    assert draft.lookup is not None, "checked by the plan"
    lookup = _module(draft.lookup).make(replace(draft, name=draft.lookup), model, head)
    learned = _learned(draft)
    return Hybrid(
        model, lookup, _module(learned.name).make(learned, model, head if learned.fitted else None), draft.budget
    )


def fit(model: Model, train: list[Trace], heldout: list[Trace], draft: DraftConfig, seed: int) -> Head:
    """What either of the two wants fitted, in one head; the facts are the learned draft's, if it has any."""
    learned, head = _learned(draft), Head({}, {})
    if draft.corpus:
        head = suffix.fit(model, train, heldout, draft, seed)
    if learned.fitted:
        other = _module(learned.name).fit(model, train, heldout, learned, seed)
        head = Head({**head.tensors, **other.tensors}, {**head.facts, **other.facts})
    return head


def _learned(draft: DraftConfig) -> DraftConfig:
    assert draft.learned is not None, "checked by the plan"
    return replace(draft, name=draft.learned, corpus=False, width=1, budget=None)


def _module(name: str) -> Any:
    return importlib.import_module(f"selfspec.speculation.draft.{name}")
