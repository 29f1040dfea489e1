"""The Engine protocol: what a stage may ask of whatever runs the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from selfspec.types import Completion, Request


class Tie(NamedTuple):
    """Two next-token candidates compared in float32.

    Attributes:
        gap: the difference of their logits.
        rounding: the largest difference that the working dtype's rounding explains.
    """

    gap: float
    rounding: float

    @property
    def explains(self) -> bool:
        """Whether either token could have come first."""
        return self.gap <= self.rounding


class Engine(Protocol):
    """Runs one plan's model."""

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, model sizes: what a timing depends on beyond the plan."""
        ...

    def encode(self, text: str, chat: bool) -> list[int]:
        """Text -> token ids; with ``chat``, as a user's turn in the model's chat template."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        *,
        plain: bool = False,
        k: int | None = None,
        max_batch: int | None = None,
    ) -> list[Completion]:
        """Decodes requests as the plan says.

        Args:
            plain: with no draft, by the whole model.
            k: with this K always, in the place of the plan's controller.
            max_batch: as many at once; ``None``: the plan's number.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """What gate and controller have learned so far, as JSON values; for the checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what an earlier process had learned."""
        ...

    def fit(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, facts: Mapping[str, Any]) -> None:
        """Fits the plan's head on (prompt, answer) token pairs and writes it to ``path`` atomically."""
        ...

    def use_head(self, path: Path) -> None:
        """Drafts through this fitted head from now on."""
        ...

    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """How close two candidates for the token after ``context`` are."""
        ...

    def peak_memory_mb(self) -> float:
        """The most memory in use so far, in MiB: the device's where there is one, else the process's."""
        ...

    def device_utilisation(self) -> float | None:
        """The accelerator's utilisation now, in [0, 1]; ``None`` on a CPU."""
        ...
