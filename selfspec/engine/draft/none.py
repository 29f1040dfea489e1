"""No draft: plain decoding is speculative decoding that proposes nothing."""

from selfspec.config import Draft as DraftConfig
from selfspec.engine.draft.base import Draft
from selfspec.engine.head import Head
from selfspec.engine.model import Model


def make(draft: DraftConfig, model: Model, head: Head | None) -> Draft:
    """The draft a config asks for."""
    return Draft(model)
