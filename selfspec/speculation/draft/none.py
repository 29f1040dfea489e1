"""Plain decoding, as a draft: speculative decoding that proposes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from selfspec.axes import DraftOptions
from selfspec.model.base import Model
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.head import Head


@dataclass
class Options(DraftOptions):
    """Nothing to set."""

    name: str = "none"

    speculates: ClassVar[bool] = False
    can_go_unverified: ClassVar[bool] = True
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {"fake": (), "hf": (), "openai": (), "vllm": ()}

    def make(self, model: Model, head: Head | None) -> Draft:
        """The base of all drafts."""
        return Draft(model)
