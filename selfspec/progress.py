"""A progress bar for the stages: on a terminal a bar on stderr, anywhere else nothing.

    with progress("bench", total=len(units), done=restored) as advance:
        for unit in units:
            ...
            advance()

It draws only when it is told of a finished unit, never while one is being measured.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Counts finished units of work."""

    def __call__(self, units: int = 1) -> None:
        """Moves the bar on by ``units``."""


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Shows how many of ``total`` units are finished, ``done`` of them from the start (restored ones).

    Yields:
        A function that counts finished units.
    """
    if not sys.stderr.isatty():
        yield lambda units=1: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # a refresh thread would take time from the unit that is being measured
        redirect_stdout=False,  # what is printed for a pipe must not end up on stderr
    )
    with bar:
        task = bar.add_task(description, total=total, completed=done)
        bar.refresh()

        def advance(units: int = 1) -> None:
            bar.advance(task, units)
            bar.refresh()

        yield advance
