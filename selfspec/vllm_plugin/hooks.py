"""Where the plugin takes hold of vLLM: functions wrapped in memory; others draft as they did.

- ``EngineArgs.create_speculative_config``: takes our settings out of ``--speculative-config``, which knows no such
  key, and hands them on in ``additional_config``, which travels to every process.
- ``VllmConfig.num_lookahead_tokens``: how many slots the scheduler sets aside beyond the tokens it schedules. A
  proposer of a class of one's own gets none; ours writes keys and values there.
- ``GPUModelRunner.propose_draft_token_ids``: such a proposer is shown tokens alone; ours needs the batch.

And what vLLM runs on has faults that ``mend.py`` mends.
"""

from abc import ABC, abstractmethod
from functools import wraps
from typing import Any

from selfspec.errors import ConfigError
from selfspec.vllm_plugin import versions
from selfspec.vllm_plugin.mend import mend, quote_library_path
from selfspec.vllm_plugin.settings import KEY, PROPOSER, parse

_MARK = "_selfspec_wrapped"


class Proposer(ABC):
    """A proposer that is shown the whole batch."""

    @abstractmethod
    def draft(self, runner: Any, sampled: Any, states: Any, verified: Any, most: int) -> list[list[int]]:
        """Draft tokens of every request of the batch."""


def register() -> None:
    """vLLM's entry point (``vllm.general_plugins``), called in each of its processes; twice is as good as once."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "create_speculative_config", _take_settings)
    quote_library_path()
    try:
        versions.check()
    except ConfigError:  # said to those who ask for early exit; nobody else minds
        return
    lookahead = VllmConfig.num_lookahead_tokens
    if not hasattr(lookahead.fget, _MARK):
        VllmConfig.num_lookahead_tokens = property(_reserve(lookahead.fget))


def attach() -> None:
    """Shows the batch to our proposer; called where one is made, so that no other process loads the runner."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(GPUModelRunner, "propose_draft_token_ids", _show_batch)
    mend()


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    original = getattr(owner, name, None)
    # The mark: vLLM loads plugins in each process and may do so twice; one wrap must not wrap another.
    if original is not None and not hasattr(original, _MARK):
        setattr(owner, name, wrapper(original))


def _take_settings(original: Any) -> Any:
    @wraps(original)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = self.speculative_config
        if isinstance(asked, dict) and asked.get("model") == PROPOSER:
            versions.check()
            settings = asked.get(KEY, self.additional_config.get(KEY))  # there, if this is asked twice
            # Here, in the process that was given the flag: a mistake is one line of its own, and no worker's traceback.
            parse(settings, asked.get("num_speculative_tokens"), self.tensor_parallel_size)
            self.additional_config = {**self.additional_config, KEY: settings}
            self.speculative_config = {key: value for key, value in asked.items() if key != KEY}
        return original(self, *args, **kwargs)

    setattr(create, _MARK, True)
    return create


def _reserve(original: Any) -> Any:
    @wraps(original)
    def lookahead(self: Any) -> int:
        speculative = self.speculative_config
        if speculative is not None and speculative.model == PROPOSER:
            slots: int = speculative.num_speculative_tokens
            return slots
        others: int = original(self)
        return others

    setattr(lookahead, _MARK, True)
    return lookahead


def _show_batch(original: Any) -> Any:
    @wraps(original)
    def propose(self: Any, scheduled: Any, sampled: Any, how: Any, hidden: Any, states: Any, *rest: Any) -> Any:
        if isinstance(self.drafter, Proposer):
            _, verified, *_ = rest
            return self.drafter.draft(self, sampled, states, verified, scheduled.num_spec_tokens_to_schedule)
        return original(self, scheduled, sampled, how, hidden, states, *rest)

    setattr(propose, _MARK, True)
    return propose
