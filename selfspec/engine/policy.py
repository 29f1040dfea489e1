"""Acceptance policies: which drafted tokens stand? Pure functions of the draft and the target's logits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from selfspec.config import Policy as PolicyConfig
from selfspec.config import PolicyName


class Verdict(NamedTuple):
    """How many drafted tokens stand, and the target's own token after them."""

    accepted: int
    token: int


Policy = Callable[[Sequence[int], Tensor], Verdict]
"""(k drafted tokens, the target's logits ``[k + 1, vocab]``) -> verdict."""


def longest_prefix(drafted: Sequence[int], logits: Tensor) -> Verdict:
    """Greedy and exact: draft tokens stand as long as each is the target's own argmax."""
    wanted = logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == wanted[accepted]:
        accepted += 1
    return Verdict(accepted, wanted[accepted])


def make(policy: PolicyConfig) -> Policy:
    """The policy a config asks for."""
    match policy.name:
        case PolicyName.longest_prefix:
            return longest_prefix
