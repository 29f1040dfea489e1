"""What a fitted head says of itself, read without loading it: the check before anything runs.

A safetensors file begins with the length of its header (8 bytes, little endian) and the header, a JSON
object (https://huggingface.co/docs/safetensors). That is all that is read here.
"""

import json
from pathlib import Path
from typing import Any

from selfspec.errors import HeadError

FACTS = "selfspec"
"""Key of the facts in the file's metadata."""

START = 8 + (1 << 20)
"""The most bytes at the start of a file that hold its facts."""


def facts(path: Path) -> dict[str, Any]:
    """The facts a head file carries.

    Raises:
        HeadError: the file is missing, damaged, or no head of selfspec's.
    """
    try:
        with path.open("rb") as file:
            start, size = file.read(START), path.stat().st_size
    except OSError as error:
        raise HeadError(f"{path}: no head can be read there ({error.strerror})") from error
    return read(path, start, size)


def read(where: Path | str, start: bytes, size: int) -> dict[str, Any]:
    """The facts of a head of which only the first ``START`` bytes are at hand; ``where`` names it in messages.

    Raises:
        HeadError: it is damaged, or no head of selfspec's.
    """
    try:
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or not 2 <= length <= START - 8:
            raise ValueError("no safetensors header")
        header = json.loads(start[8 : 8 + length])
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if size != 8 + length + end:
            raise ValueError("cut off or padded")
        found = json.loads(header["__metadata__"][FACTS])
        if not isinstance(found, dict):
            raise ValueError("facts of another form")
        return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise HeadError(f"{where}: corrupt head, or none of selfspec's ({error}); delete it to fit it again") from error


def check(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The facts of a head that fits.

    Args:
        wanted: facts it must have, such as ``exit_layer``.

    Raises:
        HeadError: it is corrupt, or was fitted for something else; names what differs.
    """
    return fits(path, facts(path), wanted)


def fits(where: Path | str, found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The facts found, if they are those wanted; else as :func:`check`."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise HeadError(f"{where}: fitted for {key}={found.get(key)}, but {key}={value} is asked for")
    return found
