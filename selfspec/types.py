"""The nouns that everything shares. This module imports nothing of ours."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a prompt set.

    ``id`` is stable over seeds and scales (the conversation's id in its source), ``tokens`` are the
    ids the model is given, chat template included where the workload asks for it.
    """

    id: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What to decode: a prompt and when to stop."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Cycle:
    """One round of draft, verify, accept. Every engine writes the same record.

    Attributes:
        k_asked: draft tokens the controller asked for.
        proposed: draft tokens handed to verification; fewer than asked where a gate stopped.
        accepted: draft tokens that stand (at most ``proposed``).
        new_tokens: tokens emitted; ``accepted`` and the target's own one, less what a stop cut off.
        signals: the gate's signal of every token the draft looked at, in order: the proposed ones,
            then the one it doubted, if it stopped. Empty where the gate computes none.
        draft_ms: milliseconds spent drafting, gate included.
        verify_ms: milliseconds spent in the target's pass and in accepting.
    """

    k_asked: int
    proposed: int
    accepted: int
    new_tokens: int
    signals: tuple[float, ...]
    draft_ms: float
    verify_ms: float


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a request.

    Attributes:
        tokens: the generated token ids, the stop token included.
        cycles: one record for each verification after the first token.
        ttft_s: seconds from arrival to the first token (prefill).
        total_s: seconds from arrival to the last token.
        finish: ``stop`` (end-of-sequence token) or ``length``.
    """

    tokens: tuple[int, ...]
    cycles: tuple[Cycle, ...]
    ttft_s: float
    total_s: float
    finish: Literal["stop", "length"]


Measurements = dict[str, float]
