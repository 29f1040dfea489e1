"""Atomic writes, and what is told about where a result comes from."""

import errno
import getpass
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import selfspec
from selfspec import files, provenance
from selfspec.errors import Interrupted, StorageError
from selfspec.interrupt import trap

REPO = Path(selfspec.__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, that selfspec believes it runs from; of a git that nobody has configured."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setenv("HOME", os.devnull)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    who = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("one")
    (tmp_path / ".gitignore").write_text("ignored\n")
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "--no-verify", "-m", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(provenance, "GIT_TIMEOUT_S", 1e6)
    return tmp_path


@pytest.mark.parametrize("data", ["täxt\n", b"\x00\xff"])
def test_writes_and_overwrites(tmp_path: Path, data: str | bytes) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, "something longer that was there before")
    files.write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(tmp_path.iterdir()) == [path]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "no space left on device"), (errno.EROFS, "read-only file system")]
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=f"^{re.escape(str(path))}: cannot be written: {words}$"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(StorageError, match="none/file: cannot be written: no such file or directory"):
        files.write_atomic(tmp_path / "none" / "file", "")


def test_a_signal_waits_for_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def interrupted(fd: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(Interrupted), trap():
        files.write_atomic(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_folders_that_cannot_be_synced_are_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    code = errno.EINVAL
    files.sync_folder(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        files.sync_folder(tmp_path)


def test_hardware_is_told() -> None:
    found = provenance.hardware()
    assert found == provenance.hardware()
    assert found["cpu"]
    physical, logical, memory = found["physical_cores"], found["logical_cores"], found["memory_gb"]
    assert isinstance(physical, int) and isinstance(logical, int) and isinstance(memory, int)
    assert 1 <= physical <= logical
    assert memory >= 1


def test_hardware_without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", none)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    found = provenance.hardware()
    assert found["cpu"]
    assert found["logical_cores"] == os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_only_usable_cores_count() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        found = provenance.hardware()
    finally:
        os.sched_setaffinity(0, before)
    assert (found["physical_cores"], found["logical_cores"]) == (1, 1)


def test_nothing_private_is_told() -> None:
    told = json.dumps(provenance.collect())
    private = [str(REPO), f'"{platform.node()}"', *([] if Path.home() == Path("/") else [str(Path.home())])]
    with suppress(KeyError, OSError):  # as in a container, whose user may have no name
        private.append(f'"{getpass.getuser()}"')
    assert not [each for each in private if each in told]


def test_fingerprint_tells_what_timings_depend_on() -> None:
    some = {"device": "cpu", "dtype": "bf16", "threads": 2}
    prints = [
        provenance.fingerprint(),
        provenance.fingerprint(some),
        provenance.fingerprint(some | {"threads": 4}),
        provenance.fingerprint(some | {"dtype": "fp32"}),
    ]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{12}", each) for each in prints)
    assert provenance.fingerprint(dict(reversed(some.items()))) == provenance.fingerprint(some)


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = provenance.versions()
    assert (found["python"], found["selfspec"]) == (platform.python_version(), selfspec.__version__)
    assert found["hydra-core"].startswith("1.")
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-of-ours",))
    assert set(provenance.versions()) == {"python", "selfspec"}


@pytest.mark.slow
def test_nothing_heavy_is_imported() -> None:
    program = """if True:
        import sys
        from selfspec import checkpoint, provenance
        provenance.collect()
        assert not {"torch", "transformers", "mlflow", "hydra"} & set(sys.modules)
    """
    env = os.environ | {"PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=env, check=True)


def test_git_tells_commit_and_changes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    sha = head.stdout.strip()
    (checkout / "ignored").write_text("")
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # as in a hook of another checkout
    assert provenance.git() == {"sha": sha, "dirty": "false"}
    (checkout / "new").write_text("")
    assert provenance.git() == {"sha": sha, "dirty": "true"}
    (checkout / "new").unlink()
    (checkout / "file").write_text("two")
    assert provenance.git() == {"sha": sha, "dirty": "true"}


def test_git_where_there_is_none(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = checkout / "site-packages"
    inside.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "_CHECKOUT", inside)
        assert provenance.git() == {}
        subprocess.run(["git", "init", "-q"], cwd=inside, check=True)
        assert provenance.git() == {}, "there is no commit yet"
    monkeypatch.setenv("PATH", "/nonexistent")
    assert provenance.git() == {}


def test_git_that_hangs(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "GIT_TIMEOUT_S", 0.05)
    assert provenance.git() == {}
