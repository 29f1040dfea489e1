"""Files that are whole or not there at all, and who may write them."""

import csv
import errno
import io
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from selfspec.errors import StorageError
from selfspec.interrupt import shield


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that at any moment, also after a power loss, it is the old one or the new one, whole.

    Raises:
        StorageError: it cannot be written; names the path and the reason, and the old file still stands.
        Interrupted: a trapped signal arrived; the file is written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with shield(), storing(path):
        try:
            with temporary.open("xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Name the path and the reason where writing fails.

    Raises:
        StorageError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {reason(error)}") from error


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows, the first of them names, as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def acquire(lock: FileLock, what: str) -> None:
    """Lock; if another process has, say what it does, and wait."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another process that {what}", file=sys.stderr, flush=True)
        lock.acquire()


def reason(error: OSError) -> str:
    """The system's words for an error, such as ``no space left on device``."""
    return (error.strerror or str(error)).lower()


def sync_folder(folder: Path) -> None:
    """Make files created, renamed or removed in a folder survive a power loss.

    Raises:
        OSError: the folder cannot be synced.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no folders
            raise
    finally:
        os.close(fd)
