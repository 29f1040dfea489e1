"""Faults of what vLLM 0.32 runs on, mended in memory.

Two are of its rejection sampler on a CPU; with them, sampled drafts are not exact:

- ``expand_batch_to_tokens`` gives each draft token its request's temperature and top-k. The CPU's kernel knows int64
  alone; others are converted, the answer goes into the converted copy, and what is used is memory as it was.
- ``apply_sampling_constraints`` fails where requests have a top-k and no row of the batch has a draft token.

One is of torch (2.13): where its folder has a space in its name, compiled models cannot be linked.
"""

import shlex
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor

from selfspec.errors import ConfigError
from selfspec.vllm_plugin import versions


def mend() -> None:
    """Does nothing to a vLLM that is not for a CPU, has been mended, or is of another version."""
    try:
        versions.check()
    except ConfigError:
        return
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu() or rejection_sampler.expand_batch_to_tokens is expand:
        return
    constrain = rejection_sampler.apply_sampling_constraints

    @wraps(constrain)
    def constrained(logits: Tensor, *args: Any) -> Tensor:
        kept: Tensor = constrain(logits, *args) if len(logits) else logits
        return kept

    rejection_sampler.apply_sampling_constraints = constrained
    rejection_sampler.expand_batch_to_tokens = expand


def quote_library_path() -> None:
    """Lets torch's compiler link in a folder with a space: it quotes all it hands to a shell's parser but this one."""
    from torch.utils import cpp_extension

    path = getattr(cpp_extension, "TORCH_LIB_PATH", "")
    if " " in path and Path(path).is_dir():  # once quoted, it names none
        cpp_extension.TORCH_LIB_PATH = shlex.quote(path)


def expand(x: Tensor, ends: Tensor, count: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """Values of requests ``[B]`` -> of their tokens ``[count]``; request b's are those from ``ends[b - 1]`` on."""
    lengths = ends.diff(prepend=ends.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(lengths, output_size=count)
