"""Two infras, one of which has no spot machines."""

import enum

from .exceptions import NotSupportedError


class CloudImplementationFeatures(enum.Enum):
    """The one that is asked after."""

    SPOT_INSTANCE = "spot_instance"


class Cloud:
    """An infra, by its name."""

    def __init__(self, name):
        self._name = name

    def __str__(self):
        return self._name

    def check_features_are_supported(self, resources, features):
        """Raises NotSupportedError where one is not."""
        if self._name == "Slurm" and features:
            raise NotSupportedError("Spot instances are not supported in Slurm.")


def named(name):
    """By the name users write."""
    known = {"gcp": "GCP", "slurm": "Slurm"}
    if name not in known:
        raise ValueError(f"Invalid infra {name!r}")
    return Cloud(known[name])
