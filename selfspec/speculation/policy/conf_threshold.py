"""Relaxed: drafted tokens stand where the target gives them at least some probability."""

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

    name: str = "conf_threshold"
    threshold: float = bounded(MISSING, 0, 1)
    """A drafted token stands where the target gives it at least this probability."""

    def make(self) -> Relaxed:
        """The policy."""
        return Relaxed(partial(confident, threshold=self.threshold))


def confident(logits: Tensor, threshold: float) -> Tensor:
    """``conf_threshold``: tokens of at least this probability. ``[vocab]`` -> bool ``[vocab]``."""
    return logits.float().softmax(-1) >= threshold
