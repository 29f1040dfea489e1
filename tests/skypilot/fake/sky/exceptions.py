"""Those that ``_sky.py`` tells apart."""


class NotSupportedError(Exception):
    """An infra lacks a feature."""


class ClusterNotUpError(Exception):
    """There is no controller."""
