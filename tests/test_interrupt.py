"""Signals as exceptions: once, in the main thread, and never within a shield."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import selfspec
from selfspec.errors import Interrupted
from selfspec.interrupt import SIGNALS, shield, trap

REPO = Path(selfspec.__file__).parents[1]


def send(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)  # to itself: Python has run the handler by the time this returns


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR2, 140)])
def test_a_signal_becomes_an_exception(signum: int, code: int) -> None:
    with pytest.raises(Interrupted) as caught, trap():
        send(signum)
        pytest.fail("ran on")
    assert caught.value.signum == signum
    assert caught.value.exit_code == code


def test_handlers_are_put_back_and_a_trap_works_again_after_one_that_was_sprung() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with trap():
        assert [signal.getsignal(signum) for signum in SIGNALS] != before
    for _ in range(2):
        assert [signal.getsignal(signum) for signum in SIGNALS] == before
        with pytest.raises(Interrupted), trap():
            send()
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_later_signals_leave_the_cleanup_alone() -> None:
    cleaned = []
    with pytest.raises(Interrupted) as caught, trap():
        try:
            send(signal.SIGINT)
        finally:
            for signum in (signal.SIGTERM, signal.SIGINT):
                send(signum)
                with shield():
                    send(signum)
                cleaned.append(signum)
    assert cleaned == [signal.SIGTERM, signal.SIGINT]
    assert caught.value.signum == signal.SIGINT


def test_a_shield_defers_to_the_end_of_the_outermost() -> None:
    done = []
    with pytest.raises(Interrupted) as caught, trap():
        with shield():
            with shield():
                send(signal.SIGTERM)
                send(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        pytest.fail("ran on")
    assert done == ["inner", "outer"]
    assert caught.value.signum == signal.SIGTERM


def test_a_shielded_error_is_not_lost() -> None:
    with pytest.raises(Interrupted) as caught, trap(), shield():
        send()
        raise ValueError("kept")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_shield_without_a_trap_does_nothing() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job begins with it ignored
    with shield():
        pass
    with pytest.raises(KeyboardInterrupt), shield():
        send(signal.SIGINT)


def test_an_inner_trap_leaves_it_to_the_outer() -> None:
    with pytest.raises(Interrupted), trap():
        with trap():
            handlers = [signal.getsignal(signum) for signum in SIGNALS]
        assert [signal.getsignal(signum) for signum in SIGNALS] == handlers
        send()


def test_other_threads_are_left_alone() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with trap(), shield():
            seen.extend(signal.getsignal(signum) for signum in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


def test_ordinary_handlers_of_errors_do_not_swallow_it() -> None:
    with pytest.raises(Interrupted), trap():
        try:
            send()
        except Exception:
            pytest.fail("swallowed")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR2, 140)])
def test_exit_code_of_a_process_started_with_sigint_ignored(signum: int, code: int) -> None:
    """As a script's shell starts what it puts in the background."""
    program = """if True:
        import signal, sys, time
        from selfspec.errors import Interrupted
        from selfspec.interrupt import trap
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with trap():
                print("ready", flush=True)
                time.sleep(600)
        except Interrupted as error:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            sys.exit(error.exit_code)
    """
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signum)
    assert child.returncode == code
