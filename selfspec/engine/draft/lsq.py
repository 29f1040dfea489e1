"""Early exit through a fitted head: a least-squares map from the exit state to the final one."""

from selfspec.config import Draft as DraftConfig
from selfspec.engine.draft.layerskip import EarlyExit
from selfspec.engine.head import Head
from selfspec.engine.llama import Llama


def make(draft: DraftConfig, model: Llama, head: Head | None) -> EarlyExit:
    """The same draft as ``layerskip`` with a better readout."""
    assert draft.exit_layer is not None and head is not None, "checked by the plan, fitted by the fit stage"
    return EarlyExit(model, draft.exit_layer, head)
