"""The contract of a model: a stack of frozen layers that can be run from i to j on our own cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from selfspec.lazy import torch
from selfspec.model.attention import AttentionMetadata
from selfspec.model.cache import KVCache
from selfspec.model.kernels.native import Stack

if TYPE_CHECKING:
    from torch import Tensor


Layers = Enum("Layers", "auto fast hf")
"""Whose decoder layers run: our own, Hugging Face's, or ours where they know the architecture (``auto``)."""
Width = Enum("Width", "auto bf16 packed int8")
"""Of weights: as ``hardware.dtype`` has them, as their GGUF file packs them, or rounded to 8 bits; ``auto``: packed
where that is to be had, for products are the same."""
Kernels = Enum("Kernels", "auto native triton torch")
"""Our own, ``native`` on a CPU and ``triton`` within graphs on a GPU, or torch's operators."""
Graphs = Enum("Graphs", "auto on off")
"""Whether passes over our own layers are captured as graphs, on a GPU; ``auto``: where they can be."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, read from its ``config.json``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    eos: frozenset[int]


class Model(Protocol):
    """What drafts and verification need of a model. ``llama.py`` is the fast one, ``hf.py`` takes the others."""

    shape: Shape
    folder: Path | None
    """Where it was read from: its tokenizer lies there too. ``None`` where it was made from tensors."""
    dtype: torch.dtype
    device: torch.device
    native: bool
    """Whether it runs on our own CPU kernels."""
    graphs: bool
    """Whether passes over a cache that lasts are captured as CUDA graphs, and"""
    fused: bool
    """whether our own kernels for GPUs run there."""
    embedding: Tensor
    """``[vocab, D]``, the token embedding."""
    lm_head: Tensor
    """``[vocab, D]``, what reads normed final states."""
    plain_head: bool
    """Whether logits are one product with it, neither biased, nor scaled, nor capped."""

    def to(self, dtype: torch.dtype) -> Self:
        """The same model in another dtype (a copy; used to look at a tie in float32)."""
        ...

    def new_cache(self, capacity: int, rows: int = 1, extra_layers: int = 0, lasts: bool = False) -> KVCache:
        """An empty cache for ``rows`` sequences of up to ``capacity`` slots, with layers for a draft's own use.

        Args:
            lasts: it will be used for many requests, so that capturing passes over it as graphs pays.
        """
        ...

    def embed(self, tokens: Sequence[int], at: AttentionMetadata) -> Tensor:
        """Token ids, N of them -> ``[N, D]``, the residual stream before the first layer."""
        ...

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """Runs layers ``first`` to ``last - 1`` on the residual stream ``[N, D]``; writes their keys and values."""
        ...

    def stack(self, cache: KVCache, at: AttentionMetadata) -> Stack | None:
        """The kernel that such a pass is one call to, for who has more to ask of that call; ``None``: there is none."""
        ...

    def norm(self, hidden: Tensor) -> Tensor:
        """The model's own final norm: ``[N, D]`` -> ``[N, D]``, what the language-model head reads."""
        ...

    def logits(self, state: Tensor) -> Tensor:
        """Normed states ``[N, D]`` -> logits ``[N, vocab]`` through the frozen language-model head."""
        ...
