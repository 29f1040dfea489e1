"""Suffix decoding as vLLM has it: chains of what followed the last tokens, as long as the match is."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

from selfspec.axes import DraftOptions
from selfspec.errors import ConfigError
from selfspec.options import bounded


@dataclass
class Options(DraftOptions):
    """Where it looks, and how far."""

    name: str = "vllm_suffix"
    max_match: int = bounded(MISSING, 1, 64)
    """The depth of its tree of suffixes, in tokens."""
    cross_request: bool = False
    """Look into what earlier requests said, too."""

    made_elsewhere: ClassVar[bool] = True
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {"vllm": ("max_match", "cross_request")}

    @property
    def label(self) -> str:
        """By vLLM's name; its row says ``by vllm``."""
        return "suffix"

    def vllm(self, folder: Path | None) -> dict[str, Any]:
        """A cache of no request where earlier ones are not to be looked into."""
        alone = {} if self.cross_request else {"suffix_decoding_max_cached_requests": 0}
        return {"method": "suffix", "suffix_decoding_max_tree_depth": self.max_match, **alone}

    def check_here(self) -> None:
        """It is a package of its own."""
        if find_spec("arctic_inference") is None:
            raise ConfigError(
                "draft=vllm_suffix: needs arctic-inference; pip install arctic-inference (it is built on the spot)"
            )
