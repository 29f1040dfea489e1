"""Names for the parts of a cycle, as a profiler shows them; next to nothing while none is looking."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

PHASES = ("prefill", "draft", "verify", "accept")
Mark = Callable[[str], AbstractContextManager[Any]]
_UNMARKED: AbstractContextManager[None] = nullcontext()
_mark: Mark | None = None


def phase(name: str) -> AbstractContextManager[Any]:
    """What is done within it is that part's; one of :data:`PHASES`."""
    return _UNMARKED if _mark is None else _mark(name)


@contextmanager
def marked(mark: Mark) -> Iterator[None]:
    """Within it, parts are marked, such as by ``torch.profiler.record_function``."""
    global _mark
    _mark = mark
    try:
        yield
    finally:
        _mark = None
