"""Folders that are made once and kept: what was fetched, and what was converted from it.

A folder is filled beside its place, under a lock, and moved there whole with a manifest of its sizes: so it is either
absent or complete, it is hashed once, and a folder that lost a file since is made again.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from selfspec.config import home
from selfspec.errors import StorageError
from selfspec.files import acquire, from_json

_MANIFEST = ".selfspec-sizes.json"

Report = Callable[[int, int], None]
"""Told of progress as (bytes done, bytes in all)."""


def cache_dir() -> Path:
    """``$SELFSPEC_CACHE``, else ``$XDG_CACHE_HOME/selfspec``, else ``~/.cache/selfspec``; may not exist yet."""
    if own := os.environ.get("SELFSPEC_CACHE"):
        return Path(home("SELFSPEC_CACHE", own)).absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache").absolute() / "selfspec"


def derived(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """A folder that is made once from other assets: ``<cache>/derived/<name>-<key[:16]>``.

    ``build`` fills the empty folder it is given. If it raises, nothing is left; if another process is at
    the same thing, this one waits for it.

    Args:
        name: what it is, for people.
        key: what it is made of, as a hex digest (see :func:`fingerprint`).
        build: called at most once, and not at all where the folder is there.

    Raises:
        StorageError: the cache cannot be written.
    """
    if not re.fullmatch(r"[\w.-]+", name) or not re.fullmatch("[0-9a-f]{16,}", key):
        raise ValueError(f"derived({name!r}, {key!r}): not a plain name and a hex digest")

    def make(part: Path) -> None:
        with progress(f"converting {name}"):
            build(part)

    return make_once(cache_dir() / "derived" / f"{name}-{key[:16]}", f"conversion of {name}", make)


def fingerprint(path: Path, *parts: object) -> str:
    """A hex key for :func:`derived`: the file's path, size and time stamp, and ``parts`` such as a version.

    Not of its content: rehashing gigabytes at every start would cost more than a needless conversion.
    """
    stat = path.stat()
    return sha256_of(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{parts!r}")


def make_once(folder: Path, what: str, build: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``build`` unless it is complete; as :func:`derived`, wherever it is to lie."""
    if complete(folder):
        return folder
    part = folder.with_name(f"{folder.name}.part")
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    with _storage(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        acquire(lock, f"is at the {what} ({lock.lock_file})")
        try:
            if complete(folder):
                return folder
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir()
            build(part)
            _write_manifest(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            lock.release()
    return folder


def sha256_of(text: str) -> str:
    """Its hex digest."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """On a terminal a bar on stderr, else silence. A bar that is told no size only shows that time passes."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write_manifest(folder: Path) -> None:
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")


def complete(folder: Path) -> bool:
    """Whether a folder that is :func:`made once <make_once>` is there, whole."""
    try:
        sizes: dict[str, int] = from_json((folder / _MANIFEST).read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a ``StorageError``; libraries' own ``OSError``s have no errno."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise StorageError(f"{error.filename or path}: {error.strerror}") from error
