"""Our side of the bridge to SkyPilot: where its Python is, and requests to ``_sky.py``, which runs in it."""

import json
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from selfspec.errors import ConfigError, LaunchError

_SCRIPT = Path(__file__).with_name("_sky.py")
_HOW = "uv tool install --with pip 'skypilot[gcp]==0.14.1'"


class Bridge:
    """A process in SkyPilot's environment that answers one request after the other; it ends with ours."""

    def __init__(self, command: list[str]) -> None:
        """Starts it, and waits until SkyPilot is imported, which takes seconds.

        Raises:
            ConfigError: there is no SkyPilot to be imported, or too old a one.
        """
        # A file, not a pipe: nobody reads it while requests are answered, and a full pipe would stop the process.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            # In a session of its own: an interrupt at the terminal is for us to heed.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._said.close()
            raise ConfigError(f"hydra.launcher.python={command[0]}: cannot be run: {error.strerror}") from error
        try:
            self.version: str = self.ask("hello")
        except (ConfigError, LaunchError) as error:
            self.close()
            words = str(error).removeprefix("hydra.launcher: ")
            raise ConfigError(f"hydra.launcher.python={command[0]}: {words}; make one: {_HOW}") from error

    def ask(self, do: str, **request: Any) -> Any:
        """What comes of a request.

        Raises:
            ConfigError: SkyPilot refuses what the user asked for.
            LaunchError: it could not do it, or its process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None, "they are pipes"
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._said.seek(0)
            *_, last = ["nothing", *filter(str.strip, self._said)]
            raise LaunchError(f"SkyPilot's process ended; the last it said was: {last.strip()}")
        answer = json.loads(line)
        if "refused" in answer:
            raise ConfigError(f"hydra.launcher: {answer['refused']}")
        if "failed" in answer:
            raise LaunchError(f"SkyPilot: {answer['failed']}")
        return answer["is"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None, "they are pipes"
        with suppress(BrokenPipeError):  # it has ended, and not read its last request
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()


@cache
def connect(python: str | None) -> Bridge:
    """The bridge to the SkyPilot of an environment; one a process.

    Raises:
        ConfigError: there is none.
    """
    return Bridge([python or _python(), str(_SCRIPT)])


def _python() -> str:
    """That of the ``sky`` on ``PATH``, as pip, uv and pipx install it: the first lines of the script name it."""
    sky = shutil.which("sky")
    if sky is not None:
        first, second, *_ = [*Path(sky).read_text(errors="replace").splitlines(), "", ""]
        named = first.removeprefix("#!").strip()
        if named == "/bin/sh":  # a path with a space, or a long one: '\'\''exec' "/some where/python" "$0" "$@"
            named = second.partition("exec' ")[2].partition(' "$0"')[0].strip("'\"")
        if first.startswith("#!") and Path(named).name.startswith("python"):
            return named
    raise ConfigError(
        f"hydra.launcher.python=null: there is no `sky` on PATH; SkyPilot has an environment of its own: {_HOW}"
    )
