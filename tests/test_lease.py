"""The lease: one holder at a time, by anybody's clock, and without sleeping."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import pytest
from gcs import Proxy

from selfspec.checkpoint import lease as lease_module
from selfspec.checkpoint.bucket import Bucket
from selfspec.checkpoint.lease import SKEW_S, Clock, Lease
from selfspec.errors import Interrupted, JournalError, LeaseError, StorageError

TERM_S = 40.0
_names = count()


class Time:
    """Passes when somebody sleeps; ``meanwhile`` is called each time."""

    def __init__(self, off: float = 0.0) -> None:
        self.passed, self.slept, self.off = 0.0, list[float](), off
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.passed += seconds
        self.slept.append(seconds)
        self.meanwhile()

    @property
    def clock(self) -> Clock:
        return Clock(lambda: 1e9 + self.off + self.passed, lambda: self.passed, self.sleep)


@pytest.fixture(params=["memory", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return Bucket("gs://bucket/leases")
    return Bucket(f"memory://leases/{next(_names)}")


def lease(bucket: Bucket, watch: Time, **more: object) -> Lease:
    made = Lease(bucket, "plan/lease", TERM_S, watch.clock, **more)  # type: ignore[arg-type]
    made._renewing = threading.Thread(target=lambda: None)  # a test renews when it says so
    return made


def said(bucket: Bucket) -> dict[str, dict[str, object]]:
    return {name: json.loads(bucket.read(f"plan/lease/{name}") or b"") for name in bucket.names("plan/lease")}


def test_a_lease_is_taken_and_released(bucket: Bucket) -> None:
    watch = Time()
    with lease(bucket, watch) as first:
        assert first.epoch == 1
        assert said(bucket) == {"00000001": {"until": 1e9 + TERM_S, "term_s": TERM_S, "holder": first.holder}}
    assert said(bucket)["00000001"]["until"] == 0
    first.release()
    with lease(bucket, watch) as second:
        assert second.epoch == 2
    assert not watch.slept and list(said(bucket)) == ["00000001", "00000002"]


def test_who_comes_second_waits_for_the_first(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Time()
    first = lease(bucket, watch)
    first.hold()

    def live_for_five_terms() -> None:
        if watch.passed < 5 * TERM_S:
            first.renew()
        else:
            first.release()

    watch.meanwhile = live_for_five_terms
    with lease(bucket, watch) as second:
        assert second.epoch == 2 and watch.passed == 5 * TERM_S
    assert capsys.readouterr().err == f"waiting for another process that holds {bucket.url}/plan/lease\n"


def test_who_was_stopped_after_looking_looks_again(bucket: Bucket) -> None:
    """However long: the holder may have given signs of life all the while."""
    watch = Time()
    first = lease(bucket, watch)
    first.hold()

    def elapsed() -> float:
        watch.passed += 2 * TERM_S
        return watch.passed

    watch.meanwhile = lambda: first.renew() if len(watch.slept) < 4 else first.release()
    second = lease(bucket, watch)
    second.clock = replace(watch.clock, elapsed=elapsed)
    second.hold()
    assert second.epoch == 2 and len(watch.slept) == 4


@pytest.mark.parametrize("off", [-SKEW_S, -1.0, 0.0, 1.0, SKEW_S, 1e6, -1e6])
def test_a_dead_holder_is_waited_for_a_term(bucket: Bucket, off: float) -> None:
    """By the own watch, however the clocks differ; but one of another day is not waited for."""
    lease(bucket, Time()).hold()
    watch = Time(off)
    with lease(bucket, watch) as second:
        assert second.epoch == 2
    assert watch.passed == (0 if off > TERM_S + SKEW_S else TERM_S)


def test_a_dead_holders_own_term_counts(bucket: Bucket) -> None:
    dead = replace(lease(bucket, Time()), term_s=3 * TERM_S)
    dead._renewing = threading.Thread(target=lambda: None)
    dead.hold()
    watch = Time()
    lease(bucket, watch).hold()
    assert watch.passed == 3 * TERM_S


def test_a_zombies_renewal_is_refused(bucket: Bucket) -> None:
    zombie, watch = lease(bucket, Time()), Time()
    zombie.hold()
    zombie.check()
    zombie.renew()
    successor = lease(bucket, watch)
    successor.hold()
    zombie.check()  # does not ask
    with pytest.raises(LeaseError, match="plan/lease: another process has taken this over, since this one gave no s"):
        zombie.renew()
    with pytest.raises(LeaseError):
        zombie.check()
    before = said(bucket)
    zombie.release()
    assert said(bucket) == before  # its own stays as it died
    successor.renew()
    third = lease(bucket, Time(1e6))
    third.hold()
    assert (successor.epoch, third.epoch) == (2, 3)


def test_eight_processes_hold_it_in_turn(gcs: Proxy) -> None:
    """Each has it for itself, in turn."""
    inside, most, turns = 0, 0, list[int]()

    def work(_: int) -> None:
        nonlocal inside, most
        with Lease(Bucket("gs://bucket/leases"), "plan/lease", 1e6, Clock(sleep=lambda s: time.sleep(0.01))) as held:
            inside += 1
            most = max(most, inside)
            turns.append(held.epoch)
            time.sleep(0.01)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert most == 1 and turns == list(range(1, 9))


def test_the_thread_renews_and_stops(bucket: Bucket) -> None:
    held = Lease(bucket, "plan/lease", 0.01)
    held.hold()
    first = said(bucket)
    while said(bucket) == first:
        time.sleep(0.001)
    bucket.write("plan/lease/00000002", b'{"until": 0, "term_s": 1, "holder": "other"}')
    held._renewing.join()
    with pytest.raises(LeaseError):
        held.check()


def test_an_outage_does_not_end_it(gcs: Proxy) -> None:
    bucket = Bucket("gs://bucket/leases", sleep=lambda seconds: None)
    held = Lease(bucket, "plan/lease", 0.01)
    held.hold()
    fault = gcs.plant(".", 503, times=100)
    while fault.times:
        time.sleep(0.001)
    first = said(bucket)
    while said(bucket) == first:
        time.sleep(0.001)
    held.check()
    held.release()
    held._renewing.join()
    assert said(bucket)["00000001"]["until"] == 0


def test_given_back_while_a_sign_of_life_is_under_way(gcs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hangs: who gives it back does not wait for it, and it changes nothing when it arrives."""
    monkeypatch.setattr(lease_module, "_PATIENCE_S", 0.0)
    held = Lease(Bucket("gs://bucket/leases"), "plan/lease", 0.01)
    held.hold()
    late = gcs.plant("POST", "late")
    late.met.wait()
    held.release()
    assert held._renewing.is_alive() and said(held.bucket)["00000001"]["until"] == 0
    late.released.set()
    held._renewing.join()
    assert said(held.bucket)["00000001"]["until"] == 0


def test_a_signal_while_it_is_taken_gives_it_back(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    held, take = lease(bucket, Time()), Lease._take

    def interrupted(self: Lease, epoch: int) -> bool:
        take(self, epoch)
        raise Interrupted(15)

    monkeypatch.setattr(Lease, "_take", interrupted)
    with pytest.raises(Interrupted):
        held.hold()
    assert held.epoch == 0 and said(bucket)["00000001"]["until"] == 0


DAMAGED = [
    *(b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"until": "soon", "term_s": 1, "holder": ""}'),
    *(b'{"until": %b, "term_s": %b, "holder": ""}' % each for each in ((b"NaN", b"1"), (b"1", b"NaN"), (b"1", b"-1"))),
    b'{"until": 1%b, "term_s": 1, "holder": ""}' % (b"0" * 400),
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_lease_is_refused(bucket: Bucket, data: bytes) -> None:
    bucket.write("plan/lease/00000007", data)
    with pytest.raises(JournalError, match=r"plan/lease/00000007: is no lease; delete it if nothing runs"):
        lease(bucket, Time()).hold()
    bucket.remove("plan/lease/00000007")
    bucket.write("plan/lease/readme.txt", data)
    lease(bucket, Time()).hold()


def test_no_right_to_renew_is_no_reason_to_stop(gcs: Proxy) -> None:
    bucket = Bucket("gs://bucket/leases")
    held = lease(bucket, Time())
    held.hold()
    gcs.plant("POST", 403, times=9)
    with pytest.raises(StorageError, match="forbidden"):
        held.renew()
    held.check()
    held.release()
