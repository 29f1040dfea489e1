"""Medusa heads that somebody trained, in vLLM's form. K: how many heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from selfspec.axes import DraftOptions
from selfspec.errors import ConfigError


@dataclass
class Options(DraftOptions):
    """Which heads."""

    name: str = "vllm_medusa"
    source: str | None = None
    """A checkpoint of heads."""
    sha256: str | None = None
    """Of the source's file."""

    made_elsewhere: ClassVar[bool] = True
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {"vllm": ("source", "sha256")}

    @property
    def label(self) -> str:
        """By vLLM's name; its row says ``by vllm``."""
        return self.method

    @property
    def method(self) -> str:
        """vLLM's name of it."""
        return self.name.removeprefix("vllm_")

    def check(self) -> None:
        """Refuses no checkpoint."""
        if self.source is None:
            raise ConfigError(f"draft.source=null: draft={self.name} needs a checkpoint of heads, such as hf:...")

    def vllm(self, folder: Path | None) -> dict[str, Any]:
        """The heads in that folder."""
        return {"method": self.method, "model": str(folder)}
