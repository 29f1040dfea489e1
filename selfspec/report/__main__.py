"""Results -> tables and plots, again.

    python -m selfspec.report <folder>

takes every ``result.json`` below a folder (of one run, or of a sweep), makes ``summary.csv``,
``accept.tsv``, ``tok_s.png``, ``acceptance.png`` and ``report.txt`` in it, and prints the table.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selfspec.errors import UserError, one_line
from selfspec.report.results import find
from selfspec.report.tables import show, write


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m selfspec.report", description="Make a report of results again.")
    parser.add_argument("folder", type=Path, help="of a run or a sweep")
    folder: Path = parser.parse_args(argv).folder
    try:
        results = find(folder)
        write(folder, results)
        show(results)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
