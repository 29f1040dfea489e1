"""Acceptance policies: which drafted tokens stand? Pure functions of the draft and the target's logits.

Exact ones (``longest_prefix``, ``rejection``) keep to what the target alone would have said; relaxed ones
(``conf_threshold``, ``topk_agree``, ``typical``) let a token stand that the target merely does not mind.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfspec.config import Policy as PolicyConfig
from selfspec.config import PolicyName
from selfspec.model.tree import Tree
from selfspec.speculation.sampling import Purpose, distribution, draw, likeliest, residual, uniform
from selfspec.types import Sampling


class Verdict(NamedTuple):
    """What stands of a draft.

    Attributes:
        path: the nodes that stand, in order, the root (0) first: it always does.
        token: the target's own token after the last of them.
    """

    path: list[int]
    token: int


class Choice(NamedTuple):
    """How one row's tokens are chosen, and where: the next token is number ``position`` of its sequence."""

    sampling: Sampling
    position: int


class Policy(Protocol):
    """Judges every row of a batch."""

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """Trees of n_1, ..., n_R nodes and the target's logits ``[n_1 + ... + n_R, vocab]`` -> a verdict each."""
        ...


def walk(tree: Tree, wanted: Callable[[int], int]) -> Verdict:
    """From the root on, a child stands where it is the token that the target wants after its parent.

    Args:
        wanted: the target's token after a node; asked once for every node of the path, and for no other.
    """
    path = [0]
    while True:
        token = wanted(path[-1])
        child = tree.child(path[-1], token)
        if child is None:
            return Verdict(path, token)
        path.append(child)


def longest_prefix(tree: Tree, wanted: Sequence[int]) -> Verdict:
    """Exact: :func:`walk` where the target's token after every node is known."""
    return walk(tree, wanted.__getitem__)


class LongestPrefix:
    """Greedy and exact: :func:`longest_prefix` under the target's argmax."""

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """``choices`` are not looked at."""
        wanted = likeliest(logits)
        verdicts = []
        for tree in trees:
            verdicts.append(longest_prefix(tree, wanted[: len(tree)]))
            wanted = wanted[len(tree) :]
        return verdicts


class Rejection:
    """Lossless sampling: tokens have the target's distribution, whatever the draft (:func:`rejection`)."""

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """Every row by its own sampling; greedily where its temperature is 0."""
        verdicts = []
        for tree, choice in zip(trees, choices, strict=True):
            own, logits = logits[: len(tree)], logits[len(tree) :]
            greedy = choice.sampling.temperature == 0
            verdicts.append(longest_prefix(tree, likeliest(own)) if greedy else rejection(tree, own, choice))
        return verdicts


def rejection(tree: Tree, logits: Tensor, choice: Choice) -> Verdict:
    """Draws the target's token after each node from its distribution p; :func:`walk` does the rest.

    Where draft tokens were chosen without chance, the draw is p's alone, by a random number that belongs to the
    position. So a node's children are accepted with all the probability that p gives them, which is the most any
    exact policy can do, and the tokens are those of plain sampling with the same seed: neither the draft nor K
    nor the neighbours in a batch show in them.

    Where the next node was drawn from q, the draw is coupled to that: it is the same token with probability
    min(1, p / q), else one from max(0, p - q) normalised. The two together are p again (Leviathan et al.,
    2211.17192; Chen et al., 2302.01318); here it is the distribution alone that is plain sampling's.
    """
    sampling, depths = choice.sampling, tree.depths()

    def wanted(node: int) -> int:
        number = partial(uniform, sampling.seed, choice.position + depths[node])
        # Here, not for all nodes at once: few are reached, and a softmax over the vocabulary is dear (`sampling.py`).
        p = distribution(logits[node], sampling)
        # Only chains are drawn: the child of a node, if it has one, is the next.
        if tree.drawn_from is not None and node + 1 < len(tree):
            q, token = tree.drawn_from[node], tree.tokens[node + 1]
            # u < p / q without dividing; strictly, so that a token with p = 0 never stands, even where u is 0.
            if number(Purpose.accept) * float(q[token]) < float(p[token]):
                return token
            p = residual(p, q)
        return draw(p, number(Purpose.target))

    return walk(tree, wanted)


class Relaxed:
    """From the root on, the target's argmax stands, or else the first child, in the draft's order, that it allows."""

    def __init__(self, allows: Callable[[Tensor], Tensor]) -> None:
        """``allows``: the target's logits after a node ``[vocab]`` -> bool ``[vocab]``, the tokens it puts up with."""
        self.allows = allows

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """``choices`` are not looked at: what follows the path is the target's argmax."""
        verdicts = []
        for tree in trees:
            own, logits = logits[: len(tree)], logits[len(tree) :]
            verdicts.append(self._judge(tree, own))
        return verdicts

    def _judge(self, tree: Tree, logits: Tensor) -> Verdict:
        wanted, path = likeliest(logits), [0]
        while True:
            node = path[-1]
            # The argmax first, although others may be allowed: the target is departed from only to go on.
            child = tree.child(node, wanted[node])
            children = [i for i, parent in enumerate(tree.parents) if parent == node]
            if child is None and children:
                allowed = self.allows(logits[node])
                child = next((i for i in children if allowed[tree.tokens[i]]), None)
            if child is None:
                return Verdict(path, wanted[node])
            path.append(child)


def confident(logits: Tensor, threshold: float) -> Tensor:
    """``conf_threshold``: tokens of at least this probability. ``[vocab]`` -> bool ``[vocab]``."""
    return logits.float().softmax(-1) >= threshold


def among_top(logits: Tensor, k: int) -> Tensor:
    """``topk_agree``: the k likeliest tokens, and those as likely as the k-th. ``[vocab]`` -> bool ``[vocab]``."""
    return logits >= logits.topk(min(k, len(logits))).values[-1]


def typical(logits: Tensor, epsilon: float, delta: float) -> Tensor:
    """Medusa's typical acceptance (2401.10774): tokens with p > min(epsilon, delta exp(-H)), H the entropy in nats.

    ``[vocab]`` -> bool ``[vocab]``. The surer the target, the more it asks of a token, up to ``epsilon``.
    """
    p = logits.float().softmax(-1)
    entropy = float(torch.special.entr(p).sum())
    return p > min(epsilon, delta * math.exp(-entropy))


class Mixed:
    """Requests that sample by :class:`Rejection`, the others by another policy, in one batch."""

    def __init__(self, greedy: Policy) -> None:
        self.greedy, self.sampled = greedy, Rejection()

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """A batch that does not sample is judged at once, as without this class."""
        # One argmax over the whole batch in the place of one a row.
        if not any(choice.sampling.temperature for choice in choices):
            return self.greedy(trees, logits, choices)
        verdicts = []
        for tree, choice in zip(trees, choices, strict=True):
            own, logits = logits[: len(tree)], logits[len(tree) :]
            judge = self.sampled if choice.sampling.temperature else self.greedy
            verdicts += judge([tree], own, [choice])
        return verdicts


def make(policy: PolicyConfig) -> Policy:
    """The policy a config asks for; its plan has checked that the numbers it needs are there."""
    match policy:
        case PolicyConfig(name=PolicyName.longest_prefix):
            return LongestPrefix()
        case PolicyConfig(name=PolicyName.rejection):
            return Rejection()
        case PolicyConfig(name=PolicyName.conf_threshold, threshold=float(threshold)):
            return Relaxed(partial(confident, threshold=threshold))
        case PolicyConfig(name=PolicyName.topk_agree, k=int(k)):
            return Relaxed(partial(among_top, k=k))
        case PolicyConfig(name=PolicyName.typical, epsilon=float(epsilon), delta=float(delta)):
            return Relaxed(partial(typical, epsilon=epsilon, delta=delta))
    raise AssertionError(f"{policy}: checked by the plan")
