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

_HEADER_LIMIT = 1 << 20


def facts(path: Path) -> dict[str, Any]:
    """The facts a head file carries.

    Raises:
        HeadError: the file is missing, damaged, or no head of selfspec's.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _HEADER_LIMIT:
                raise ValueError("no safetensors header")
            header = json.loads(file.read(length))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            if path.stat().st_size != 8 + length + end:
                raise ValueError("cut off or padded")
            found = json.loads(header["__metadata__"][FACTS])
            if not isinstance(found, dict):
                raise ValueError("facts of another form")
            return found
    except OSError as error:
        raise HeadError(f"{path}: no head can be read there ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise HeadError(f"{path}: corrupt head, or none of selfspec's ({error}); delete it to fit it again") from error


def check(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The facts of a head that fits.

    Args:
        wanted: facts it must have, such as ``exit_layer``.

    Raises:
        HeadError: it is corrupt, or was fitted for something else; names what differs.
    """
    found = facts(path)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise HeadError(f"{path}: fitted for {key}={found.get(key)}, but {key}={value} is asked for")
    return found
