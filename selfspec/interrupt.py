"""SIGTERM, SIGINT and SIGUSR2 as an exception, raised where it can do no harm.

:func:`trap` turns the first of these signals into :class:`~selfspec.errors.Interrupted` in the main thread;
:func:`shield` puts that off to the end of a block that must not be left half-way; :func:`process` lets the process end
whatever its threads are doing.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from selfspec.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""The last is what a cluster sends, by submitit, before a job's time is up."""


@dataclass
class _State:
    """Of the main thread, the only one in which Python runs signal handlers."""

    trapped: bool = False
    shields: int = 0
    signum: int | None = None
    raised: bool = False

    def deliver(self) -> None:
        # Once only: who clears up after the first must not be torn out of that by a later shield's end.
        if self.signum is not None and not self.raised and not self.shields:
            self.raised = True
            raise Interrupted(self.signum)


_state = _State()


@contextmanager
def trap() -> Iterator[None]:
    """Within the block, the first of ``SIGNALS`` raises ``Interrupted``; later ones are ignored.

    So a second signal does not break the clean-up that the first one set off. On leaving, the handlers that
    were there before are put back. Does nothing outside the main thread and within another ``trap``.

    Raises:
        Interrupted: a signal arrived.
    """
    if not _in_main_thread() or _state.trapped:
        yield
        return
    previous: dict[int, signal._HANDLER] = {}
    try:
        with shield():
            _state.trapped = True
            for signum in SIGNALS:
                # Also where it was ignored, as a script's shell has it for SIGINT to what it starts with `&`.
                previous[signum] = signal.signal(signum, _handle)
        yield
    finally:
        try:
            with shield():
                # Shielded: a signal between two of these must not leave some of our handlers behind.
                for number, handler in previous.items():
                    # None: a handler that was not set from Python, and cannot be put back from it.
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)
        finally:
            # In a `finally` of its own: leaving the shield may raise what came meanwhile.
            _state.trapped, _state.signum, _state.raised = False, None, False


@contextmanager
def shield() -> Iterator[None]:
    """Put off an ``Interrupted`` that falls due within the block to its end. Shields nest.

    Keep the block short: the process seems deaf to signals for as long.

    Raises:
        Interrupted: at the end of the outermost block, if a trapped signal arrived in it.
    """
    if not _in_main_thread():
        yield
        return
    _state.shields += 1
    try:
        yield
    finally:
        _state.shields -= 1
        _state.deliver()


def process(main: Callable[[], None]) -> None:
    """Runs ``main`` as the whole of this process, which ends as it says.

    A daemon thread is torn out of what it does when Python ends; where that is C++ (a model that loads or decodes), the
    whole process is aborted. So, after all that others have to do at the end, we end it before Python does.
    """
    code: object = 1

    def last() -> None:
        if any(thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):  # whoever read it is gone, or it is closed
                    stream.flush()
            os._exit(0 if code is None else code if isinstance(code, int) else 1)

    atexit.register(last)  # before anybody else: called after everybody else
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code
        raise


def told_to_end() -> bool:
    """Whether a trapped signal has arrived: what takes long in a ``shield``, or in clearing up, had better give up."""
    return _state.signum is not None


def _handle(signum: int, frame: FrameType | None) -> None:
    # No lock: Python runs handlers in the main thread, between two of its own instructions.
    if _state.signum is None:
        _state.signum = signum
        _state.deliver()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
