"""Every error selfspec raises on purpose.

    SelfspecError                 exit code 1
    ├── UserError                 exit code 2: one clear line, no traceback, nothing written
    │   ├── ConfigError           a key or value of the configuration
    │   ├── AssetError            a model or data source that cannot be had
    │   ├── HeadError             a fitted head that is corrupt or belongs to something else
    │   ├── JournalError          a checkpoint that cannot be read or resumed
    │   └── StorageError          an output folder or a bucket that cannot be written
    ├── StageError                a stage ran and its result is a failure, such as lost losslessness
    │   └── NotFiniteError        logits that no token can be told from
    ├── LeaseError                another process has taken the plan over; this one must not write any more
    └── LaunchError               where jobs were to be launched, it could not be done
    Interrupted                   SIGTERM, SIGINT or SIGUSR2 arrived: exit code 143, 130 or 140

A ``UserError``'s message names the key, the value and what is allowed.
"""

import re
import signal


class SelfspecError(Exception):
    """Base of all errors selfspec raises on purpose."""

    exit_code = 1


class UserError(SelfspecError):
    """Something the user can put right; shown as one line."""

    exit_code = 2


class ConfigError(UserError):
    """A key or value of the configuration is wrong."""


class AssetError(UserError):
    """A model or data source cannot be had."""


class HeadError(UserError):
    """A fitted head is corrupt, or belongs to another model or exit layer."""


class JournalError(UserError):
    """A checkpoint cannot be read or resumed."""


class StorageError(UserError):
    """An output folder, a file or a bucket cannot be written, or a bucket cannot be read."""


class StageError(SelfspecError):
    """A stage ran to its end and its result is a failure, such as an exact policy that changed tokens."""


class NotFiniteError(StageError):
    """A token is to be told from logits that are NaN or infinite."""


class LeaseError(SelfspecError):
    """Another process has taken a plan over, since this one gave no sign of life; it must not write any more."""


class LaunchError(SelfspecError):
    """Jobs could not be launched elsewhere, or nobody knows any more how they are."""


class Interrupted(BaseException):
    """SIGTERM, SIGINT or SIGUSR2 arrived; not an ``Exception``, so that no handler of ordinary errors swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + signal number (143 for SIGTERM, 130 for SIGINT, 140 for SIGUSR2)."""
        return 128 + self.signum


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or what turns text around, and halves of a character; not a tab or a line's end."""


def printable(text: str) -> str:
    """A text that may be anybody's, fit for a terminal: what is no text in it becomes question marks."""
    return _CONTROLS.sub("?", text)


def one_line(said: BaseException | str) -> str:
    """An error's message, or any text, as one printable line; an error's type stands in where it has no message."""
    line = printable(" ".join(str(said).split()))
    return line if line or isinstance(said, str) else type(said).__name__
