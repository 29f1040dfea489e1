"""Objects in a bucket, by fsspec: asked again while trouble may pass, refused in one line where it will not.

Of the store only this is expected: an object is there whole or not at all, what was written is read and listed
from then on, and one that is to be *created* is refused if it is there already. The last is tried out
(:meth:`Bucket.check_exclusive`), for a store that does not keep to it would let two processes write one journal.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from selfspec.errors import ConfigError, StorageError, one_line
from selfspec.interrupt import told_to_end

TRIES = 6
"""Of ours; each stands for as many of the client's own, so that an outage of minutes ends no job of hours."""

_CONNECT_S, _SILENCE_S = 15, 60
_PASSING = (408, 425, 429)
_FINAL = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotImplementedError),
    *(ImportError, ValueError, TypeError, AttributeError, LookupError),
)
_NEEDS = {"gs": "selfspec[gcs]", "gcs": "selfspec[gcs]", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}

T = TypeVar("T")


class Bucket:
    """The objects below a URL, by names relative to it.

    Attributes:
        url: without a slash at its end.
    """

    def __init__(self, url: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self.url = trimmed(url)
        self._sleep = sleep
        self._fs, self._root = _open(self.url)

    def where(self, name: str = "") -> str:
        """The URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """An object, or a range of its bytes; ``None`` if it is not there.

        Raises:
            StorageError: there is no such bucket, no right to read it, or it does not answer.
        """
        data: bytes | None = self._find("read", name, lambda: self._fs.cat_file(self._path(name), start=start, end=end))
        return data

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Objects that are there, all at once."""
        paths = [self._path(name) for name in names]
        try:
            found: list[bytes] = self._ask("read", "", lambda: self._cat(paths))
            return found
        except FileNotFoundError as error:
            self._check_there()
            raise StorageError(f"{self.url}: something was deleted while it was read: {one_line(error)}") from error

    def size(self, name: str) -> int | None:
        """Of an object, in bytes; ``None`` if it is not there."""
        found = self._find("read", name, lambda: self._fs.info(self._path(name)))
        return None if found is None else int(found["size"])

    def names(self, below: str) -> list[str]:
        """The objects directly in a folder, sorted, by their names there."""
        folder = self._path(below)
        found = self._find("listed", below, lambda: self._list(folder)) or []
        names = (path.removeprefix(folder).lstrip("/") for path in found)
        return sorted(name for name in names if name and "/" not in name)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not be there yet.

        Returns:
            Whether it was us who wrote it. Where an answer was lost, our own second try finds our first one there:
            ``data`` tells them apart, so it must say who writes.
        """
        try:
            self._write(name, data, "create")
        except FileExistsError:
            return self.read(name) == data
        return True

    def write(self, name: str, data: bytes) -> None:
        """Write an object, over one that is there."""
        self._write(name, data, "overwrite")

    def remove(self, name: str) -> None:
        """Delete an object, if it is there."""
        self._find("written", name, lambda: self._fs.rm_file(self._path(name)))

    def check_exclusive(self, name: str, data: bytes) -> None:
        """Try to create an object that is there; ``data`` must do as its content.

        Raises:
            StorageError: the store let us.
        """
        try:
            self._write(name, data, "create")
        except FileExistsError:
            return
        raise StorageError(
            f"{self.url}: this store writes over what is to be created only once, so two processes could write one "
            "journal: use another checkpoint.dir"
        )

    def _write(self, name: str, data: bytes, mode: str) -> None:
        try:
            self._ask("written", name, lambda: self._fs.pipe_file(self._path(name), data, mode=mode))
        except FileNotFoundError as error:
            raise self._nowhere() from error

    def _cat(self, paths: list[str]) -> list[bytes]:
        found: list[bytes | Exception] = self._fs.cat_ranges(paths, None, None)
        for each in found:
            if isinstance(each, Exception):
                raise each
        return [each for each in found if isinstance(each, bytes)]

    def _list(self, folder: str) -> list[str]:
        """The objects in a folder, and perhaps below it."""
        if _finds_by_walking(self._fs):  # which takes a listing that fails for an empty one
            return [entry["name"] for entry in self._fs.ls(folder, detail=True) if entry["type"] != "directory"]
        found: list[str] = self._fs.find(folder)
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_there(self) -> None:
        """An object that is missing and a bucket that is missing read alike; a list tells them apart."""
        if self._name not in _there:
            try:
                self._ask("listed", "", lambda: self._list(self._path(".none")))
            except FileNotFoundError as error:
                if not _finds_by_walking(self._fs):  # else a folder is made when it is written to
                    raise self._nowhere() from error
            _there.add(self._name)

    @property
    def _name(self) -> str:
        return f"{self.url.partition('://')[0]}://{self._root.lstrip('/').partition('/')[0]}"

    def _nowhere(self) -> StorageError:
        return StorageError(f"{self.url}: there is no bucket {self._name}; make it, or name another")

    def _find(self, verb: str, name: str, call: Callable[[], Any]) -> Any:
        """As :meth:`_ask`; ``None`` where the object is not there, but its bucket is."""
        try:
            return self._ask(verb, name, call)
        except FileNotFoundError:
            self._check_there()
            return None

    def _ask(self, verb: str, name: str, call: Callable[[], Any]) -> Any:
        """Has the store do something; what it says of a file (there, not there) is passed on."""

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if error is not None and self._name not in _away:
                _away.add(self._name)
                print(f"warning: {self.where(name)}: {_reason(error)}; asked again", file=sys.stderr, flush=True)

        trying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=_enough,
            # Random, so that the jobs of a sweep do not all come back to a busy store at once.
            wait=wait_random_exponential(multiplier=2, max=30),
            before_sleep=say,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            answer = trying(call)
            _away.discard(self._name)
            return answer
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise StorageError(f"{self.where(name)}: cannot be {verb}: {_reason(error)}") from error


_there = set[str]()
"""Buckets that were seen by this process."""
_away = set[str]()
"""Those that did not answer when last asked; it has been said."""


def trimmed(place: str) -> str:
    """A URL or a path without slashes at its end, ready to have one and a name put behind it."""
    return re.sub("(?<![:/])/+$", "", place)


def _finds_by_walking(fs: Any) -> bool:
    """Whether its ``find`` is fsspec's own, and not one that asks the store for all that begins so."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is AsyncFileSystem._find
    return type(fs).find is AbstractFileSystem.find


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("gs", "gcs"):
        # Before gcsfs is imported: we write plain objects, and its support of other buckets asks for further rights
        # (and, where there is no gRPC, waits for a minute to be told so).
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs with traceback what it also raises
        try:
            from aiohttp import ClientTimeout
        except ImportError:
            pass  # said below
        else:
            limits = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
            options["requests_timeout"] = limits  # it has none of its own; a large head may take long
    import fsspec

    try:
        if "::" in url:
            raise ValueError("chained URLs cannot keep two writers apart")
        # No listings cache: what another process wrote a moment ago must be listed.
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise ConfigError(f"checkpoint.dir={url}: needs pip install '{_NEEDS.get(protocol, protocol)}'") from error
    except ValueError as error:
        raise ConfigError(f"checkpoint.dir={url}: {one_line(error)}; must be a folder or a URL of fsspec's") from error
    except Exception as error:
        raise StorageError(f"checkpoint.dir={url}: cannot be reached: {_reason(error)}") from error
    return fs, root.rstrip("/")


def _enough(state: RetryCallState) -> bool:
    return told_to_end() or stop_after_attempt(TRIES)(state)


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help. What nobody foresaw may."""
    code = str(getattr(error, "code", ""))
    if code.isdecimal():
        return int(code) in _PASSING or int(code) >= 500
    # Before _FINAL, which has its base, ValueError.
    if isinstance(error, json.JSONDecodeError):  # half an answer
        return True
    denied = str(error).startswith("Forbidden") or type(error).__name__ in ("DefaultCredentialsError",)
    return isinstance(error, Exception) and not denied and not isinstance(error, _FINAL)


def _reason(error: BaseException) -> str:
    """What a store said, in one line without the addresses that clients put first."""
    said = str(error)
    if said.startswith("Forbidden"):
        said = "forbidden: " + said.partition("\n")[2]
    elif str(getattr(error, "code", "")) == "401":
        said = f"no credentials, or ones that have run out: {said}"
    elif isinstance(error, TimeoutError):
        said = "no answer in time"
    said = one_line(said) if said else type(error).__name__
    return said if len(said) <= 300 else f"{said[:300]}..."
