"""Numbers on their way to a device and back, as few times as can be: every way costs a GPU's host some microseconds,
and one from pageable memory, or back, makes it wait for all that the GPU was asked to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfspec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[n]`` on a device; nobody waits for the copy."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    # The allocator of pinned memory keeps it until the copy is done.
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def to_host(*parts: Tensor) -> list[list[float]]:
    """The numbers of several tensors of a device, each flattened, by one copy.

    All as float32, which holds token ids up to 2^24 exactly.
    """
    held = [part.flatten() for part in parts if part.numel()]
    numbers = held[0] if len(held) == 1 else torch.cat([part.float() for part in held])
    listed, found = numbers.tolist(), list[list[float]]()
    for part in parts:
        found.append(listed[: part.numel()])
        listed = listed[part.numel() :]
    return found
