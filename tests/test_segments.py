"""The journal in a bucket: no unit lost, none recorded twice, whoever is killed, cut off or taken for dead."""

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from gcs import Proxy

from selfspec.checkpoint import Journal, Record, finished, inspect, plan_place
from selfspec.checkpoint import bucket as bucket_module
from selfspec.checkpoint import lease as lease_module
from selfspec.checkpoint.bucket import Bucket
from selfspec.config import Resume
from selfspec.errors import Interrupted, JournalError, LeaseError, StorageError
from selfspec.interrupt import trap

PLAN = "0123456789abcdef"
DIR = "gs://bucket/ckpt"
URL = plan_place(DIR, PLAN)
_names = count()


def begin(place: str = URL, resume: Resume = Resume.auto, plan: str = PLAN, launch: str | None = None) -> Journal:
    """Its lease is one that nothing renews while a test runs: ``expire`` is to be the last word on it."""
    return Journal.open(place, plan, {"K": 4}, resume, launch=launch, lease_s=1e6)


def written(units: int, place: str = URL) -> None:
    with begin(place) as journal:
        for n in range(units):
            journal.append("bench", f"unit {n}", {"n": n, "text": "ü\n"}, "cpu")


def units(place: str = URL) -> list[str]:
    """Of a journal, in order; opening it fails where one stands twice."""
    with begin(place, Resume.require) as journal:
        return [record.unit for record in journal.records("bench")]


def expire(epoch: int = 1) -> None:
    """Makes a holder look as if it had died long ago."""
    Bucket(URL).write(f"lease/{epoch:08d}", b'{"until": 1, "term_s": 60, "holder": "x"}')


def objects() -> dict[str, list[bytes]]:
    """The segments' lines."""
    bucket = Bucket(URL)
    return {name: (bucket.read(f"journal/{name}") or b"").splitlines() for name in bucket.names("journal")}


@pytest.fixture(params=[pytest.param("gs", marks=pytest.mark.slow), "memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return URL
    return f"memory://journal/{next(_names)}" if request.param == "memory" else f"file://{tmp_path}/a%20b/plan"


# --- what it keeps, wherever it is


def test_units_and_notes_are_read_back(place: str) -> None:
    with begin(place) as journal:
        first = journal.append("fit", "block/0", {"loss": float("inf"), "shape": (1, 2), "by_k": {3: None}}, "cpu")
        second = journal.append("bench", "block/0", {"text": "ü\n"}, "gpu")
        journal.note("run_id", "one")
        journal.note("run_id", "two")
        with pytest.raises(ValueError, match="in the journal already"):
            journal.append("bench", "block/0", {}, "cpu")
        with pytest.raises(TypeError):
            journal.append("bench", "x", {"x": object()}, "cpu")
        with pytest.raises(TypeError):
            journal.note("x", object())
    journal.close()
    for act in (lambda: journal.append("bench", "x", {}, "cpu"), lambda: journal.note("key", 1)):
        with pytest.raises(ValueError, match="is closed"):
            act()
    assert first.data == {"loss": float("inf"), "shape": [1, 2], "by_k": {"3": None}}, "as it will be read"
    assert journal.records("bench") == [second], "what it holds can still be read"
    for _ in range(2):
        with begin(place, Resume.require) as again:
            assert again.created == journal.created and again.notes == {"run_id": "two"}
            assert [again.records(stage) for stage in ("fit", "bench", "quality")] == [[first], [second], []]
            assert again.get("bench", "block/0") == second and again.get("bench", "block/1") is None
            with pytest.raises(ValueError, match="unit 'block/0' of stage 'bench' is in the journal already"):
                again.append("bench", "block/0", {}, "cpu")


def test_resume_auto_require_and_never(place: str) -> None:
    assert not inspect(place, PLAN)
    for ask in (inspect, lambda *args: begin(place, Resume.require)):
        with pytest.raises(JournalError, match=r"checkpoint\.resume=require: there is no journal .*; auto begins one"):
            ask(place, PLAN, Resume.require)  # type: ignore[operator]
    assert not inspect(place, PLAN)
    written(2, place)
    assert inspect(place, PLAN, Resume.require) and inspect(place, PLAN)
    for ask in (inspect, lambda place, plan: begin(place, plan=plan)):
        with pytest.raises(JournalError, match=f"is the journal of plan {PLAN}, not of other"):
            ask(place, "other")
    with begin(place, Resume.never) as journal:
        assert journal.records("bench") == []
        journal.append("bench", "unit 1", {}, "cpu")
    assert units(place) == ["unit 1"]
    with begin(place, Resume.never, plan="other", launch="sweep 1"):
        pass
    begin(place, plan="other").close()


def test_a_launch_carries_on_with_what_it_began(place: str) -> None:
    written(2, place)
    for resume, launch, kept in [
        (Resume.never, "sweep 1", []),
        (Resume.never, "sweep 1", ["sweep 1"]),  # killed and restarted by its launcher
        (Resume.auto, "sweep 2", ["sweep 1", "sweep 1"]),
        (Resume.never, "sweep 2", []),
        (Resume.never, None, []),
        (Resume.never, None, []),
    ]:
        with begin(place, resume, launch=launch) as journal:
            assert [record.data["of"] for record in journal.records("bench")] == kept
            journal.append("bench", f"unit {len(kept)}", {"of": launch}, "cpu")


def test_a_result_is_left_beside_the_journal(place: str) -> None:
    folder, _, plan = place.rpartition("/")
    with begin(f"{folder}/plans/{plan}") as journal:
        assert finished(folder, plan) is None
        journal.write_result('{"status": "failed"}')
        assert finished(folder, plan) == {"status": "failed"}
        journal.write_result('{"status": "finished"}')
    assert finished(folder + "/", plan) == {"status": "finished"}
    with begin(f"{folder}/plans/{plan}", Resume.never) as journal:
        assert finished(folder, plan) is None  # it is another journal's
        journal.write_result("[]")
    with pytest.raises(JournalError, match=f"{plan}/result.json: is no result; delete it, and the job writes it again"):
        finished(folder, plan)


# --- what lies in the bucket


def test_each_line_and_each_opening_is_an_object(gcs: Proxy) -> None:
    written(1)
    written(0)
    found = objects()
    assert list(found) == [f"{n:08d}.jsonl" for n in range(4)]
    (fence,), (_, header), (head, unit), (second_fence,) = found.values()
    assert json.loads(header)["plan"] == PLAN and json.loads(unit)["unit"] == "unit 0"
    assert head == fence and json.loads(fence)["epoch"] == 1 and json.loads(second_fence)["epoch"] == 2
    seen = list(gcs.seen)
    inspect(URL, PLAN, Resume.require)
    assert all(line.startswith("GET") for line in gcs.seen[len(seen) :])  # changes and creates nothing


def test_resume_never_keeps_the_old_objects(gcs: Proxy) -> None:
    written(2)
    Bucket(URL).write("journal/00000002.jsonl", b"damaged")
    before = objects()
    with pytest.raises(JournalError, match="no segment"):
        begin()
    begin(resume=Resume.never).close()
    assert {name: objects()[name] for name in before} == before
    assert units() == []


@pytest.mark.parametrize("bad", [b"", b"\n", b"{}\n", b"[]\n", b'{"segment": 1}', b'{"segment": 2}\n', b"\xff\n"])
def test_an_empty_or_foreign_object_is_refused(gcs: Proxy, bad: bytes) -> None:
    written(2)
    Bucket(URL).write("journal/00000002.jsonl", bad)
    for ask in (begin, lambda: inspect(URL, PLAN)):
        with pytest.raises(JournalError, match=r"^gs://.*/journal/00000002.jsonl: is no segment of a journal: "):
            ask()
    begin(resume=Resume.never).close()


def test_a_segment_with_a_foreign_line_is_refused(gcs: Proxy) -> None:
    written(2)
    Bucket(URL).write("journal/00000003.jsonl", b'{"segment": 1}\n{"stage": "bench"}\n')
    with pytest.raises(JournalError, match=r"^gs://.*/journal/00000003.jsonl: is no line of a journal: "):
        begin()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_object_is_refused(gcs: Proxy, number: int) -> None:
    """Such as a lifecycle rule deletes; what comes before a new beginning may be missing."""
    written(2)
    Bucket(URL).write("journal/readme.txt", b"")  # not ours, and in nobody's way
    Bucket(URL).remove(f"journal/0000000{number}.jsonl")
    before = list(objects())
    for ask in (begin, lambda: inspect(URL, PLAN)):
        with pytest.raises(JournalError, match=rf"0000000{number}.jsonl: is missing: use another checkpoint.dir, or "):
            ask()
    assert list(objects()) == before
    begin(resume=Resume.never).close()
    assert units() == []


# --- two processes


def test_a_zombie_is_fenced(gcs: Proxy) -> None:
    zombie = begin()
    zombie.append("bench", "unit 0", {}, "zombie")
    expire()
    with begin() as successor:
        for act in (
            lambda: zombie.append("bench", "unit 1", {}, "zombie"),
            lambda: zombie.write_result("{}"),
        ):
            with pytest.raises(LeaseError, match="another process"):
                act()
        assert zombie.get("bench", "unit 1") is None
        with pytest.raises(ValueError, match="is closed"):
            zombie.note("run_id", 1)
        successor.append("bench", "unit 1", {}, "successor")
    zombie.close()
    with begin() as journal:
        assert [record.on for record in journal.records("bench")] == ["zombie", "successor"]
    assert finished(DIR, PLAN) is None


def test_a_zombies_write_that_arrives_late_is_refused(gcs: Proxy) -> None:
    """Sent before its successor began, and there only after: it is refused, and its unit is run again."""
    zombie, ended = begin(), list[Exception]()
    late = gcs.plant("POST.*journal/00000002", "late")

    def append() -> None:
        try:
            zombie.append("bench", "unit 0", {}, "zombie")
        except LeaseError as error:
            ended.append(error)

    thread = threading.Thread(target=append)
    thread.start()
    late.met.wait()
    expire()
    with begin() as successor:
        assert successor.records("bench") == []
        late.released.set()
        thread.join()
        assert len(ended) == 1 and "00000002.jsonl: was written by another process" in str(ended[0])
        successor.append("bench", "unit 0", {}, "successor")
    zombie.close()
    assert units() == ["unit 0"]


def test_a_zombies_write_just_before_the_fence_is_read(gcs: Proxy) -> None:
    """It stands, and its successor, which had not read it, reads again."""
    zombie, opened = begin(), list[Journal]()
    expire()
    late = gcs.plant('POST.*journal/00000002.*"epoch": 2', "late")
    thread = threading.Thread(target=lambda: opened.append(begin()))
    thread.start()
    late.met.wait()
    zombie.append("bench", "unit 0", {}, "zombie")
    late.released.set()
    thread.join()
    assert [record.unit for record in opened[0].records("bench")] == ["unit 0"]
    with pytest.raises(LeaseError):
        zombie.append("bench", "unit 1", {}, "zombie")
    opened[0].close()


def test_eight_at_once_do_each_unit_once(gcs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "POLL_S", 0.01)
    done = list[str]()

    def work(_: int) -> None:
        with Journal.open(URL, PLAN, {}, Resume.auto) as journal:
            for n in range(3):
                if journal.get("bench", str(n)) is None:
                    journal.append("bench", str(n), {}, "cpu")
                    done.append(str(n))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted(done) == sorted(units()) == ["0", "1", "2"]


# --- answers that are lost


@pytest.mark.parametrize("what", [503, "drop"])
@pytest.mark.parametrize("after", [False, True])
def test_an_append_that_is_retried_stands_once(gcs: Proxy, what: int | str, after: bool) -> None:
    faults = [gcs.plant(f"POST.*{name}", what, after=after) for name in ("lease/", "00000000", "00000001", "00000003")]
    written(3)
    assert [fault.times for fault in faults] == [0, 0, 0, 0]
    assert units() == ["unit 0", "unit 1", "unit 2"]


@pytest.mark.parametrize("after", [False, True])
def test_a_failed_append_closes_the_journal(gcs: Proxy, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit counts as not finished; or as finished, if it arrived all the same."""
    monkeypatch.setattr(bucket_module, "TRIES", 1)
    with begin() as journal:
        journal.append("bench", "a", {}, "cpu")
        gcs.plant("POST.*00000003", 503, times=99, after=after)
        gcs.plant("GET.*00000003", 503, times=99)
        with pytest.raises(StorageError, match=r"00000003.jsonl: cannot be (written|read): planted, 503"):
            journal.append("bench", "b", {}, "cpu")
        assert journal.get("bench", "b") is None
        with pytest.raises(ValueError, match="is closed"):
            journal.append("bench", "c", {}, "cpu")
    for fault in gcs.faults:
        fault.times = 0
    assert units() == (["a", "b"] if after else ["a"])


# --- signals


def interrupting(how: Callable[[], object]) -> Callable[..., object]:
    pipe = Bucket.create

    def create(self: Bucket, name: str, data: bytes) -> bool:
        how()
        return pipe(self, name, data)

    return create


def test_a_signal_waits_for_the_unit(gcs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Record] = []
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught, trap(), begin() as journal:
        patch.setattr(Bucket, "create", interrupting(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        seen.append(journal.append("bench", "a", {}, "cpu"))
    assert caught.value.signum == signal.SIGTERM and not seen
    assert units() == ["a"]


def test_a_signal_ends_the_retries(gcs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is told to end while its bucket is away does not wait for it to come back."""
    slept: list[float] = []
    with pytest.raises(Interrupted), trap(), begin() as journal:
        monkeypatch.setattr(journal._lines._bucket, "_sleep", slept.append)  # type: ignore[attr-defined]
        gcs.plant("POST.*journal", 503, times=999)
        monkeypatch.setattr(Bucket, "create", interrupting(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        journal.append("bench", "a", {}, "cpu")
    assert not slept
