"""The contract of a draft: given what is verified, propose up to K tokens, asking the gate after each.

A new draft is one file here, with a class of this shape and the settings (``Options``) that make it, and one YAML file
in ``conf/draft/``. Drafts work on a whole batch: what is asked of one row is asked of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from omegaconf import MISSING

from selfspec.axes import DraftOptions
from selfspec.errors import ConfigError
from selfspec.lazy import torch
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.options import bounded, setting, within
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import HeadForm
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor


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


@dataclass
class ReadoutOptions(DraftOptions):
    """What drafts that read out states have in common."""

    vocab: int | None = bounded(None, 2, fact=True)
    """Read out only this many frequent tokens (FR-Spec, 2502.14856); ``None``: all."""
    head: str | None = None
    """A file to use instead of fitting one."""
    width: int = bounded(1, 1, 16, use=True)
    """Candidates kept at every position: 1 drafts a chain, more a tree."""
    budget: int | None = bounded(None, 1, 63, use=True)
    """Trees: the most draft tokens verified together."""
    worth: float = bounded(0.0, 0, 1, use=True)
    """Trees: the least probability of a token that is verified, by the draft; 0: as many as there is room for."""
    sample: bool = setting(False, use=True)
    """Chains under ``policy=rejection``: draw draft tokens from the draft's distribution, not its likeliest."""

    role: ClassVar[Literal["lookup", "learned"] | None] = "learned"

    @property
    def learned_from_states(self) -> bool:
        """Its frequent tokens, at least."""
        return self.vocab is not None

    @property
    def label(self) -> str:
        """With its vocabulary, in thousands of tokens, and its width."""
        vocab = f"/{self.vocab // 1000}k" if self.vocab and self.vocab >= 1000 else ""
        return self.stem + vocab + (f"/w{self.width}" if self.width > 1 else "")

    @property
    def stem(self) -> str:
        """What the label begins with."""
        return self.name

    def check(self) -> None:
        """Refuses to draw trees, and to choose among the tokens of a chain."""
        check_chain(self.sample, self.width)
        if self.worth and self.width == 1:
            raise ConfigError(f"draft.worth={self.worth}: chooses the nodes of a tree; draft.width=1 asks for a chain")


@dataclass
class FittedOptions(ReadoutOptions):
    """What drafts with a fitted head have in common."""

    ridge: float = bounded(MISSING, 1e-9)
    """Ridge strength, in units of the mean diagonal of the Gram matrix."""
    sgd_epochs: int = bounded(0, 0, 100)
    """Passes of SGD on the cross-entropy after the closed-form solution."""

    @property
    def learned_from_states(self) -> bool:
        """Always."""
        return True


@dataclass
class LookupOptions(DraftOptions):
    """What drafts that look up what was said have in common."""

    max_match: int = bounded(MISSING, 1, 64, use=True)
    """The longest match looked for, in tokens."""
    min_match: int = setting(MISSING, use=True)
    """The shortest match that is believed, in tokens."""

    role: ClassVar[Literal["lookup", "learned"] | None] = "lookup"

    def check(self) -> None:
        """Refuses a shortest match that is longer than the longest."""
        within("draft.min_match", self.min_match, 1, self.max_match)


def check_chain(sample: bool, width: int) -> None:
    """Refuses to draw trees.

    Raises:
        ConfigError: naming both.
    """
    if sample and width > 1:
        raise ConfigError(f"draft.sample=true: draws chains; draft.width={width} asks for a tree")


def check_rank(form: HeadForm | None, rank: int | None) -> None:
    """Refuses a rank without a form that has one, and the reverse.

    Raises:
        ConfigError: naming both.
    """
    if (form is HeadForm.low_rank) != (rank is not None):
        named = form.name if form else None
        raise ConfigError(f"draft.rank={rank}: form=low_rank needs a rank >= 1, other forms none; form={named}")


def stack(rows: Sequence[Seq]) -> Tensor:
    """The rows' states as ``[R, D]``."""
    return rows[0].state if len(rows) == 1 else torch.cat([row.state for row in rows])
