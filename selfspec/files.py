"""Files that are whole or not there at all, and who may write them."""

import csv
import errno
import io
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file; in a folder that others write to, a link may lead to any file of ours.

    Args:
        flags: of ``os.open``.

    Raises:
        OSError: it is a link, a pipe, a device or a folder; or it cannot be opened.
    """
    try:  # without waiting: a pipe's other end may never come
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link, and none is followed here", str(path)) from error
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is a directory" if stat.S_ISDIR(mode) else "is no regular file", str(path))
    return fd


def create(path: Path) -> BinaryIO:
    """A new file in the place of what was there: of a link, not of what it leads to."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def own_folder(path: Path) -> None:
    """Make a folder that is ours alone, if need be.

    Raises:
        OSError: it is a link, or cannot be made.
    """
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link, and none is followed here", str(path))


def from_json(data: bytes | str) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, or none that is read here: nested by the hundred.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


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
