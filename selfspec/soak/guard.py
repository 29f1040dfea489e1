"""Runs a command that must not outlive whoever started it.

    python -m selfspec.soak.guard COMMAND ...

The command runs in a process group of its own, which is ended when our standard input closes: also where the
process that held its other end was killed and could not see to anything. Exits as the command does.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_S = 15.0
"""From SIGTERM to SIGKILL."""


def main(command: list[str]) -> int:
    """Runs ``command`` to its end, or to ours; its exit code."""
    for signum in (signal.SIGTERM, signal.SIGINT):  # a closed pipe is what ends us
        signal.signal(signum, lambda *_: None)  # SIG_IGN would be the command's, too
    # A session, and so a process group, of its own: what the command starts can be ended with it.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
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
    sys.exit(main(sys.argv[1:]))
