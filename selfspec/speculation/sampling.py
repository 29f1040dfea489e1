"""Chance: what a token is drawn from, and by which random number.

All of it happens on the CPU, one position at a time: of a draft's positions few are ever looked at, and on a
CPU a softmax over all of them would cost a quarter of the target's own pass.
"""

from __future__ import annotations

import math
from enum import Enum
from hashlib import blake2b
from typing import TYPE_CHECKING

from selfspec.errors import NotFiniteError
from selfspec.lazy import np, torch
from selfspec.model.kernels import has_triton, native
from selfspec.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

Purpose = Enum("Purpose", "target accept draft")
NOT_FINITE = (
    "logits are not finite: the weights hold numbers that are not, or the model overflows in its dtype "
    "(hardware.dtype=bf16 and fp32 reach further than fp16)"
)
"""What no token can be told from, though an argmax of it is always some token: the same one for ever."""


def uniform(seed: int, position: int, purpose: Purpose, ahead: int = 0) -> float:
    """A random number in [0, 1) that depends on its arguments and on nothing else.

    It is a hash of them, as in counter-based generators (Salmon et al., 2011), rather than the next of a stream:
    what a row draws does not depend on its neighbours in a batch, nor on how its tokens fell into cycles.

    Args:
        seed: the request's.
        position: of the token within its sequence, the prompt counted.
        purpose: ``target``: to draw the target's own token; ``accept``: to judge a draft token; ``draft``: to
            draw one.
        ahead: drafts only: how many positions before this one were drafted in the same cycle. A position may be
            drafted again after a rejection; its number is then a new one, since the old one has been used to
            decide how the draft went on, and so perhaps how many tokens are drafted now.
    """
    key = f"{seed} {position} {purpose.name} {ahead}"
    bits = int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
    # 52 bits: a double holds them exactly, so that the quotient never rounds up to 1.
    return (bits >> 12) / 2**52


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from: temperature, then top-k, then top-p, as in transformers and vLLM.

    Of the softmax of ``logits / temperature``, top-k keeps the k likeliest tokens; of what that leaves, scaled to
    sum to one, top-p keeps the fewest likeliest that together have at least this probability (Holtzman et al.,
    1904.09751). Tokens exactly as likely as the last one kept are kept too (top-p in transformers and vLLM cuts
    among them by sorting order). Temperature 0 gives all to the likeliest, the first of equals.

    The target's tokens and those of drafts that sample are both drawn from this: a draft may be drawn from
    anything that it reports truly, and one that keeps to the same support wastes no token on sure rejections.

    Args:
        logits: ``[vocab]``, of any dtype and device.

    Returns:
        float32 ``[vocab]`` on the CPU, summing to one.

    Raises:
        NotFiniteError: the largest of the logits is not finite, or one is NaN.
    """
    x = logits.float().cpu().numpy()
    largest = float(x.max())  # NaN where there is one
    if not math.isfinite(largest):
        raise NotFiniteError(NOT_FINITE)
    if sampling.temperature == 0:
        certain = torch.zeros(len(x))
        certain[int(x.argmax())] = 1
        return certain
    # The largest is taken off first: a low temperature would overflow otherwise.
    p = np.exp((x - largest) / sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < len(x):
        p *= x >= float(torch.from_numpy(x).topk(sampling.top_k).values[-1])
    p /= p.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        # All tokens below this floor together have less than 1 - top_p: so few are left that sorting them is cheap.
        likely = -np.sort(-p[p >= (1 - sampling.top_p) / len(p)])
        before = np.cumsum(likely, dtype=np.float64) - likely
        p *= p >= likely[before < sampling.top_p][-1]
        p /= p.sum()
    return torch.from_numpy(p)


def draw(weights: Tensor, u: float) -> int:
    """The token that a uniform number picks, by the inverse of the cumulative distribution.

    Args:
        weights: ``[vocab]``, at least 0 and in proportion to the probabilities; a weight of 0 is never picked.
        u: in [0, 1).
    """
    # float64: in float32 the running sum over a vocabulary swallows unlikely tokens.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    return int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What the target's token is drawn from where one drawn from ``q`` was rejected, up to a factor: max(0, p - q).

    Leviathan et al., 2211.17192; Chen et al., 2302.01318. Where rounding leaves nothing of it, ``p`` and ``q`` are
    the same, and so would the tokens be: ``p``.
    """
    left = (p - q).clamp_(0)
    return left if bool(left.any()) else p


def likeliest(logits: Tensor) -> list[int]:
    """The argmax of every row of ``[N, vocab]``, the first of equals.

    Raises:
        NotFiniteError: the largest of a row is not finite, or one of it is NaN.
    """
    if logits.device.type == "cuda" and has_triton():
        from selfspec.model.kernels import fused

        rows = fused.argmax(logits)  # torch's takes as long as a third of the head's product
    elif logits.device.type != "cpu":
        values, indices = logits.max(-1)
        rows = indices.where(values.isfinite(), -1)  # told apart there: one transfer, not two
    elif native.takes_rows(logits):
        rows = torch.ops.selfspec.argmax(logits)
    else:  # NumPy's is ten times as fast as torch's
        rows = torch.from_numpy(logits.float().numpy().argmax(-1))
    tokens: list[int] = rows.tolist()
    # Of the best alone, by their sum: a pass over all logits, or `isfinite`, would cost a multiple.
    if min(tokens, default=0) < 0 or (
        logits.device.type == "cpu" and not math.isfinite(logits.gather(1, rows[:, None]).sum(dtype=torch.float32))
    ):
        raise NotFiniteError(NOT_FINITE)
    return tokens
