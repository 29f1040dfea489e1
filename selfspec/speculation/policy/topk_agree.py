"""Relaxed: drafted tokens stand where they are among the target's k likeliest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from omegaconf import MISSING

from selfspec.options import bounded
from selfspec.speculation.policy.relaxed import Relaxed, RelaxedOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(RelaxedOptions):
    """How much the target puts up with."""

    name: str = "topk_agree"
    k: int = bounded(MISSING, 1)
    """A drafted token stands where it is among the target's k likeliest."""

    def make(self) -> Relaxed:
        """The policy."""
        return Relaxed(partial(among_top, k=self.k))


def among_top(logits: Tensor, k: int) -> Tensor:
    """``topk_agree``: the k likeliest tokens, and those as likely as the k-th. ``[vocab]`` -> bool ``[vocab]``."""
    return logits >= logits.topk(min(k, len(logits))).values[-1]
