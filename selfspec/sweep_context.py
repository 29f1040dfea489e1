"""What a job is told of the sweep that it is part of."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from selfspec.errors import StorageError, one_line
from selfspec.files import from_json, write_atomic

FILE = "sweep.json"
"""In a sweep's folder: what its jobs are told of it."""
_LAUNCH, _RUN = "SELFSPEC_SWEEP", "SELFSPEC_SWEEP_RUN"
"""The environment variables that tell it to a job which cannot see that folder."""


@dataclass(frozen=True)
class SweepContext:
    """What a job is told of the sweep that it is part of.

    Attributes:
        launch: names this launch of the sweep in journals. Jobs of one that come to the same plan, and one that was
            killed and comes back, carry on with a journal that it has begun, even with ``checkpoint.resume=never``.
        run_id: the tracker's run of the sweep.
        plans: the identities of what it runs, where that is known from the start.
    """

    launch: str | None = None
    run_id: str | None = None
    plans: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The sweep in a folder."""
        try:
            noted = from_json((folder / FILE).read_text())
            return cls(noted["launch"], noted["run_id"], tuple(noted["plans"]))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StorageError(f"{folder / FILE}: is nothing a sweep left: {one_line(error)}; delete it") from error

    @classmethod
    def from_env(cls) -> Self:
        """The one that a job which runs alone was told of by its launcher."""
        return cls(os.environ.get(_LAUNCH) or None, os.environ.get(_RUN) or None)

    def environment(self) -> dict[str, str]:
        """What tells it to such a job."""
        return {key: value for key, value in ((_LAUNCH, self.launch), (_RUN, self.run_id)) if value}

    def save(self, folder: Path) -> None:
        """Leaves it in the sweep's folder."""
        write_atomic(folder / FILE, json.dumps(asdict(self)))


ALONE = SweepContext()
"""Of a job that is part of none."""
