"""Plans, as the command line makes them."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from selfspec import plan
from selfspec.plan import Plan
from selfspec.run import CONF


def planned(*overrides: str) -> Plan:
    """The plan of these overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan.make(compose("config", list(overrides)))
