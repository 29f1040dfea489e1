"""Credentials in what is kept and shown: configs, results and messages are no place for them."""

import re

SERVER = re.compile(r"https?://[^@/\s?#]+(/[^@\s?#]*)?")
"""The base of a server's addresses: its paths are put behind it, so it has no query either."""

_PASSWORD = re.compile(r"(?<=://)[^/\s@]*:(?!\d+/)[^\s@]*@")  # it may have slashes; what is all digits is a port
_USER = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(r"(?<=://)([^\s?#;]*)[?#;][^\s'\")]+")
_VALUE = re.compile(r"([?&][^\s=&?'\"]+=)[^\s&'\")]+")
_HARMLESS = (
    *("application_name", "cache", "charset", "check_same_thread", "connect_timeout", "driver", "immutable"),
    *("isolation_level", "mode", "nolock", "sslmode", "timeout", "uri"),
)
_NAME = re.compile(r"(?i)(^|[-_.])((api[-_]?k(ey?)?|key|passw(or)?d|pwd|secret|credential)s?|token)($|[-_.=])")


def without(text: str) -> str:
    """A URL, or a text that names some, less ``user:password@`` and what is asked for."""
    return _VALUE.sub(r"\1...", _QUERY.sub(r"\1?...", _USER.sub("", _PASSWORD.sub("", text))))


def in_url(url: str, user: bool = True) -> bool:
    """Whether a URL may hold some: a password, or in its query or fragment what is not known to be harmless.

    Args:
        user: whether a user alone is one.
    """
    scheme, _, rest = url.partition("://")
    asked = re.split("[&?]" if scheme.startswith("sqlite") else "[&;#?]", rest)[1:]
    strange = any(part.partition("=")[0] not in _HARMLESS for part in asked if part)
    return strange or bool(_PASSWORD.search(url)) or (user and bool(_USER.search(url)))


def named(name: str) -> bool:
    """Whether a variable or a flag is called like one: ``HF_TOKEN``, ``--api-key=...``."""
    return bool(_NAME.search(name))
