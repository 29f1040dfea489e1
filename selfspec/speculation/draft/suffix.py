"""Suffix lookups: a tree of what followed the last tokens before, likeliest paths first (SuffixDecoding, 2411.04975).

What followed is counted in the request's own text and, where asked, in what earlier requests said and in the
answers of the fit data (REST, 2311.08252). From a context of n tokens after which token t came c(t) times of N, the
share (c(t) / (N + d)) of the probability goes to t, and d / (N + d) is left to the next source, and then to contexts
of n - 1 tokens: interpolated back-off (Witten and Bell 1991) with a fixed doubt d in the place of the number of
different followers. On held-out answers of SmolLM2-135M the tree hardly depends on d, more on what is counted.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, nlargest
from typing import TYPE_CHECKING

from selfspec.lazy import torch
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.options import bounded, setting
from selfspec.speculation import fit as fitting
from selfspec.speculation.draft.base import Draft, LookupOptions, Proposal
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor

OWN_DOUBT, OTHERS_DOUBT = 3.0, 8.0
"""d of the request's own text, and of others': what it said before it says again."""
OTHERS_LONGEST = 4
"""Longer contexts recur in a request's own text only."""
SHARED_TOKENS = 1 << 15
"""Of earlier requests' answers, the latest are remembered."""
KEPT = 16
"""Followers of a context of the fit data: a common token has hundreds, and a tree has no use for them."""
WORTH = 0.05
"""A token less likely than this, times the requests that share a pass, costs more to verify than it brings: of a pass
of SmolLM2-135M that brings 2.4 tokens in 12 ms, one more token to verify takes 0.3 to 0.6, the less the slower memory
is (``docs/results.md``). Around the best, speed hardly depends on it."""


@dataclass
class Options(LookupOptions):
    """Where it looks, and how large its tree is."""

    name: str = "suffix"
    width: int = bounded(1, 1, 16, use=True)
    """Candidates kept at every position: 1 drafts a chain, more a tree."""
    budget: int | None = bounded(None, 1, 63, use=True)
    """The most draft tokens verified together."""
    cross_request: bool = setting(False, use=True)
    """Look into what earlier requests said, too."""
    corpus: bool = setting(False, fact=True)
    """Look into the model's answers to the fit prompts, too (REST, 2311.08252)."""
    head: str | None = setting(None, use=True)
    """A file with such answers, to use instead of having the model give them."""

    @property
    def fitted(self) -> bool:
        """Those answers."""
        return self.corpus

    @property
    def label(self) -> str:
        """With its width."""
        return self.name + (f"/w{self.width}" if self.width > 1 else "")

    def make(self, model: Model, head: Head | None) -> Suffix:
        """The lookup, with the fit data's answers where it wants them."""
        if not self.corpus:
            return Suffix(model, self)
        assert head is not None, "made by the fit stage"
        tokens, lengths = head.tensors["corpus"], head.tensors["corpus_lengths"]
        return Suffix(model, self, counted(torch.split(tokens, lengths.tolist())))

    def fit(self, model: Model, train: list[Trace], heldout: list[Trace], seed: int) -> Head:
        """The answers: ``corpus``, int32 ``[n]``, and how long each is, ``corpus_lengths``, int32 ``[answers]``.

        All of them are kept; how well they predict is measured on those held out with the others only.
        """
        begin = time.perf_counter()
        known, answers = ([trace.tokens[trace.first :].int() for trace in part] for part in (train, [*train, *heldout]))
        measured = Suffix(model, self, counted(known))
        counted_in = time.perf_counter() - begin
        tensors = {"corpus": torch.cat(answers), "corpus_lengths": torch.tensor([len(a) for a in answers]).int()}
        by_position = fitting.agreement(heldout, lambda *asked: _guess(measured, *asked))
        facts = fitting.facts(train, heldout, tensors, by_position)
        return Head(tensors, facts | {"solve_s": round(counted_in, 3)})


class Suffix(Draft):
    """Looks up without running a layer, and so asks no gate."""

    def __init__(self, model: Model, draft: Options, corpus: Counts | None = None) -> None:
        super().__init__(model)
        self.max_match, self.min_match = draft.max_match, draft.min_match
        self.width, self.budget = draft.width, draft.budget
        self.cross_request = Counts(OTHERS_LONGEST, OTHERS_DOUBT, SHARED_TOKENS) if draft.cross_request else None
        self.others = [counts for counts in (self.cross_request, corpus) if counts is not None]

    def nodes(self, k: int) -> int:
        """The root, and as many tokens as the budget allows; without one, k."""
        return 1 + (self.budget or k)

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """For each row the likeliest paths, at most ``width`` tokens after any other."""
        # By the size of the batch: the rows share a pass, and a token makes it longer for all of them.
        return Proposal([self._tree(row, k, WORTH * len(rows)) for row, k in zip(rows, ks, strict=True)])

    def observe(self, row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        """Counts the new tokens in the row's own text and, those of its answer, for all requests to come."""
        first = len(row.tokens) - len(tokens)
        if row.memory is None:
            row.memory = Counts(self.max_match, OWN_DOUBT)
        row.memory.learn(row.tokens, first)
        if self.cross_request is not None:
            self.cross_request.learn(row.tokens, max(first, len(row.request.tokens)))

    def likely(self, own: Counts, context: tuple[int, ...], least: float) -> list[tuple[float, int]]:
        """The ``width`` likeliest tokens after a context, best first, with probabilities of ``least`` or more."""
        found: defaultdict[int, float] = defaultdict(float)
        left, sources = 1.0, [own, *self.others]
        for length in range(min(self.max_match, len(context)), self.min_match - 1, -1):
            suffix = context[-length:]
            for counts in sources:
                total = counts.totals.get(suffix)
                if total is not None:
                    share = left / (total + counts.doubt)
                    for token, count in counts.followers[suffix].items():
                        found[token] += share * count
                    left = share * counts.doubt
            # What is left could lift no new token to `least`; shorter contexts are not looked at.
            if left < least:
                break
        return sorted(((p, token) for token, p in found.items() if p >= least), reverse=True)[: self.width]

    def _tree(self, row: Seq, k: int, worth: float) -> Tree:
        own: Counts = row.memory
        tree, depths, contexts = Tree.chain(row.tokens[-1:]), [0], [tuple(row.tokens[-self.max_match :])]
        best: list[tuple[float, int, int]] = []  # a heap: minus a path's probability, its last node's parent and token

        def look(node: int, p: float) -> None:
            if depths[node] < k:
                # `worth` is of the whole path: the less likely its beginning, the likelier the next token has to be.
                for share, token in self.likely(own, contexts[node], worth / p):
                    heappush(best, (-p * share, node, token))

        look(0, 1.0)
        # No path is likelier than its beginning, so taking the likeliest first gives the likeliest tree of its size.
        while best and len(tree) < self.nodes(k):
            p, parent, token = heappop(best)
            contexts.append((*contexts[parent], token)[-self.max_match :])
            depths.append(depths[parent] + 1)
            look(tree.add(parent, token), -p)
        return tree


class Counts:
    """How often which token followed each context of up to ``max_match`` tokens.

    Args:
        doubt: how little a single count says; see the head of this module.
        room: tokens whose counts are kept, the latest; ``None``: all.

    Attributes:
        followers: for every context, the tokens that followed and how often.
        totals: for every context, how often any followed.
    """

    def __init__(self, max_match: int, doubt: float, room: int | None = None) -> None:
        self.max_match, self.doubt, self.room = max_match, doubt, room
        self.followers: dict[tuple[int, ...], dict[int, int]] = {}
        self.totals: dict[tuple[int, ...], int] = {}
        self._seen: deque[tuple[tuple[int, ...], int]] = deque()

    def learn(self, tokens: Sequence[int], first: int) -> None:
        """Counts the tokens from place ``first`` on, each after those before it."""
        for place in range(max(first, 1), len(tokens)):
            context, token = tuple(tokens[max(place - self.max_match, 0) : place]), tokens[place]
            for start in range(len(context)):
                suffix = context[start:]
                after = self.followers.setdefault(suffix, {})
                after[token] = after.get(token, 0) + 1
                self.totals[suffix] = self.totals.get(suffix, 0) + 1
            if self.room is not None:
                self._seen.append((context, token))
                if len(self._seen) > self.room:
                    self._forget(*self._seen.popleft())

    def prune(self, kept: int) -> None:
        """Drops all but the most frequent followers of every context; totals still count them."""
        for suffix, after in self.followers.items():
            if len(after) > kept:
                self.followers[suffix] = dict(nlargest(kept, after.items(), key=lambda item: item[1]))

    def _forget(self, context: tuple[int, ...], token: int) -> None:
        for start in range(len(context)):
            suffix = context[start:]
            after = self.followers[suffix]
            after[token] -= 1
            self.totals[suffix] -= 1
            if not after[token]:
                del after[token]
            if not after:
                del self.followers[suffix], self.totals[suffix]


def counted(answers: Sequence[Tensor]) -> Counts:
    """What followed what in answers, each from its prompt's last token on."""
    counts = Counts(OTHERS_LONGEST, OTHERS_DOUBT)
    for answer in answers:
        counts.learn(answer.tolist(), 1)
    counts.prune(KEPT)
    return counts


def _guess(draft: Suffix, trace: Trace, at: Tensor, step: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token after each place, given the text before it; -1 where nothing is known."""
    tokens, own, known, guesses = trace.tokens.tolist(), Counts(draft.max_match, OWN_DOUBT), 0, []
    for end in (at + 1).tolist():
        own.learn(tokens[:end], known)
        known = end
        likely = draft.likely(own, tuple(tokens[max(end - draft.max_match, 0) : end]), 0.0)
        guesses.append(likely[0][1] if likely else -1)
    return torch.tensor(guesses), states
