"""The records of a file, one by one: JSON, JSONL or Parquet, gzipped or not, or plain text of one prompt a line.

What a file is, its first bytes say; plain text alone is known by its name, ``*.txt``. A JSON file is one array, or
several (``cat a.json b.json``), or objects one after the other; it is read in about a block of memory.
"""

import codecs
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from selfspec.errors import AssetError, one_line

Where = tuple[str, Any]
"""Where a record stands (``line 3``, ``row 7``), and the record."""

_BLOCK = 1 << 20
_LONGEST_TOKEN = 16
"""No JSON token that is not a string is longer: an error this near to the end may be the end's."""
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_LAYOUTS = "JSON, JSONL or Parquet, gzipped or not, or a *.txt of one prompt a line"


def read(path: Path, source: str) -> Iterator[Where]:
    """The records of a file, in order.

    Args:
        path: of the file.
        source: what to call it in an error.

    Raises:
        AssetError: with the line, and what was expected there.
    """
    try:
        with path.open("rb") as file:
            begins = file.read(4)
        if begins == b"PAR1":
            yield from _parquet(path, source)
            return
        with io.TextIOWrapper(_bytes(path, begins), encoding="utf-8-sig") as file:
            plain = path.name.removesuffix(".gz").endswith(".txt")
            yield from lines(file) if plain else documents(file, source)
    except UnicodeDecodeError as error:
        raise AssetError(f"{source}: {_undecodable(path, begins, error)}; must be {_LAYOUTS}, in UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AssetError(f"{source}: is a damaged gzip file: {one_line(error)}") from error
    except OSError as error:
        raise AssetError(f"{source}: cannot be read: {error.strerror or one_line(error)}") from error


def lines(file: TextIO) -> Iterator[Where]:
    """Each line that is not blank, as a text of its own."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"line {number}", line.strip()


def documents(file: TextIO, source: str) -> Iterator[Where]:
    """The whole records of JSON arrays, or of JSONL.

    A file that is cut off (the best known copy of ShareGPT is) ends with its last whole record, which is said.

    Args:
        file: opened as text.
        source: what to call it in an error.

    Raises:
        AssetError: something that is not JSON before the end.
    """
    decoder = json.JSONDecoder()
    buffer, at, line, array, count = file.read(_BLOCK), 0, 1, False, 0
    while True:
        passed = at
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        line += buffer.count("\n", passed, at)
        if at < len(buffer) and buffer[at] == ("]" if array else "["):
            array, at = not array, at + 1
            continue
        try:
            record, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            more = file.read(max(_BLOCK, len(buffer))) if _near_end(error, buffer) else ""
            if not more and not _cut_off(error, buffer):
                reason = error.msg if isinstance(error, json.JSONDecodeError) else _reason(error)
                where = f"line {line}: is not JSON after conversation {count}"
                raise AssetError(f"{source}, {where}: {reason}; must be {_LAYOUTS}") from error
            if not more:
                if array or buffer[at:].strip():
                    note(source, f"is cut off at its end, in line {line}, after {count} whole conversations")
                return
            buffer, at = buffer[at:] + more, 0  # as much again, so that long records stay linear
            continue
        count += 1
        yield f"line {line}", record
        line += buffer.count("\n", at, end)
        at = end


def note(source: str, what: str) -> None:
    """Tells the user what is not as it was perhaps meant, and no error."""
    print(f"note: {one_line(f'{source}: {what}')}", file=sys.stderr, flush=True)


def _near_end(error: Exception, buffer: str) -> bool:
    """Whether what follows the buffer may explain the error."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(buffer) - _LONGEST_TOKEN


def _cut_off(error: Exception, rest: str) -> bool:
    """Whether a file that ends here was JSON before it was cut off."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    left = rest[error.pos :].rstrip()
    begun = re.fullmatch(r"[-+.eE0-9]*", left) or any(word.startswith(left) for word in _WORDS)
    return bool(begun) or error.msg.startswith("Unterminated string") or ("escape" in error.msg and len(left) < 6)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else one_line(error).split(";")[0]


def _parquet(path: Path, source: str) -> Iterator[Where]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise AssetError(f"{source}: is a damaged Parquet file, after row {number}: {one_line(error)}") from error


def _bytes(path: Path, begins: bytes) -> IO[bytes]:
    return gzip.GzipFile(path) if begins.startswith(b"\x1f\x8b") else path.open("rb")  # type: ignore[return-value]


def _undecodable(path: Path, begins: bytes, error: UnicodeDecodeError) -> str:
    """Which line is not UTF-8, and what it may be."""
    if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "line 1: is UTF-16"
    with _bytes(path, begins) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as wrong:
                return f"line {number}: byte 0x{line[wrong.start]:02x} is not UTF-8"
    return f"is not UTF-8: {error.reason}"
