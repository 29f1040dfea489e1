"""What prompts are told by."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from selfspec.options import bounded


@dataclass
class Prompts:
    """One file of prompts, which of its records are taken, and what is asked in one."""

    source: str = MISSING
    sha256: str | None = None
    prompt: str | None = None
    """What is asked, with ``{doc.question}`` where a record's own field is to stand; ``None``: the formats that
    ``data/formats.py`` knows."""
    where: dict[str, Any] = field(default_factory=dict)
    """Only records whose fields have this value, or one of these."""
    max_prompt_tokens: int = bounded(512, 1)


@dataclass
class Part(Prompts):
    """A set of prompts that is benched by itself: a published one, or one of its categories."""

    prompts: int = bounded(MISSING, 1)
    """How many it has; ``scale.prompts`` of them are taken, if there are as many."""


@dataclass
class Workload(Prompts):
    """Which prompts, how long, and when to stop."""

    name: str = MISSING
    chat: bool = True
    """Put the prompt through the model's chat template."""
    prompt_tokens: int | None = bounded(None, 1)
    """Cut every prompt to exactly this many tokens (shorter ones are passed over)."""
    new_tokens: int = bounded(MISSING, 2)
    ignore_eos: bool = False
    turns: int = bounded(1, 1)
    """Of a conversation, so many are asked in the bench stage, one after the other, each after the model's own answers
    to those before; conversations of fewer are passed over."""
    parts: dict[str, Part] = field(default_factory=dict)
    """What the bench stage asks in the place of the source's own prompts, and reports one by one. Heads are fitted, and
    quality is judged, on the source's."""
