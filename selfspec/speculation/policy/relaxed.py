"""What relaxed policies have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from selfspec.axes import PolicyOptions
from selfspec.speculation.policy.base import Choice, Verdict
from selfspec.speculation.sampling import likeliest

if TYPE_CHECKING:
    from torch import Tensor

    from selfspec.model.tree import Tree


class RelaxedOptions(PolicyOptions):
    """Of a policy that is not exact."""

    lossy: ClassVar[bool] = True


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
