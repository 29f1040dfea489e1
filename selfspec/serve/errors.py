"""What a caller is told when a request cannot be answered; each has a status and OpenAI's error shape."""

from collections.abc import Mapping
from typing import Any, ClassVar

from selfspec.errors import SelfspecError


class RequestError(SelfspecError):
    """Base: ``status`` is HTTP's, ``kind`` and ``code`` are OpenAI's ``type`` and ``code``."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None) -> None:
        """In one line, whatever a caller or a back end calls things.

        Args:
            param: the field of the request that is wrong, if one is.
        """
        super().__init__(printable(message))
        self.param = None if param is None else printable(param)

    def body(self) -> Mapping[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def printable(text: str) -> str:
    """A text that may be shown: control characters and halves of surrogate pairs are spelt out."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class Invalid(RequestError):
    """A field of the request is wrong."""

    status, kind = 400, "invalid_request_error"


class TooLong(Invalid):
    """Prompt and answer are more than fits."""

    code = "context_length_exceeded"


class Unauthorized(RequestError):
    """No API key, or a wrong one."""

    status, kind, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(RequestError):
    """By a name that is not ours, or from another site's page."""

    status, kind, code = 403, "invalid_request_error", "forbidden"


class UnknownModel(RequestError):
    """No back end serves a model of this name."""

    status, kind, code = 404, "invalid_request_error", "model_not_found"


class TooSlow(RequestError):
    """The body took too long to come."""

    status, kind, code = 408, "invalid_request_error", "request_timeout"


class TooLarge(RequestError):
    """The body is longer than allowed."""

    status, kind, code = 413, "invalid_request_error", "request_too_large"


class Overloaded(RequestError):
    """As many requests as allowed are running or waiting; worth trying again."""

    status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Failed(RequestError):
    """A back end broke; nothing the caller did."""


class Unavailable(RequestError):
    """Starting, draining, or no back end answers; worth trying again."""

    status, code = 503, "unavailable"
