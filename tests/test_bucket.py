"""Objects in a bucket: over real HTTP, with the real client, and with all that can go wrong on the way."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from gcs import NO_RIGHT, Proxy

from selfspec.checkpoint import bucket as module
from selfspec.checkpoint.bucket import Bucket
from selfspec.errors import ConfigError, Interrupted, StorageError
from selfspec.interrupt import trap

URL = "gs://bucket/some where"


@pytest.fixture
def bucket(gcs: Proxy) -> Bucket:
    return Bucket(URL, sleep=lambda seconds: None)


@pytest.mark.parametrize("url", [URL, "gs://bucket", "memory://a/b", "memory://"])
def test_objects_are_created_written_read_listed_and_removed(url: str, gcs: Proxy) -> None:
    bucket = Bucket(url + "/")
    assert bucket.read("x/1") is None and bucket.size("x/1") is None and bucket.names("x") == []
    assert bucket.create("x/1", b"one") and not bucket.create("x/1", b"other")
    assert bucket.create("x/1", b"one")  # our own
    bucket.write("x/2", b"")
    bucket.write("x/2", b"22")
    bucket.write("x/y/3", b"three")
    bucket.write("x2/4", b"four")
    assert bucket.names("x") == ["1", "2"]
    assert bucket.read_all(["x/2", "x/1"]) == [b"22", b"one"]
    assert bucket.read("x/1", 0, 2) == b"on" and bucket.read("x/1", 0, 99) == b"one" and bucket.size("x/2") == 2
    bucket.remove("x/2")
    bucket.remove("x/2")
    assert bucket.names("x") == ["1"]
    with pytest.raises(StorageError, match="was deleted while it was read"):
        bucket.read_all(["x/1", "x/2"])
    bucket.check_exclusive("x/1", b"")
    for name in ("x/1", "x/y/3", "x2/4"):
        bucket.remove(name)


def test_who_was_told_to_end_does_not_wait_for_a_bucket_to_clear_up(bucket: Bucket, gcs: Proxy) -> None:
    gcs.plant("GET", 503, times=99)
    gcs.seen.clear()
    with pytest.raises(Interrupted), trap():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with pytest.raises(StorageError):
                bucket.read("x/1")
    assert len(gcs.seen) == 6, "the client's own tries, and none of ours"


# --- what passes

FAULTS: list[int | str] = [429, 500, 502, 503, 504, 408, "drop"]
VERBS: dict[str, Callable[[Bucket], object]] = {
    "POST.*there/new": lambda bucket: bucket.create("there/new", b"new"),
    "POST.*there/old": lambda bucket: bucket.write("there/old", b"newer"),
    "GET.*alt=media": lambda bucket: bucket.read("there/old") == b"old",
    "GET.*o?.*prefix": lambda bucket: bucket.names("there") == ["old"],
    "GET.*download.*old": lambda bucket: bucket.read_all(["there/old"]) == [b"old"],
}


@pytest.mark.parametrize("what", FAULTS)
def test_transient_faults_are_retried(bucket: Bucket, gcs: Proxy, what: int | str) -> None:
    for after in (False, True):
        for pattern, verb in VERBS.items():
            bucket.write("there/old", b"old")
            bucket.remove("there/new")
            fault = gcs.plant(pattern, what, times=7, after=after)  # more than gcsfs itself bears
            assert verb(bucket) in (True, None), (pattern, after)
            assert fault.times == 0, pattern
    assert bucket.read("there/old") == b"old"


def test_a_create_whose_answer_was_lost_knows_its_own_object(bucket: Bucket, gcs: Proxy) -> None:
    fault = gcs.plant("POST.*mine", 503, after=True)
    assert bucket.create("mine", b"holder 1")
    assert fault.times == 0 and sum("POST" in line for line in gcs.seen) > 1
    gcs.plant("POST.*mine", "drop", after=True)
    assert not bucket.create("mine", b"holder 2")
    assert bucket.read("mine") == b"holder 1"


def test_a_request_without_an_answer_is_sent_again(gcs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE_S", 0.5)  # an answer that is late for it is asked for again, 36 times
    silent = Bucket(URL + "/silent", sleep=lambda seconds: None)
    for after in (False, True):
        fault = gcs.plant("POST", "hang", after=after)
        assert silent.create(f"object-{after}", b"data")
        assert fault.met.is_set()
        fault.released.set()


def test_who_waits_is_told_once_what_for(bucket: Bucket, gcs: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    module._away.clear()
    for _ in range(2):
        gcs.plant("POST", 503, times=20)
        bucket.write("waited for", b"")
        assert capsys.readouterr().err == f"warning: {URL}/waited for: planted, 503; asked again\n"


def test_a_lasting_outage_is_given_up(bucket: Bucket, gcs: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    gcs.plant("POST", 503, times=10_000)
    gcs.seen.clear()
    with pytest.raises(StorageError, match=r"^gs://bucket/some where/x: cannot be written: planted, 503$"):
        bucket.create("x", b"")
    assert len(gcs.seen) == module.TRIES * 6
    gcs.plant("GET", "drop", times=10_000)
    with pytest.raises(StorageError, match=r"^gs://bucket/some where/x: cannot be read: "):
        bucket.read("x")
    assert not caplog.records


# --- what the user can put right


@pytest.mark.parametrize("ask", [*VERBS.values(), lambda bucket: bucket.remove("x"), lambda bucket: bucket.size("x")])
def test_a_missing_bucket_is_named(ask: Callable[[Bucket], object], gcs: Proxy) -> None:
    with pytest.raises(StorageError, match=r"^gs://typo/x: there is no bucket gs://typo; make it, or name another$"):
        ask(Bucket("gs://typo/x"))
    assert len(gcs.seen) < 5


@pytest.mark.parametrize(("pattern", "ask"), VERBS.items())
def test_forbidden_is_not_retried(pattern: str, ask: Callable[[Bucket], object], bucket: Bucket, gcs: Proxy) -> None:
    bucket.write("there/old", b"old")
    for status in (403, 401):
        fault = gcs.plant(pattern, status, times=99, body=NO_RIGHT.replace(b"403", str(status).encode()))
        with pytest.raises(StorageError) as caught:
            ask(bucket)
        told = str(caught.value)
        assert told.startswith(URL) and ": cannot be " in told and "ci@project.iam" in told and "\n" not in told
        assert ("forbidden: " if status == 403 else "no credentials, or ones that have run out: ") in told
        assert fault.times == 98  # asked once
        fault.times = 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("foo://x", "Protocol not known: foo; must be a folder or a URL of fsspec's"),
        ("filecache::gs://bucket/x", "chained URLs cannot keep two writers apart"),
        ("adl://x/y", "needs pip install 'adl'"),
    ],
)
def test_an_unusable_url_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^checkpoint.dir={url}: {says}"):
        Bucket(url)


def test_a_store_that_does_not_refuse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(self: MemoryFileSystem, path: str, data: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        with self.open(path, "wb") as file:
            file.write(data)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", always)
    lax = Bucket("memory://lax")
    assert lax.create("x", b"1")
    with pytest.raises(StorageError, match="memory://lax: this store writes over what is to be created only once"):
        lax.check_exclusive("x", b"2")


def test_support_of_zonal_buckets_stays_off(gcs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
    Bucket(URL)
    assert os.environ.pop("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT") == "false"


def test_a_listing_that_fails_once_is_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own ``find``, which many stores have, takes a listing that fails for an empty one."""
    listed, faults = MemoryFileSystem.ls, [OSError("reset by peer"), TimeoutError()]

    def unsteady(self: MemoryFileSystem, path: str, **settings: object) -> object:
        if faults:
            raise faults.pop()
        return listed(self, path, **settings)

    monkeypatch.setattr(MemoryFileSystem, "find", AbstractFileSystem.find)
    bucket = Bucket("memory://unsteady", sleep=lambda seconds: None)
    bucket.write("x/1", b"one")
    monkeypatch.setattr(MemoryFileSystem, "ls", unsteady)
    assert bucket.names("x") == ["1"] and not faults
    faults += [PermissionError("no")]
    with pytest.raises(StorageError, match="cannot be listed"):
        bucket.names("x")
