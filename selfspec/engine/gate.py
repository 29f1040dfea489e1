"""Gates: keep drafting, or stop now? Pure functions of the draft's distribution.

A gate looks at each token the draft is about to propose; a token it doubts is not proposed. Chosen once,
outside the hot loop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selfspec.config import Gate as GateConfig
from selfspec.config import GateName


@dataclass(frozen=True, slots=True)
class Gate:
    """A signal read off the draft's logits, and when it says stop.

    Attributes:
        signal: logits ``[vocab]`` -> a number; ``None``: nothing is read and the draft is never stopped.
        stops: whether a signal says that the token is not to be proposed.
    """

    signal: Callable[[Tensor], float] | None
    stops: Callable[[float], bool]


def max_prob(logits: Tensor) -> float:
    """The largest probability, in [0, 1]."""
    x = logits.float()
    return math.exp(float(x.max() - x.logsumexp(-1)))


def entropy(logits: Tensor) -> float:
    """Shannon entropy H = -sum p ln p, in nats."""
    log_p = torch.log_softmax(logits.float(), -1)
    return -float(torch.dot(log_p.exp(), log_p))


def var_entropy(logits: Tensor) -> float:
    """The variance of surprisal, sum p (ln p)^2 - H^2, in nats squared: zero when certain and when uniform."""
    log_p = torch.log_softmax(logits.float(), -1)
    p = log_p.exp()
    centred = log_p - torch.dot(p, log_p)  # as a mean of squares, or what is left of two large numbers is noise
    return float(torch.dot(p, centred.square_()))


def make(gate: GateConfig) -> Gate:
    """The gate a config asks for."""
    threshold = gate.threshold if gate.threshold is not None else math.nan
    match gate.name:
        case GateName.none:
            return Gate(None, lambda signal: False)
        case GateName.maxp:
            return Gate(max_prob, lambda signal: signal < threshold)
        case GateName.entropy:
            return Gate(entropy, lambda signal: signal > threshold)
        case GateName.varH:
            return Gate(var_entropy, lambda signal: signal > threshold)
