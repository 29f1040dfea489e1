"""Relaxed: typical acceptance, as in Medusa (2401.10774)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from omegaconf import MISSING

from selfspec.lazy import torch
from selfspec.options import bounded
from selfspec.speculation.policy.relaxed import Relaxed, RelaxedOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(RelaxedOptions):
    """How much the target puts up with."""

    name: str = "typical"
    epsilon: float = bounded(MISSING, 0, 1)
    """A drafted token stands where its probability is above min(epsilon, delta exp(-H))."""
    delta: float = bounded(MISSING, 0, 1)

    def make(self) -> Relaxed:
        """The policy."""
        return Relaxed(partial(typical, epsilon=self.epsilon, delta=self.delta))


def typical(logits: Tensor, epsilon: float, delta: float) -> Tensor:
    """Medusa's typical acceptance (2401.10774): tokens with p > min(epsilon, delta exp(-H)), H the entropy in nats.

    ``[vocab]`` -> bool ``[vocab]``. The surer the target, the more it asks of a token, up to ``epsilon``.
    """
    p = logits.float().softmax(-1)
    entropy = float(torch.special.entr(p).sum())
    return p > min(epsilon, delta * math.exp(-entropy))
