"""Runs a command that must not outlive whoever started it.

    python -m selfspec.soak.guard FOLDER COMMAND ...

The command runs in that folder, in a process group of its own, which is ended when our standard input closes: also
where the process that held its other end was killed and could not see to anything. Exits as the command does.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from selfspec.files import create
from selfspec.interrupt import shield

GRACE_S = 15.0
"""From SIGTERM to SIGKILL."""


@dataclass
class Guarded:
    """A guard with its command, and the file where both leave their output."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def why_it_died(self) -> str:
        """In a line, from what it said last."""
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"exit code {self.process.poll()}: {last} (see {self.log})"

    def end(self) -> None:
        """Ends it, as gently as it lets us."""
        assert self.process.stdin is not None
        with shield():  # what is left half-way here goes on running
            self.process.stdin.close()
            self.process.wait()  # it kills what does not end, and then ends itself


@contextmanager
def guarded(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None, folder: Path = Path()
) -> Iterator[Guarded]:
    """A command that ends with the block, and also where this process is killed.

    Args:
        environment: all of its environment; ``None``: ours.
        folder: where it runs.
    """
    with create(log) as file:
        process = subprocess.Popen(
            # In our own folder, where selfspec may be found; only the command is in the other.
            [sys.executable, "-m", "selfspec.soak.guard", str(folder), *command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C on the terminal is for us; we end it in our own order
        )
    running = Guarded(process, log)
    try:
        yield running
    finally:
        running.end()


def main(folder: str, *command: str) -> int:
    """Runs ``command`` to its end, or to ours; its exit code."""
    for signum in (signal.SIGTERM, signal.SIGINT):  # a closed pipe is what ends us
        signal.signal(signum, lambda *_: None)  # SIG_IGN would be the command's, too
    # A session, and so a process group, of its own: what the command starts can be ended with it.
    child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()
    code = child.wait()
    with suppress(OSError):  # whatever it left behind
        os.killpg(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _end_with_stdin(child: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1024):  # not sys.stdin: its lock would be held at our own end
        pass
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
