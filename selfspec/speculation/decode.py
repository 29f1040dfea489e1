"""The speculative loop: draft, verify, accept (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

Plain decoding is the same loop with a draft that proposes nothing. A batch advances together, each row by
what it accepts; ``engine/batching.py`` says who is in it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfspec.errors import NotFiniteError
from selfspec.model import finite
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree
from selfspec.speculation import clock as clocks
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.phases import phase
from selfspec.speculation.policy.base import Choice, Policy, Verdict
from selfspec.speculation.sequence import Seq
from selfspec.types import Cycle, Logprob, Request


@dataclass(frozen=True, slots=True)
class Target:
    """What decides: a model's first ``depth`` layers and the readout of their state.

    The whole model, normally; a truncated one with an exit head is plain layer skipping.
    """

    model: Model
    depth: int
    readout: Callable[[Tensor], Tensor]

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int) -> Tensor:
        """Layers ``first`` to ``depth`` on new tokens ``[N, D]``, and their normed final states ``[N, D]``."""
        return self.readout(self.model.run(hidden, cache, at, first, self.depth))


@dataclass(frozen=True, slots=True)
class Speculation:
    """The axes of a configuration: who decides, who drafts, when to stop, how far to look, and what stands."""

    target: Target
    draft: Draft
    gate: Gate
    controller: Controller
    policy: Policy

    def start(self, row: Seq) -> None:
        """What there is to choose before a prompt is read."""
        row.exit_layer = self.controller.exit_layer(len(row.request.tokens))

    def prefill(self, row: Seq, first: int, count: int, cache: KVCache, index: int) -> Tensor:
        """Runs ``count`` tokens of a prompt from number ``first`` on, in a row of the cache: states ``[count, D]``."""
        with phase("prefill"):
            tokens = row.request.tokens[first : first + count]
            at = cache.place([Tree.chain(tokens)], row=index)
            hidden, depth = self.draft.prefill(tokens, cache, at, row)
            states = self.target.run(hidden, cache, at, depth)
            cache.commit(index, range(count))
            return states

    def sample_first_token(self, row: Seq, index: int, states: Tensor, cache: KVCache) -> None:
        """Gives the first token of a row whose prompt has been read, given its states ``[P, D]``."""
        # The last token of the prompt is a tree of one node, and nothing is drafted yet.
        trees, logits = [Tree.chain(row.request.tokens[-1:])], self.target.model.logits(states[-1:])
        try:
            (verdict,) = self.policy(trees, logits, [_choice(row)])
        except NotFiniteError as error:
            raise finite.located(self.target.model, row.request.tokens) from error
        row.tokens.append(verdict.token)
        if row.request.logprobs is not None:
            row.logprobs += _logprobs(row.request.logprobs, logits, [verdict.token])
        row.state = states[-1:]
        self.draft.observe(row, index, row.tokens[1:], states, cache)
        row.first_token = time.perf_counter()

    def step(self, rows: Sequence[Seq], cache: KVCache) -> None:
        """One cycle for every row of the batch: row r has row r of the cache."""
        clock = clocks.of(self.target.model.device)
        began = clock.mark()
        with phase("draft"):
            # After `began`: what choosing a threshold and a K takes is part of what drafting costs.
            self.gate.begin()
            # A cycle brings a bonus token besides what it accepts: more drafts than `remaining - 1` would be lost.
            ks = [min(self.controller.num_draft_tokens(row.cycles, len(rows)), row.remaining - 1) for row in rows]
            trees, hidden, depth = self.draft.propose(rows, ks, self.gate, cache)
        drafted = clock.mark()

        with phase("verify"):
            at = cache.place(trees)
            # A draft that ran layers hands over the residual stream of every node: verification starts at `depth`, and
            # the layers below have their keys and values in these very slots already.
            if hidden is None:
                hidden = self.target.model.embed([token for tree in trees for token in tree.tokens], at)
            states = self.target.run(hidden, cache, at, depth)
            logits = self.target.model.logits(states)
            verdicts = self.policy(trees, logits, [_choice(row) for row in rows])
        with phase("accept"):
            accepted, first = [], 0
            for index, (row, tree, verdict) in enumerate(zip(rows, trees, verdicts, strict=True)):
                # States and logits lie tree after tree, whole: `first` counts nodes, not what was accepted of them.
                own = slice(first, first := first + len(tree))
                new = self._accept(row, index, tree, verdict, states[own], cache)
                if row.request.logprobs is not None:
                    row.logprobs += _logprobs(row.request.logprobs, logits[own][verdict.path[:new]], row.tokens[-new:])
                accepted.append(new)
        verified = clock.mark()
        draft_ms, verify_ms = clock.ms(began, drafted), clock.ms(drafted, verified)

        cycles = [
            Cycle(
                k_asked=k,
                proposed=len(tree) - 1,
                depth=max(tree.depths()),
                # Acceptance is the draft's, also where a stop token cuts off what stood; the row got `new_tokens`.
                accepted=len(verdict.path) - 1,
                new_tokens=new,
                signals=tuple(tree.signals),
                draft_ms=draft_ms,
                verify_ms=verify_ms,
                batch=len(rows),
            )
            for k, tree, verdict, new in zip(ks, trees, verdicts, accepted, strict=True)
        ]
        for row, cycle in zip(rows, cycles, strict=True):
            row.cycles.append(cycle)
        # Once a cycle, not once a row: the rows share the time of one pass, which must not count R times.
        self.gate.observe(cycles)
        self.controller.observe(cycles)

    def _accept(self, row: Seq, index: int, tree: Tree, verdict: Verdict, states: Tensor, cache: KVCache) -> int:
        """Takes over what stands, up to a stop token; the number of new tokens."""
        new = [*(tree.tokens[node] for node in verdict.path[1:]), verdict.token]
        stop = self.stop_tokens(row.request)
        new = new[: next((i + 1 for i, token in enumerate(new) if token in stop), len(new))]
        # A path of n nodes gives n new tokens, the last of which has not been run: the cache stays one token behind.
        path = verdict.path[: len(new)]
        cache.commit(index, path)
        row.tokens += new
        # Nodes only increase along a path, so its last one says whether it is the tree's first nodes: a view.
        along = states[: len(path)] if path[-1] == len(path) - 1 else states[to_device(path, states.device)]
        row.state = along[-1:]
        # After `commit` and `row.tokens`: a draft finds its place by the cache's length and the row's last tokens.
        self.draft.observe(row, index, new, along, cache)
        return len(new)

    def stop_tokens(self, request: Request) -> frozenset[int]:
        """The tokens that end a request's answer."""
        return frozenset() if request.ignore_eos else self.target.model.shape.eos


def _logprobs(count: int, logits: Tensor, tokens: Sequence[int]) -> list[Logprob]:
    """Of each of n tokens and ``count`` others, from the logits ``[n, vocab]`` that gave it."""
    found = logits.float().log_softmax(-1)
    best = found.topk(count)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    own = found[torch.arange(len(tokens)), tokens].tolist()
    return [Logprob(value, tuple(zip(*top, strict=True))) for value, top in zip(own, tops, strict=True)]


def _choice(row: Seq) -> Choice:
    return Choice(row.request.sampling, len(row.tokens))
