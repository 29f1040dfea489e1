"""Attention masks by positions: transformers' own rules, asked of where tokens stand in our cache.

transformers makes a mask from a rule (causal, a window, chunks) and from where keys lie in its own cache. Ours lie
elsewhere, in rows of other lengths, and a draft's tree hides siblings: so the rule is asked of positions instead.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selfspec.model.attention import AttentionMetadata

RUNNING: ContextVar[AttentionMetadata | None] = ContextVar("pass", default=None)
"""Whose masks are made; ``None``: transformers' own, as in its ``generate``."""


def install() -> None:
    """Makes masks ours within our passes: transformers has a table of functions that make them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as TABLE

    for name in ("sdpa", "eager"):
        if not isinstance(TABLE[name], partial):
            TABLE[name] = partial(_mask, name == "sdpa", TABLE[name])


def _mask(by_sdpa: bool, theirs: Callable[..., Any], *args: Any, **told: Any) -> Tensor | None:
    """A mask ``[R, 1, T, S]`` to be added to scores, where the model's own rule and the trees let a token look.

    ``told["mask_function"]`` is that rule: of a row, a head, a query's position and a key's, whether it is seen.
    """
    at = RUNNING.get()
    if at is None:
        made: Tensor | None = theirs(*args, **told)
        return made
    from transformers.masking_utils import causal_mask_function

    rule = told["mask_function"]
    if rule is causal_mask_function and at.causal and by_sdpa and told.get("allow_is_causal_skip", True):
        return None  # a prompt: attention has a kernel for it
    query, key = at.query_positions, at.key_positions
    row = torch.arange(at.count, device=at.device)[:, None, None, None]
    seen = rule(row, 0, query[:, None, :, None], key[:, None, None, :]) & at.visible
    dtype = told.get("dtype", torch.float32)
    return torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, torch.finfo(dtype).min)
