"""Two drafts: a lookup first, and a learned one where it has nothing, or beside it.

Without ``draft.budget`` each row is served by one of them: by the learned draft where the lookup finds nothing
that it believes (``draft.min_match``). With a budget the learned draft, as a chain, is asked for every row, and the
lookup's tree is laid over it, its likeliest tokens first, up to that many tokens in all. Gates doubt the learned
draft only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any, get_type_hints

from omegaconf import MISSING

from selfspec.axes import DRAFT, DraftOptions
from selfspec.errors import ConfigError
from selfspec.lazy import torch
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.options import bounded, setting
from selfspec.speculation.draft.base import Draft, Proposal, check_chain
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Own(DraftOptions):
    """Which two drafts; their own settings are among its (:func:`_with_those_of_parts`)."""

    name: str = "hybrid"
    lookup: str = setting(MISSING)
    """The draft asked first."""
    learned: str = setting(MISSING, fact=True)
    """The draft asked where the first has nothing."""
    budget: int | None = bounded(None, 1, 63, use=True)
    """The most draft tokens verified together."""

    @property
    def parts(self) -> tuple[DraftOptions, DraftOptions]:
        """The lookup, and the learned draft as a chain: ``width`` is the lookup's."""
        return self._part(self.lookup), self._part(self.learned, width=1, budget=None, worth=0.0)

    def _part(self, name: str, **fixed: Any) -> DraftOptions:
        option = DRAFT.options[name]
        own = {f.name: fixed.get(f.name, getattr(self, f.name)) for f in fields(option) if f.name != "name"}
        return option(**{key: value for key, value in own.items() if value is not None})

    @property
    def learned_from_states(self) -> bool:
        """What the learned draft is."""
        return self.parts[1].learned_from_states

    @property
    def fitted(self) -> bool:
        """Either of the two."""
        return any(part.fitted for part in self.parts)

    @property
    def label(self) -> str:
        """Both names, and the lookup's width."""
        width = self.get("width", 1)
        return f"{self.lookup}+{self.parts[1].label}" + (f"/w{width}" if width > 1 else "")

    def check(self) -> None:
        """Refuses what cannot be a part, lacks a setting, or has no use for one."""
        options = DRAFT.options
        for role in ("lookup", "learned"):
            allowed, asked = [name for name, option in options.items() if option.role == role], getattr(self, role)
            if asked not in allowed:
                raise ConfigError(f"draft.{role}={asked}: allowed are {', '.join(allowed)}")
        learned = options[self.learned]
        lookups = [option for option in options.values() if option.role == "lookup"]
        own: list[type[DraftOptions]] = [_Own, *lookups, learned]
        known = {f.name for option in own for f in fields(option)} - {"worth"}  # the learned draft is a chain
        for key, value in self.changed().items():
            if key not in known:
                shown = str(value).lower() if isinstance(value, bool) else getattr(value, "name", value)
                raise ConfigError(f"draft.{key}={shown}: means nothing to draft.learned={self.learned}")
        for option in (options[self.lookup], learned):
            for f in fields(option):
                if f.default == MISSING and getattr(self, f.name) is None:
                    raise ConfigError(f"draft.{f.name}=null: draft={option.name} needs one")
        check_chain(self.get("sample", False), self.get("width", 1))
        for part in self.parts:
            part.check()

    def make(self, model: Model, head: Head | None) -> Hybrid:
        """Both drafts."""
        lookup, learned = self.parts
        first, then = (part.make(model, head if part.fitted else None) for part in (lookup, learned))
        return Hybrid(model, first, then, self.budget)

    def fit(self, model: Model, train: list[Trace], heldout: list[Trace], seed: int) -> Head:
        """What either of the two wants fitted, in one head; the facts are the learned draft's, if it has any."""
        made = [part.fit(model, train, heldout, seed) for part in self.parts if part.fitted]
        tensors, facts = ({k: v for head in made for k, v in getattr(head, of).items()} for of in ("tensors", "facts"))
        return Head(tensors, facts)


def _with_those_of_parts(own: type[_Own]) -> type[_Own]:
    """The same with the settings of all drafts that can be a part; ``None``: not given."""
    added: dict[str, tuple[str, Any, Any]] = {}
    for option in DRAFT.others("hybrid").values():
        kinds = get_type_hints(option)
        for f in fields(option) if option.role else ():
            if f.name not in {each.name for each in fields(own)}:
                required = f.default == MISSING
                default = field(default=None if required else f.default, metadata=f.metadata)
                added.setdefault(f.name, (f.name, kinds[f.name] | None if required else kinds[f.name], default))
    made = make_dataclass("Options", added.values(), bases=(own,))
    made.__module__ = __name__
    return made


Options = _with_those_of_parts(_Own)


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
