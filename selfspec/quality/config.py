"""What the quality stage is told."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from selfspec.options import bounded


@dataclass
class TaskData:
    """Where an lm-eval task's validation split lies, as one Arrow file; see ``data/assets.py``."""

    source: str = MISSING
    sha256: str | None = None


@dataclass
class Quality:
    """What the quality stage looks at, and how much of it (``docs/quality.md`` has the definitions)."""

    name: str = MISSING
    prompts: int = bounded(MISSING, 0)
    """Conversations that perplexity is measured on; 0: none."""
    chunk: int = bounded(4, 1)
    """Conversations in a unit of work: what an interrupted stage loses at most."""
    answer_tokens: int = bounded(256, 1)
    """The most tokens of a conversation's own answer that are scored."""
    tasks: list[str] = field(default_factory=list)
    """Of lm-eval, without examples; none: ``[]``."""
    limit: int | None = bounded(None, 1)
    """Documents of each task; ``None``: all."""
    data: dict[str, TaskData] = field(default_factory=dict)
    """Where tasks' documents are; of a task that is missing here, lm-eval asks the hub."""
    gate_prompts: int = MISSING
    """Of those conversations, how many the gates' signals are looked at on; 0: none."""
    exits: list[int] | None = None
    """The exit layers that are looked at; ``None``: some evenly spaced ones, and the draft's own."""
