"""Results -> tables and plots, again; and whether one is a regression of another.

    python -m selfspec.report <folder>

takes every ``result.json`` below a folder (of one run, or of a sweep), makes ``summary.csv``, ``accept.tsv``,
``report.txt`` and the plots in it, and prints the table.

    python -m selfspec.report <A> --against <B>

says whether B, a job's folder, is a regression of A, on the prompts that both have; exits with 0 (no regression), 1 (a
regression) or 3 (undecided), and with 2 where the two are not to be compared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selfspec.errors import UserError, one_line
from selfspec.report import against
from selfspec.report.results import find
from selfspec.report.tables import show, write


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m selfspec.report", description="Make a report of results again, or compare two."
    )
    parser.add_argument("folder", type=Path, help="of a run or a sweep")
    parser.add_argument("--against", type=Path, metavar="B", help="a run that may be a regression of the one in folder")
    parser.add_argument("--margin", type=_share, default=0.05, help="how much worse counts as no worse (0.05)")
    parser.add_argument(
        "--measure", action="append", choices=against.MEASURES, help="may be given several times (all there are)"
    )
    given = parser.parse_args(argv)
    try:
        if given.against is not None:
            found = against.compare(given.folder, given.against, given.measure or against.MEASURES, given.margin)
            print(against.text(found, given.margin))
            return found.exit_code
        results = find(given.folder)
        write(given.folder, results)
        show(results)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise ValueError
    return share


if __name__ == "__main__":
    sys.exit(main())
