"""What a task of lm-eval's asks of an answer besides its length: done, or refused by name."""

from collections.abc import Mapping
from typing import Any

from selfspec.errors import ConfigError
from selfspec.types import Sampling

_READ = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_NEUTRAL = {
    **dict.fromkeys(("repetition_penalty", "length_penalty", "num_beams", "n", "best_of", "num_return_sequences"), 1),
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "min_new_tokens"), 0),
    **dict.fromkeys(("early_stopping", "ignore_eos", "use_beam_search"), False),
    **dict.fromkeys(("typical_p", "use_cache", "skip_special_tokens"), True),
}
"""Values that ask for nothing."""


def sampling(asked: Mapping[str, Any]) -> Sampling:
    """How a task wants its answers drawn, by its ``generation_kwargs``.

    Raises:
        ConfigError: it asks for something that we do not do.
    """
    for key, value in asked.items():
        if key not in _READ and value not in (None, _NEUTRAL.get(key)):
            raise ConfigError(
                f"quality.tasks: generation_kwargs.{key}={value}: is not done here; read are {', '.join(_READ)}"
            )
    return Sampling(asked.get("temperature", 0.0), asked.get("top_k"), asked.get("top_p"))
