"""A process of a benchmark's that answers a line of JSON with a line, and is stopped (SIGSTOP) while it is not asked.

Imports nothing that an interpreter may lack: each side runs this file by its own.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any


class Worker:
    """The benchmark's side.

    Args:
        python: the interpreter that runs it.
        script: a file beside this one, less its suffix; it calls :func:`answer`.
        options: what the script is told, as JSON, in its first argument.
        environment: of the process, beside our own.

    Raises:
        SystemExit: it ended before it was ready.
    """

    def __init__(self, python: str, script: str, options: Mapping[str, Any], **environment: str) -> None:
        self.log = Path(mkdtemp()) / f"{script}.log"
        own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        openmp = Path(python).parents[1] / "lib" / "libiomp5.so"
        own |= {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(f"{script}.py")), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=os.environ | own | environment,
            text=True,
            start_new_session=True,
        )
        self._read()
        self._send(signal.SIGSTOP)

    def __call__(self, asked: Mapping[str, Any]) -> Any:
        """Its answer.

        Raises:
            SystemExit: it ended.
        """
        self._send(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._send(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """Ends it, and whatever it started, if it has not ended."""
        if self._process.poll() is None:
            self._send(signal.SIGKILL)
            self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}; what it said is in {self.log}")
        return json.loads(line)

    def _send(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def answer(make: Callable[[dict[str, Any]], Callable[[dict[str, Any]], Any]]) -> None:
    """The process's side: makes of its options what answers, says that it is ready, and answers to the end of input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    reply = make(json.loads(sys.argv[1]))
    answers.write('"ready"\n')
    for line in sys.stdin:
        answers.write(json.dumps(reply(json.loads(line))) + "\n")
