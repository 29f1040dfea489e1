"""No draft: plain decoding is speculative decoding that proposes nothing."""

from selfspec.config import Draft as DraftConfig
from selfspec.model.base import Model
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.head import Head


def make(draft: DraftConfig, model: Model, head: Head | None) -> Draft:
    """The draft a config asks for."""
    return Draft(model)
