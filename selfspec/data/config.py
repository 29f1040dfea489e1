"""What prompts are told by."""

from dataclasses import dataclass

from omegaconf import MISSING

from selfspec.options import bounded


@dataclass
class Workload:
    """Which prompts, how long, and when to stop."""

    name: str = MISSING
    source: str = MISSING
    sha256: str | None = None
    chat: bool = True
    """Put the prompt through the model's chat template."""
    prompt_tokens: int | None = bounded(None, 1)
    """Cut every prompt to exactly this many tokens (shorter ones are passed over)."""
    max_prompt_tokens: int = bounded(512, 1)
    new_tokens: int = bounded(MISSING, 2)
    ignore_eos: bool = False
    turns: int = bounded(1, 1)
    """Of a conversation, so many are asked in the bench stage, one after the other, each after the model's own answers
    to those before; conversations of fewer are passed over."""
