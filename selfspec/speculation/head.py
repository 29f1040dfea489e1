"""What the fit stage makes for a draft, the file it is kept in, and readouts of an early exit.

The file is safetensors. Its metadata holds one JSON object of *facts*: what the head was fitted for
(model, draft, exit layer), on how much, and how well it agrees with the full model on held-out tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from selfspec import heads
from selfspec.errors import HeadError, one_line
from selfspec.lazy import F, torch
from selfspec.model import linear as products
from selfspec.model.base import Model

if TYPE_CHECKING:
    from torch import Tensor

HeadForm = Enum("HeadForm", "affine low_rank block")
"""What a head computes: a full affine map, one of low rank, or a trained transformer block."""
_CHECK = "sha256"
"""Key of the fact that guards the tensors; only in the file."""


class Head:
    """Named tensors and facts about them; the draft module that fitted them says what they mean."""

    def __init__(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.tensors, self.facts = tensors, facts

    def to(self, dtype: torch.dtype, device: torch.device) -> Head:
        """The same head, ready to run beside a model of that dtype and device; whole numbers stay whole."""
        return Head({name: t.to(device, _like(t, dtype)) for name, t in self.tensors.items()}, self.facts)

    def to_bytes(self) -> bytes:
        """The head as a safetensors file, float32, facts in its metadata."""
        tensors = {name: t.to("cpu", _like(t, torch.float32)).contiguous() for name, t in self.tensors.items()}
        from safetensors.torch import save

        facts = self.facts | {_CHECK: _digest(tensors)}
        return save(tensors, metadata={heads.FACTS: json.dumps(facts, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Head:
        """Reads a head file (float32, CPU).

        Raises:
            HeadError: it is missing or corrupt.
        """
        from safetensors.torch import load

        facts = heads.facts(path)
        try:
            tensors = load(path.read_bytes())
            if facts.pop(_CHECK, None) != _digest(tensors):
                raise ValueError("tensors that are not the ones saved")
            if not all(bool(t.isfinite().all()) for t in tensors.values()):
                raise ValueError("not finite")
        except Exception as error:  # safetensors raises its own and several built-in errors on damage
            raise HeadError(f"{path}: corrupt head ({one_line(error)}); delete it to fit it again") from error
        return cls(tensors, facts)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.numpy().tobytes())
    return digest.hexdigest()


def _like(t: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if t.is_floating_point() else t.dtype


class ExitHead(Protocol):
    """Estimates the normed final state, which the frozen language-model head then reads.

    Attributes:
        previous: whether it reads the final states of the positions before.
        weights: its tensors, as :meth:`Stack.exit <selfspec.model.kernels.native.Stack.exit>` takes them.
    """

    previous: bool
    weights: Sequence[Tensor]

    def __call__(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Exit states ``[N, D]`` and the previous positions' normed final states ``[N, D]`` -> ``[N, D]``."""
        ...


class RawExit:
    """The model's own final norm applied early."""

    previous = False
    weights: Sequence[Tensor] = ()

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """``previous`` is not looked at."""
        return self.model.norm(hidden)


class FittedExit:
    """A fitted linear map of the exit state (and, where asked, of the previous final state); see :func:`linear`."""

    def __init__(self, tensors: dict[str, Tensor], previous: bool) -> None:
        self.tensors, self.previous = tensors, previous
        names = ("weight", "bias") if "weight" in tensors else ("scale", "down", "up", "bias")
        self.weights: Sequence[Tensor] = [tensors[name] for name in names]

    def __call__(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """The estimate of the normed final state."""
        return linear(self.tensors, features(hidden, previous if self.previous else None))


def linear(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """Applies a fitted linear map to features ``[N, P]``, where P is D or more: ``[N, D]``.

    Affine: ``weight`` ``[D, P]`` and ``bias`` ``[D]``. Low rank: in the place of ``weight``, a ``scale`` ``[D]``
    of the first D features and ``up`` ``[D, r]`` times ``down`` ``[r, P]``. Matrices may be :func:`laid_out`.
    """
    if "weight" in t:
        return products.linear(x, t["weight"], t["bias"])
    scaled = torch.addcmul(t["bias"], x[:, : len(t["scale"])], t["scale"])
    return products.add_linear(scaled, products.linear(x, t["down"]), t["up"])


def laid_out(t: dict[str, Tensor], native: bool) -> dict[str, Tensor]:
    """The tensors of a fitted linear map, its matrices as the CPU's kernels, our own or torch's, want them."""
    return t | {name: products.packed(t[name], native) for name in ("weight", "down", "up") if name in t}


def features(first: Tensor, second: Tensor | None = None) -> Tensor:
    """What a fitted map reads: states ``[N, D]`` scaled to unit root-mean-square, side by side. ``[N, P]``."""
    size = (first.shape[-1],)
    x = F.rms_norm(first, size)
    return x if second is None else torch.cat((x, F.rms_norm(second, size)), -1)
