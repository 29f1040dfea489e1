"""Plans, as the command line makes them, and their jobs."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from selfspec import job, plan
from selfspec.plan import Plan
from selfspec.report.results import Result
from selfspec.run import CONF


def planned(*overrides: str) -> Plan:
    """The plan of these overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan.make(compose("config", list(overrides)))


def run_job(made: Plan, folder: Path) -> Result:
    """What comes of a plan; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return job.run(made, folder)
