"""Any OpenAI-compatible server, asked over HTTP."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfspec import credentials
from selfspec.axes import EngineOptions
from selfspec.errors import ConfigError
from selfspec.plan import Plan

if TYPE_CHECKING:
    from selfspec.engine.openai.engine import OpenAIEngine


@dataclass
class Options(EngineOptions):
    """Which servers."""

    name: str = "openai"
    url: str | None = None
    """The server that is measured, such as ``http://127.0.0.1:8000``."""
    plain_url: str | None = None
    """A server of the same model that drafts nothing, to compare it with."""

    runs_ours: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Who decodes."""
        return "over HTTP"

    def check(self) -> None:
        """Refuses what is no server's address."""
        for key, value in (("url", self.url), ("plain_url", self.plain_url)):
            if value is not None and not re.fullmatch(credentials.SERVER, value):
                shown = credentials.without(value)
                raise ConfigError(f"engine.{key}={shown}: must be http(s)://HOST, no credentials, query or fragment")

    def refuse(self, plan: Any) -> None:
        """Refuses no server, one that drafts with nothing to compare it with, and a comparison of nothing."""
        super().refuse(plan)
        if self.url is None:
            raise ConfigError("engine.url=null: engine=openai needs one, such as http://127.0.0.1:8000")
        if (plan.draft.name == "served") != (self.plain_url is not None):
            raise ConfigError(
                f"engine.plain_url={self.plain_url}: draft=served is compared with a server that drafts nothing, at "
                f"engine.plain_url; draft=none with none; draft={plan.draft.name}"
            )

    def make(self, plan: Plan) -> "OpenAIEngine":
        """The engine."""
        from selfspec.engine.openai.engine import OpenAIEngine

        return OpenAIEngine(plan)
