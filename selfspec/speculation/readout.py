"""What a draft reads its tokens out with: the frozen language-model head, or its rows of frequent tokens.

Reading all rows is a large share of a small model's pass. Most drafts that stand are frequent tokens, and
leaving out the others costs the target nothing (FR-Spec, 2502.14856).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from selfspec.lazy import torch
from selfspec.model.base import Model
from selfspec.model.kernels import native
from selfspec.model.linear import linear, packed
from selfspec.model.transfer import to_host
from selfspec.speculation import sampling
from selfspec.speculation.head import Head
from selfspec.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", int, float)


class Readout:
    """Normed states -> logits over the draft's vocabulary of V tokens, and from there to tokens.

    Attributes:
        packed: rows of the language-model head in a kernel's layout; ``None`` where the model reads all of it.

    Args:
        ids: int64 ``[V]``, the vocabulary; ``None``: the model's own.
        temperature: what logits are divided by, so that probabilities are shares of what comes true
            (Guo et al., 1706.04599). Trees are chosen by those; gates and draws see the logits as they are.
    """

    def __init__(self, model: Model, ids: Tensor | None = None, temperature: float = 1.0) -> None:
        self.temperature = temperature
        ids = None if ids is None else ids.to(model.device)
        self.ids, self.vocab = ids, model.shape.vocab
        self.weight = model.lm_head if ids is None else model.lm_head[ids]
        self._model = model
        # A head that biases, scales or caps its logits is read whole, by the model: its rows alone say something else.
        self.packed = None if ids is None or not model.plain_head else packed(self.weight, model.native)

    @classmethod
    def of(cls, model: Model, head: Head | None) -> Readout:
        """What a fitted head reads out with: over its tokens, at its temperature; ``None``: all, as they are."""
        if head is None:
            return cls(model)
        return cls(model, head.tensors.get("ids"), head.facts.get("temperature", 1.0))

    def __call__(self, state: Tensor) -> Tensor:
        """``[N, D]`` -> ``[N, V]``."""
        if self.packed is not None:
            return linear(state, self.packed)
        logits = self._model.logits(state)
        return logits if self.ids is None else logits[:, self.ids]

    def likeliest(self, logits: Tensor, width: int = 1) -> Tensor:
        """The best token ids of each row of ``[N, V]``, best first: ``[N, width]``."""
        if width > 1:
            return self.tokens(self._largest(logits, width)[0])
        own = native.takes_rows(logits)
        return self.tokens(torch.ops.selfspec.argmax(logits)[:, None] if own else logits.max(-1, keepdim=True).indices)

    def best(self, logits: Tensor, width: int, signals: Tensor) -> tuple[list[list[int]], list[float]]:
        """The best token ids of each row of ``[N, V]``, and the gate's signals, which are read along with them."""
        tokens = self.likeliest(logits, width)
        flat, read = to_host(tokens, signals)
        return _rows(map(int, flat), tokens.shape[1]), read

    def candidates(
        self, logits: Tensor, width: int, signals: Tensor
    ) -> tuple[list[list[int]], list[list[float]], list[float]]:
        """As :meth:`best`, and log-probabilities between the two; 0 where there is no choice."""
        if width == 1:
            tokens, read = self.best(logits, width, signals)
            return tokens, [[0.0]] * len(logits), read
        indices, log_p = self._largest(logits, width)
        flat, scores, read = to_host(self.tokens(indices), log_p, signals)
        return _rows(map(int, flat), indices.shape[1]), _rows(scores, indices.shape[1]), read

    def _largest(self, logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The places of the largest of each row of ``[N, V]``, and their log-probabilities: ``[N, width]``."""
        width = min(width, logits.shape[-1])
        if native.takes_rows(logits):
            found: tuple[Tensor, Tensor] = torch.ops.selfspec.candidates(logits, width, self.temperature)
            return found
        values, indices = logits.topk(width)
        scaled = logits.float() / self.temperature
        return indices, values.float() / self.temperature - scaled.logsumexp(-1, keepdim=True)

    def draw(self, logits: Tensor, how: Sampling, position: int, ahead: int) -> tuple[int, Tensor]:
        """A token drawn from one row ``[V]``, and what it was drawn from, float32 ``[vocab]`` on the CPU.

        Args:
            position: of the token in its sequence, and
            ahead: how many were drafted before it in this cycle (see :func:`selfspec.speculation.sampling.uniform`).
        """
        q = sampling.distribution(logits, how)
        if self.ids is not None:
            q = torch.zeros(self.vocab).index_copy_(0, self.ids.cpu(), q)
        return sampling.draw(q, sampling.uniform(how.seed, position, sampling.Purpose.draft, ahead)), q

    def tokens(self, indices: Tensor) -> Tensor:
        """Places in the draft's vocabulary -> token ids, any shape."""
        return indices if self.ids is None else self.ids[indices]

    def indices(self, tokens: Tensor) -> Tensor:
        """Token ids -> places in the draft's vocabulary, -1 where it lacks them; any shape."""
        if self.ids is None:
            return tokens
        places = torch.full((self.vocab,), -1, device=self.ids.device)
        places[self.ids] = torch.arange(len(self.ids), device=self.ids.device)
        return places[tokens.to(self.ids.device)]


def _rows(flat: Iterable[Number], width: int) -> list[list[Number]]:
    return [list(row) for row in zip(*[iter(flat)] * width, strict=True)]
