"""Our own kernels: what is slow in torch where a model is small and a pass is short."""

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether the kernels for GPUs can be compiled here."""
    return find_spec("triton") is not None
