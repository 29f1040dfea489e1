"""What is made of a soak's intervals, and which faults fail it; and the guard that leaves no process behind."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from selfspec.soak import chart, judge
from selfspec.soak.config import Soak

ALLOWED = Soak("test", users=2, max_memory_slope=5.0, max_drift=0.1, max_error_rate=0.01)


def interval(
    number: int,
    acceptance: float = 0.5,
    leak: float = 0.0,
    errors: int = 0,
    life: int = 1,
    slow: float = 1.0,
    step: float = 0.0,
) -> dict[str, Any]:
    """Ten seconds in which 20 requests were answered; ``leak`` in MiB a minute, ``step`` as allocators make one."""
    rng = random.Random(number)
    requests = [
        {"ttft_ms": slow * rng.uniform(10, 20), "total_ms": slow * rng.uniform(200, 300), "tokens": 40, "proposed": 60}
        for _ in range(20)
    ]
    for request in requests:
        request["accepted"] = sum(rng.random() < acceptance for _ in range(60))
    at = [10.0 * number + second for second in range(10)]
    rss = [(t, 300 + leak * t / 60 + rng.gauss(0, 0.5) + (step if t > 12 else 0)) for t in at]
    gaps = Counter(judge.rounded(slow * rng.uniform(5, 9)) for _ in range(400))
    kinds = {"HTTP 500": errors} if errors else {}
    return {"life": life, "seconds": 10.0, "requests": requests, "gaps": gaps, "errors": kinds, "rss": rss}


def reasons(intervals: list[dict[str, Any]], soak: Soak = ALLOWED) -> list[str]:
    return judge.failures(judge.summarise(intervals, intervals, 0), judge.errors_by_kind(intervals), soak)


def test_a_soak_that_holds() -> None:
    intervals = [interval(i, step=3.0) for i in range(6)]
    found = judge.summarise(intervals, intervals, 0)
    assert reasons(intervals) == []
    assert (found["requests"], found["errors"], found["seconds"]) == (120, 0, 60)
    assert found["tok_s"] == 80 and found["requests_s"] == 2
    assert 10 < found["ttft_p50_ms"] < found["ttft_p95_ms"] < found["ttft_p99_ms"] < 20
    assert 5 <= found["inter_token_p50_ms"] < found["inter_token_p95_ms"] < found["inter_token_p99_ms"] < 9.1
    assert found["acceptance_drift_low"] < found["acceptance_drift"] < found["acceptance_drift_high"]
    assert abs(found["acceptance"] - 0.5) < 0.02 and abs(found["memory_slope_mb_min"]) < 5
    assert "0 failed" in judge.in_words(found) and "TTFT p50/p95/p99" in judge.in_words(found)
    assert chart.draw(intervals, "holds").startswith(b"\x89PNG")


def test_a_leak_fails_it() -> None:
    (reason,) = reasons([interval(i, leak=30) for i in range(6)])
    assert reason.startswith("the server's memory grew by 29.8 ") and reason.endswith("MiB/min (allowed 5)")


def test_a_leak_is_seen_across_restarts_and_a_restart_is_none() -> None:
    """After a restart memory is low again: slopes are of one life only."""
    restarted = [interval(i % 3, leak=30, life=1 + i // 3) for i in range(6)]
    assert judge.memory_slope(restarted) == pytest.approx(30, rel=0.3)
    assert abs(judge.memory_slope([interval(i % 3, life=1 + i // 3) for i in range(6)]) or 0) < 5


@pytest.mark.parametrize("last", [0.2, 0.8])
def test_drift_fails_it_either_way(last: float) -> None:
    (reason,) = reasons([interval(i, acceptance=0.5 + (last - 0.5) * i / 5) for i in range(6)])
    assert reason.startswith("acceptance drifted from 0.") and f"by {'-' if last < 0.5 else '+'}0." in reason


def test_drift_that_may_be_chance_does_not() -> None:
    """Ten requests a third, all or nothing: nobody knows."""
    some = [interval(i) for i in range(3)]
    for right, one in zip((4, 4, 6), some, strict=True):
        one["requests"] = one["requests"][:10]
        for at, request in enumerate(one["requests"]):
            request["accepted"] = 60 * (at < right)
    assert reasons(some) == []
    found = judge.summarise(some, some, 0)
    assert found["acceptance_drift"] == pytest.approx(0.2) and found["acceptance_drift_low"] < 0


def test_drift_of_a_handful_of_requests_is_not_judged_and_that_is_said() -> None:
    some = [interval(i, acceptance=0.9 - 0.4 * i) for i in range(3)]
    for one in some:
        one["requests"] = one["requests"][:1]
    found = judge.summarise(some, some, 0)
    assert reasons(some) == [] and "acceptance_drift" not in found
    assert "drift not judged: too few requests" in judge.in_words(found)


def test_errors_fail_it() -> None:
    (reason,) = reasons(
        [interval(i, errors=int(i == 2)) for i in range(3)], Soak("test", max_memory_slope=99, max_drift=1)
    )
    assert reason == "1 of 61 requests failed (1.64%, allowed 0.00%): 1 x HTTP 500"
    assert reasons([interval(i, errors=int(i == 2)) for i in range(6)]) == [], "one in 121 is allowed"


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        ({"accepted": 90}, "the server says that it accepted 1.50 tokens for each it proposed"),
        ({"tokens": 1}, "every answer is empty: its first token ends it"),
        ({"total_ms": 0.0, "ttft_ms": 0.0}, "answers took 0 ms, their first tokens 0 ms"),
        ({"ttft_ms": -3.0}, "answers took "),
    ],
)
def test_what_makes_no_sense_fails_it(planted: dict[str, float], says: str) -> None:
    some = [interval(i) for i in range(6)]
    for one in some:
        one["requests"] = [request | planted for request in one["requests"]]
    (reason,) = reasons(some)
    assert reason.startswith(says)


def test_memory_that_cannot_be_read_fails_it() -> None:
    some = [interval(i) | {"rss": [(10.0 * i + j, 0.0) for j in range(10)]} for i in range(6)]
    assert reasons(some) == ["the server's memory could not be read, so nothing is known of its growth"]


def test_no_answer_at_all_fails_it() -> None:
    nothing = {"life": 1, "seconds": 10.0, "requests": [], "gaps": {}, "errors": {}, "rss": []}
    assert reasons([nothing] * 3) == ["no request was answered"]
    (first, second) = reasons([nothing | {"errors": {"ConnectionError": 3}}] * 3)
    assert first == "no request was answered" and "9 of 9 requests failed" in second


def test_a_slow_tail_fails_it_where_there_is_a_bound() -> None:
    bound = Soak("test", max_memory_slope=99, max_drift=1, max_ttft_p99_ms=30, max_inter_token_p99_ms=30)
    assert reasons([interval(i) for i in range(3)], bound) == []
    first, second = reasons([interval(i, slow=5) for i in range(3)], bound)
    assert first.startswith("p99 TTFT ") and second.startswith("p99 inter-token ")


def test_a_server_that_says_nothing_of_its_drafts() -> None:
    intervals = [interval(i) for i in range(3)]
    for one in intervals:
        for request in one["requests"]:
            request["proposed"] = request["accepted"] = 0
    found = judge.summarise(intervals, intervals, 0)
    assert "acceptance" not in found and reasons(intervals) == []


def test_percentiles_of_counts_are_those_of_the_values() -> None:
    rng = random.Random(0)
    values = [rng.uniform(1, 100) for _ in range(1001)]
    one = {"gaps": Counter(map(judge.rounded, values)), "requests": interval(0)["requests"], "seconds": 1, "errors": {}}
    found = judge.per_interval(one | {"rss": []})
    for p in judge.PERCENTILES:
        assert found[f"inter_token_p{p}_ms"] == pytest.approx(sorted(values)[p * 1000 // 100], rel=0.01)


CHILD = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN) if sys.argv[1] == "deaf" else None
grandchild = subprocess.Popen(["sleep", "600"])
print(os.getpid(), grandchild.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_the_guard_ends_what_it_runs_with_its_starter(killed: bool, tmp_path: Path) -> None:
    """Also where the starter is killed and sees to nothing."""
    code = f"""
import subprocess, sys, time
from pathlib import Path
from selfspec.soak.guard import guarded
with guarded([sys.executable, "-c", {CHILD!r}, "kind"], Path({str(tmp_path / "log")!r}), None) as running:
    while not Path({str(tmp_path / "log")!r}).read_text().endswith("\\n"):
        time.sleep(0.01)
    print(running.process.pid, flush=True)
    {"time.sleep(600)" if killed else "pass"}
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        guard = int(starter.stdout.readline())
        pids = [guard, *map(int, (tmp_path / "log").read_text().split())]
        if killed:
            starter.kill()
    gone(pids)


@pytest.mark.slow
def test_the_guard_ends_the_deaf_too() -> None:
    code = "import sys; from selfspec.soak import guard; guard.GRACE_S = 0.1; sys.exit(guard.main(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, ".", sys.executable, "-c", CHILD, "deaf"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guard:
        assert guard.stdout is not None and guard.stdin is not None
        pids = [guard.pid, *map(int, guard.stdout.readline().split())]
        guard.send_signal(signal.SIGINT)  # a Ctrl-C is for its starter
        guard.stdin.close()
        assert guard.wait() == 128 + signal.SIGKILL
    gone(pids)


def gone(pids: list[int]) -> None:
    """Waits until none of them runs; hangs into the test's time-out where one does."""
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        time.sleep(0.02)
