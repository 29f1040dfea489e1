"""How the jobs are: one live table at a terminal; elsewhere, a line for each change."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hydra_plugins.skypilot_launcher._fleet import Job
from selfspec.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

COLUMNS = ("job", "plan", "SkyPilot", "state", "recovered", "where", "")
_COLOURS = {"SUCCEEDED": "green", "done before": "green", "RUNNING": "cyan", "RECOVERING": "yellow"}


@contextmanager
def live(console: "Console") -> "Iterator[Callable[[Sequence[Job]], None]]":
    """What to call with the jobs whenever something may have changed."""
    if not console.is_terminal:
        yield _Lines(console).show
        return
    from rich.live import Live

    with Live(console=console, refresh_per_second=2) as view:
        yield lambda jobs: view.update(_table(jobs))


def _row(job: Job) -> tuple[str, ...]:
    numbers = ",".join(map(str, job.numbers))
    recovered = str(job.recoveries) if job.recoveries else ""
    note = textwrap.shorten(job.note, 160, placeholder=" ...")
    return (
        numbers,
        job.plan.label,
        str(job.id or "-"),
        one_line(job.state),
        recovered,
        one_line(job.where),
        one_line(note),
    )


def _table(jobs: Sequence[Job]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(*COLUMNS)
    for job in jobs:
        table.add_row(*map(Text, _row(job)), style="red" if job.failed else _COLOURS.get(job.state))
    return table


class _Lines:
    def __init__(self, console: "Console") -> None:
        self._console = console
        self._shown: dict[str, tuple[str, ...]] = {}

    def show(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            row = _row(job)
            if self._shown.get(job.plan.id) != row:
                self._shown[job.plan.id] = row
                number, label, sky, state, recovered, where, note = row
                facts = [f"job {number}", label, f"SkyPilot {sky}", state, where]
                facts += [f"recovered {recovered}x"] * bool(recovered) + [note] * bool(note)
                self._console.print(" | ".join(facts), soft_wrap=True, markup=False, highlight=False)
