"""The journal: nothing finished is ever lost or done twice, whatever kills the process."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import selfspec
from selfspec.checkpoint import FILE, Journal, Record, at, inspect
from selfspec.checkpoint.folder import read
from selfspec.config import Resume
from selfspec.errors import Interrupted, JournalError, StorageError
from selfspec.files import create
from selfspec.interrupt import trap

REPO = Path(selfspec.__file__).parents[1]
PLAN = "0123456789abcdef"


def begin(folder: Path, resume: Resume = Resume.auto, plan: str = PLAN) -> Journal:
    return Journal.open(folder, plan, {"K": 4}, resume)


def written(folder: Path, units: int) -> bytes:
    """A journal of so many units, and what it looks like on the disk."""
    with begin(folder) as journal:
        for n in range(units):
            journal.append("bench", f"unit {n}", {"n": n, "text": "ü\n"}, "cpu")
    return (folder / FILE).read_bytes()


def units(folder: Path) -> list[str]:
    """What is in the journal of a process that has ended, in order."""
    return [json.loads(line)["unit"] for line in (folder / FILE).read_bytes().splitlines()[1:]]


# --- what it keeps


def test_a_journal_is_a_header_and_a_line_for_each_unit(tmp_path: Path) -> None:
    data = written(tmp_path, 1)
    header, unit = map(json.loads, data.splitlines())
    assert header["journal"] == 1
    assert header["plan"] == PLAN
    assert header["settings"] == {"K": 4}
    assert header["created"].endswith("+00:00")
    assert list(unit) == ["stage", "unit", "at", "on", "data"]
    assert abs(unit["at"] / 1000 - (tmp_path / FILE).stat().st_mtime) < 60
    with begin(tmp_path) as journal:
        assert (journal.folder / FILE).read_bytes() == data  # opening it adds nothing


def test_a_unit_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    write, fsync = os.write, os.fsync

    def seen_write(fd: int, data: bytes) -> int:
        calls.append(("write", fd))
        return write(fd, data)

    def seen_fsync(fd: int) -> None:
        calls.append(("fsync", fd))
        fsync(fd)

    with begin(tmp_path) as journal:
        monkeypatch.setattr(os, "write", seen_write)
        monkeypatch.setattr(os, "fsync", seen_fsync)
        journal.append("bench", "a", {"text": "x" * 100_000}, "cpu")
        monkeypatch.undo()
    assert [name for name, _ in calls] == ["write", "fsync"]
    assert calls[0][1] == calls[1][1]


def test_notes(tmp_path: Path) -> None:
    with begin(tmp_path) as journal:
        assert journal.notes == {}
        journal.note("run_id", "one")
        journal.note("run_id", "two")
        journal.note("other", {"a": (1,)})
        assert journal.notes == {"run_id": "two", "other": {"a": [1]}}
        assert journal.records("bench") == []
    with begin(tmp_path) as journal:
        assert journal.notes == {"run_id": "two", "other": {"a": [1]}}


def test_a_unit_is_given_back_once_it_is_safe(tmp_path: Path) -> None:
    written(tmp_path, 1)
    with begin(tmp_path) as journal:
        assert journal.append("bench", "a", {}, "cpu").unit == "a"
        assert units(tmp_path).count("a") == 1


# --- what it resumes from


def test_resume_never_moves_the_old_journal_aside(tmp_path: Path) -> None:
    first = written(tmp_path, 2)
    with begin(tmp_path, Resume.never) as journal:
        assert journal.records("bench") == []
        journal.append("bench", "unit 0", {}, "cpu")
    second = (tmp_path / FILE).read_bytes()
    begin(tmp_path, Resume.never).close()
    assert (tmp_path / "journal.1.jsonl").read_bytes() == first
    assert (tmp_path / "journal.2.jsonl").read_bytes() == second
    assert len((tmp_path / FILE).read_bytes().splitlines()) == 1


def test_resume_never_begins_where_there_is_no_journal(tmp_path: Path) -> None:
    begin(tmp_path, Resume.never).close()
    assert not list(tmp_path.glob("journal.*.jsonl"))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    data = b'{"journal": 2, "anything": "else"}\n{"new": "kind"}\n'
    (tmp_path / FILE).write_bytes(data)
    message = (
        r"journal\.jsonl: was written by journal format 2; this selfspec reads 1: "
        r"upgrade selfspec, or use checkpoint\.resume=never$"
    )
    for resume in (Resume.auto, Resume.require):
        with pytest.raises(JournalError, match=message):
            begin(tmp_path, resume)
        with pytest.raises(JournalError, match=message):
            inspect(tmp_path, PLAN, resume)
    assert (tmp_path / FILE).read_bytes() == data
    inspect(tmp_path, PLAN, Resume.never)
    begin(tmp_path, Resume.never).close()
    assert (tmp_path / "journal.1.jsonl").read_bytes() == data


def test_inspect_changes_and_creates_nothing(tmp_path: Path) -> None:
    inspect(tmp_path / "none", PLAN)
    for ask in (inspect, lambda folder, *_: begin(folder, Resume.require)):
        with pytest.raises(JournalError, match="require"):
            ask(tmp_path / "none", PLAN, Resume.require)
    assert not list(tmp_path.iterdir())
    (tmp_path / FILE).write_bytes(written(tmp_path / "other", 0)[:-5])  # half a header
    with pytest.raises(JournalError, match="require"):
        begin(tmp_path, Resume.require)
    torn = written(tmp_path / "there", 2)[:-5]
    (tmp_path / "there" / FILE).write_bytes(torn)
    inspect(tmp_path / "there", PLAN, Resume.require)
    assert (tmp_path / "there" / FILE).read_bytes() == torn


def test_a_journal_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(JournalError, match=r"journal\.jsonl: cannot be read: is a directory"):
        inspect(tmp_path, PLAN)
    with pytest.raises(JournalError, match="is a directory"):
        begin(tmp_path)


@pytest.mark.parametrize("name", [FILE, "lock", "."])
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    """In a folder that others write to, a link may lead to any file of ours."""
    ours, folder = tmp_path / "ours", tmp_path / "shared"
    if name == ".":
        ours.mkdir()
        folder.symlink_to(ours)
    else:
        folder.mkdir()
        ours.write_text("precious")
        (folder / name).symlink_to(ours)
    with pytest.raises((JournalError, StorageError), match="symbolic link"):
        begin(folder)
    assert list(ours.iterdir()) == [] if name == "." else ours.read_text() == "precious"


def test_neither_a_pipe_nor_a_device_is_a_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    for ask in (lambda: inspect(tmp_path, PLAN), lambda: begin(tmp_path), lambda: read(Path("/dev/zero"))):
        with pytest.raises(JournalError, match="is no regular file"):
            ask()


def test_a_file_is_made_in_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("precious")
    (tmp_path / "log").symlink_to(tmp_path / "ours")
    with create(tmp_path / "log") as file:
        file.write(b"mine")
    assert ((tmp_path / "ours").read_text(), (tmp_path / "log").read_text()) == ("precious", "mine")


# --- torn and corrupt


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff", b'{"at": 1e999}', b"null"])
def test_what_is_no_line_is_refused(tmp_path: Path, line: bytes) -> None:
    data = written(tmp_path, 1)
    (tmp_path / FILE).write_bytes(data + line + b"\n" + data.splitlines()[1] + b"\n")
    for ask in (lambda: inspect(tmp_path, PLAN), lambda: begin(tmp_path)):
        with pytest.raises(JournalError, match=r"journal\.jsonl, line 3: is (not JSON|no line)"):
            ask()


def test_a_journal_torn_at_any_byte_keeps_its_whole_units(tmp_path: Path) -> None:
    """Cut anywhere: every unit whose line is whole is there, and the journal can be carried on with."""
    data = written(tmp_path, 3)
    ends = [n + 1 for n, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        (tmp_path / FILE).write_bytes(data[:cut])
        whole = max(sum(end <= cut for end in ends) - 1, 0)
        inspect(tmp_path, PLAN)
        with begin(tmp_path) as journal:
            found = [record.unit for record in journal.records("bench")]
            assert found == [f"unit {n}" for n in range(whole)], cut
            journal.append("bench", "next", {}, "cpu")
        assert units(tmp_path) == [*found, "next"], cut


@pytest.mark.parametrize("tail", [b"\0" * 50 + b"\n", b"\0" * 50, b'{"stage":"be\n', b"\xff\n", b"\n"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture) -> None:
    data = written(tmp_path, 2)
    assert not caplog.records
    (tmp_path / FILE).write_bytes(data + tail)
    with begin(tmp_path) as journal:
        assert len(journal.records("bench")) == 2
    assert (tmp_path / FILE).read_bytes() == data
    assert "the last line was torn" in caplog.text


@pytest.mark.parametrize("line", [1, 2, 3])
@pytest.mark.parametrize("bad", [b"", b"{", b"\0\0", b"\xff", b"[]", b"3", b'{"stage":"bench"}', b'{"journal":1}'])
def test_damage_in_the_middle_is_refused(tmp_path: Path, line: int, bad: bytes) -> None:
    lines = written(tmp_path, 3).splitlines()
    lines[line - 1] = bad
    data = b"\n".join(lines) + b"\n"
    (tmp_path / FILE).write_bytes(data)
    for check in (lambda: begin(tmp_path), lambda: inspect(tmp_path, PLAN)):
        with pytest.raises(JournalError, match=rf"journal\.jsonl, line {line}: is n.*checkpoint\.resume=never"):
            check()
    assert (tmp_path / FILE).read_bytes() == data


def test_a_foreign_file_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"somebody": "else"}\n')
    with pytest.raises(JournalError, match="line 1: is no line of a journal"):
        begin(tmp_path)
    assert (tmp_path / FILE).read_text() == '{"somebody": "else"}\n'


def test_a_unit_that_stands_twice_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path, 2)
    (tmp_path / FILE).write_bytes(data + data.splitlines(keepends=True)[1])
    with pytest.raises(JournalError, match="line 4: repeats unit 'unit 0' of stage 'bench'"):
        begin(tmp_path)


# --- disks that take no more


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_no_finished_unit(small_disk: Path) -> None:
    journal = begin(small_disk / "run")
    with pytest.raises(StorageError, match=r"journal\.jsonl: cannot be written: no space left on device"), journal:
        for n in range(1000):
            journal.append("bench", f"unit {n}", {"text": "x" * 10_000}, "cpu")
    finished = [record.unit for record in journal.records("bench")]
    assert finished
    assert units(small_disk / "run") == finished  # nothing half-written is left
    with begin(small_disk / "run") as again:
        assert [record.unit for record in again.records("bench")] == finished
        again.append("bench", "small enough", {}, "cpu")


def test_a_read_only_disk_is_refused(small_disk: Path) -> None:
    written(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    inspect(small_disk, PLAN)
    for folder in (small_disk, small_disk / "new"):
        with pytest.raises(StorageError, match=f"^{folder}: cannot be written: read-only file system"):
            begin(folder)


def test_a_short_write_closes_the_journal(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with begin(tmp_path) as journal:
        journal.append("bench", "a", {}, "cpu")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(StorageError, match=r"journal\.jsonl: cannot be written: file too large"):
                journal.append("bench", "b", {"text": "x" * 10_000}, "cpu")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert journal.get("bench", "b") is None
        with pytest.raises(ValueError, match="is closed"):  # rather than write after what may be half a line
            journal.append("bench", "c", {}, "cpu")
    assert units(tmp_path) == ["a"]


@pytest.mark.parametrize("cut", [True, False])
def test_a_unit_whose_sync_failed_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """The unit counts as not finished; or as finished, if not even the clean-up worked."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with begin(tmp_path) as journal:
        journal.append("bench", "a", {}, "cpu")
        monkeypatch.setattr(os, "fsync", fail)
        if not cut:
            monkeypatch.setattr(os, "ftruncate", fail)
        with pytest.raises(StorageError, match="input/output error"):
            journal.append("bench", "b", {}, "cpu")
        monkeypatch.undo()
    with begin(tmp_path) as journal:
        assert [record.unit for record in journal.records("bench")] == (["a"] if cut else ["a", "b"])


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/run: cannot be written: not a directory"):
        begin(tmp_path / "file" / "run")


# --- signals and kills


def test_a_signal_waits_for_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Record] = []
    write = os.write

    def interrupted(fd: int, data: bytes) -> int:
        written = write(fd, data[:10])  # and falls short, too
        os.kill(os.getpid(), signal.SIGTERM)
        return written

    with pytest.raises(Interrupted), trap(), begin(tmp_path) as journal:
        monkeypatch.setattr(os, "write", interrupted)
        seen.append(journal.append("bench", "a", {}, "cpu"))
    monkeypatch.undo()
    assert journal.get("bench", "a") is not None
    assert not seen
    assert units(tmp_path) == ["a"]


def test_the_journal_works_while_cleaning_up(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), trap(), begin(tmp_path) as journal:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            journal.note("status", "KILLED")
    with begin(tmp_path) as journal:
        assert journal.notes == {"status": "KILLED"}


WORKER = """if True:
    import random, sys, time
    from pathlib import Path
    from selfspec.checkpoint import Journal
    from selfspec.config import Resume
    from selfspec.errors import Interrupted
    from selfspec.interrupt import trap

    folder, count, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    try:
        with trap(), Journal.open(folder, "plan", {}, Resume.auto) as journal:
            print("open", flush=True)
            if "wait" in how:
                sys.stdin.readline()
            for n in range(count):
                if journal.get("bench", str(n)) is None:
                    journal.append("bench", str(n), {"text": "x" * random.choice([10, 1000, 100_000])}, "cpu")
                    print(n, flush=True)
            if "stay" in how:
                time.sleep(600)
    except Interrupted as error:
        sys.exit(error.exit_code)
"""


MORE = 500
"""Units that a worker has to do: it is killed long before they are done, or while it waits for that."""


def worker(folder: Path, count: int, *options: str) -> "subprocess.Popen[str]":
    """A process that does those of ``count`` units that are not done, and prints each one it has done.

    ``wait``: it begins when it is told to; ``stay``: it does not end by itself.
    """
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WORKER, str(folder), str(count), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )


def stop(child: "subprocess.Popen[str]", signum: int, after: int, wait_s: float) -> list[str]:
    """Signal a worker once it has done some units; every unit it says it has done."""
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    done = [child.stdout.readline().strip() for _ in range(after)]
    time.sleep(wait_s)
    child.send_signal(signum)
    out, err = child.communicate()
    assert not err
    return done + out.split("\n")[:-1]  # what comes after the last newline may be half a number


@pytest.mark.slow
def test_kill_9_loses_no_finished_unit(tmp_path: Path) -> None:
    chance = random.Random(0)
    done, kept = list[str](), list[str]()
    for _ in range(10):
        child = worker(tmp_path, len(kept) + MORE, "stay")
        done += stop(child, signal.SIGKILL, after=chance.randrange(20), wait_s=chance.random() / 50)
        assert child.returncode == -signal.SIGKILL
        with begin(tmp_path, Resume.auto, "plan") as journal:  # which cuts a torn line off
            kept = [record.unit for record in journal.records("bench")]
        assert set(done) <= set(kept)
        assert kept == [str(n) for n in range(len(kept))]
    assert len(done) == len(set(done))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_clean_journal(tmp_path: Path, signum: int, code: int) -> None:
    chance, kept = random.Random(1), list[str]()
    for _ in range(3):
        child = worker(tmp_path, len(kept) + MORE, "stay")
        done = stop(child, signum, after=chance.randrange(20), wait_s=chance.random() / 50)
        assert child.returncode == code
        data = (tmp_path / FILE).read_bytes()
        kept = units(tmp_path)
        assert data.endswith(b"\n")
        assert set(done) <= set(kept)
        assert kept == [str(n) for n in range(len(kept))]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_waits(tmp_path: Path, killed: bool) -> None:
    first = worker(tmp_path, 20, "wait")
    assert first.stdout is not None
    assert first.stdout.readline() == "open\n"
    second = worker(tmp_path, 20)
    assert second.stderr is not None
    assert second.stderr.readline() == f"waiting for another process that runs the same plan: {tmp_path}\n"
    if killed:
        first.kill()
        done, _ = first.communicate()
    else:
        done, _ = first.communicate("\n")
    more, err = second.communicate()
    assert second.returncode == 0
    assert not err  # said once
    assert more.split() == ["open", *(() if done else map(str, range(20)))]
    assert bool(done) is not killed
    assert units(tmp_path) == [str(n) for n in range(20)]


def test_who_waits_for_a_head_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    building, built = threading.Event(), threading.Event()

    def build(path: Path) -> None:
        building.set()
        assert built.wait(60)
        path.write_bytes(b"head")

    def never(path: Path) -> None:
        raise AssertionError("it is there")

    first = threading.Thread(target=at(str(tmp_path)).make, args=("heads/x", build))
    first.start()
    assert building.wait(60)
    second = threading.Thread(target=at(str(tmp_path)).make, args=("heads/x", never))
    second.start()
    said = ""
    while not said:
        said = capsys.readouterr().err
    built.set()
    first.join()
    second.join()
    assert said == f"waiting for another process that makes {tmp_path}/heads/x\n"
