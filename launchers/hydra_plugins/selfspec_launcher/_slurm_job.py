"""What submitit runs in a Slurm job: one job of a sweep, from its command line."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class Run:
    """A job; queued again, it is the same."""

    arguments: Sequence[str]
    environment: Mapping[str, str]

    def __call__(self) -> None:
        """Runs it.

        submitit has its own handlers of SIGTERM and SIGUSR2, which end the process wherever it is, or have the job go
        on. Ours stand while it works, so that it ends where that does no harm and its tracker's run says so; then the
        signal that asked for the job to be queued again is raised once more, for submitit to do that.

        Raises:
            SystemExit: the job has failed or was told to end: without a result, submitit takes Slurm's word for it.
        """
        cpus = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
        # Before `run` is imported, and torch with it, which reads it once.
        os.environ.setdefault("OMP_NUM_THREADS", cpus)  # without task affinity, it sees the whole node's
        os.environ.update(self.environment)
        from selfspec.run import main

        sys.argv = ["selfspec.run", *self.arguments]
        try:
            main()
        except SystemExit as left:
            if left.code == 128 + signal.SIGUSR2:
                signal.raise_signal(signal.SIGUSR2)
            if left.code:
                raise

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs when the job is queued again: the journal knows the rest."""
        return DelayedSubmission(self)
