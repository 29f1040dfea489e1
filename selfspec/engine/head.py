"""Readouts of an early exit: the model's own, or a fitted head; and the file a fitted head is kept in.

The file is safetensors. Its metadata holds one JSON object of *facts*: what the head was fitted for
(model, exit layer), on how much, and how well it agrees with the full model on held-out tokens.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from selfspec import heads
from selfspec.engine.llama import Llama
from selfspec.errors import HeadError, one_line


class ExitHead(Protocol):
    """Estimates the normed final state, which the frozen language-model head then reads."""

    def __call__(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Exit states ``[N, D]`` and the previous positions' normed final states ``[N, D]`` -> ``[N, D]``."""
        ...


class RawExit:
    """The model's own final norm applied early."""

    def __init__(self, model: Llama) -> None:
        self.model = model

    def __call__(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """``previous`` is not looked at."""
        return self.model.norm(hidden)


class Head:
    """A fitted affine map of the RMS-normalised exit state (and, where asked, of the previous final state).

    Affine: ``weight`` ``[D, P]``, P = D or 2 D, and ``bias`` ``[D]``. Low rank: in the place of ``weight``, a
    ``scale`` ``[D]`` of the exit state's coordinates and ``up`` ``[D, r]`` times ``down`` ``[r, P]``.
    """

    def __init__(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.tensors, self.facts = tensors, facts
        self.previous = bool(facts["previous"])

    def __call__(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """The estimate of the normed final state."""
        return self.map(features(hidden, previous if self.previous else None))

    def map(self, x: Tensor) -> Tensor:
        """Features ``[N, P]`` -> estimate ``[N, D]``."""
        t = self.tensors
        if "weight" in t:
            return F.linear(x, t["weight"], t["bias"])
        scaled = torch.addcmul(t["bias"], x[:, : len(t["scale"])], t["scale"])
        return torch.addmm(scaled, F.linear(x, t["down"]), t["up"].t())

    def to(self, dtype: torch.dtype, device: torch.device) -> "Head":
        """The same head, ready to run beside a model of that dtype and device."""
        return Head({name: t.to(device, dtype) for name, t in self.tensors.items()}, self.facts)

    def to_bytes(self) -> bytes:
        """The head as a safetensors file, float32, facts in its metadata."""
        tensors = {name: t.float().cpu().contiguous() for name, t in self.tensors.items()}
        return save(tensors, metadata={heads.FACTS: json.dumps(self.facts, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "Head":
        """Reads a head file (float32, CPU).

        Raises:
            HeadError: it is missing or corrupt.
        """
        facts = heads.facts(path)
        try:
            head = cls(load(path.read_bytes()), facts)
            probe = torch.zeros(1, facts["hidden"])
            if head(probe, probe).shape != probe.shape:
                raise ValueError("tensors of other sizes than its facts say")
            if not all(bool(t.isfinite().all()) for t in head.tensors.values()):
                raise ValueError("not finite")
        except Exception as error:  # safetensors raises its own and several built-in errors on damage
            raise HeadError(f"{path}: corrupt head ({one_line(error)}); delete it to fit it again") from error
        return head


def features(hidden: Tensor, previous: Tensor | None) -> Tensor:
    """What a head is a linear map of: states scaled to unit root-mean-square, side by side. ``[N, P]``."""
    size = (hidden.shape[-1],)
    x = F.rms_norm(hidden, size)
    return x if previous is None else torch.cat((x, F.rms_norm(previous, size)), -1)
