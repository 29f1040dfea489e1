"""The contract of a draft: given what is verified, propose up to K tokens, asking the gate after each.

A new draft is one file here, with a class of this shape behind ``make(draft, model, head)``, and one YAML
file in ``conf/draft/``. Drafts work on a whole batch: what is asked of one row is asked of all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.speculation.gate import Gate
from selfspec.speculation.sequence import Seq


class Proposal(NamedTuple):
    """What a draft hands to verification.

    Attributes:
        trees: one for each row; its root is the row's last token, its depth at most the k asked for.
        hidden: ``[N, D]``, the residual stream of all nodes of all trees after ``depth`` layers:
            verification goes on from there. ``None`` where no layer was run.
        depth: how many of the target's layers the draft has run, and written the KV of, for those nodes.
    """

    trees: list[Tree]
    hidden: Tensor | None = None
    depth: int = 0


class Draft:
    """Proposes nothing, which is plain decoding. The base of the others: a draft overrides what it needs.

    Attributes:
        layers: cache layers of the draft's own, after the target's (a trained block's keys and values).
        nodes: the most nodes of a tree, its root included, so that the cache has room.
    """

    layers = 0

    def __init__(self, model: Model) -> None:
        self.model = model

    def nodes(self, k: int) -> int:
        """The most nodes of a tree of depth ``k``, its root included."""
        return k + 1

    def prefill(self, tokens: Sequence[int], cache: KVCache, at: AttentionMetadata, row: Seq) -> tuple[Tensor, int]:
        """The draft's share of a prompt's pass: the residual stream ``[P, D]`` and how many layers it has run."""
        return self.model.embed(tokens, at), 0

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """For every row, a tree of depth up to its k (>= 0)."""
        return Proposal([Tree.chain(row.tokens[-1:]) for row in rows])

    def observe(self, row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        """What became certain: after the prompt, and after each verification.

        Args:
            index: the row's place in the batch and the cache, whose length counts the new tokens' predecessors.
            tokens: the n tokens that follow the last n verified ones: ``tokens[i]`` is what the target's
                normed final state ``states[i]`` (of ``[n, D]``) gave or, within the prompt, what came next.
        """


def stack(rows: Sequence[Seq]) -> Tensor:
    """The rows' states as ``[R, D]``."""
    return rows[0].state if len(rows) == 1 else torch.cat([row.state for row in rows])
