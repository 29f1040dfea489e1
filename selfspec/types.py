"""The nouns that everything shares. This module imports nothing of ours."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a prompt set.

    ``id`` is stable over seeds and scales (the conversation's id in its source), ``tokens`` are the
    ids the model is given, chat template included where the workload asks for it; ``answer`` is what the
    source's conversation goes on with, as text, blank where it ends; ``turns`` is all that is to be asked, as text,
    one after the other.
    """

    id: str
    tokens: tuple[int, ...]
    answer: str = ""
    turns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are chosen from the model's distribution.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: only the k likeliest tokens may be drawn; ``None``: all.
        top_p: only the fewest likeliest tokens that together have this probability; ``None``: all.
        seed: the request's own randomness, so that its tokens do not depend on its neighbours in a batch.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Request:
    """What to decode: a prompt, when to stop, and how tokens are chosen.

    ``logprobs``: how many alternatives to give beside each token's log-probability; ``None``: neither.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = False
    sampling: Sampling = GREEDY
    logprobs: int | None = None


class Logprob(NamedTuple):
    """A token's natural log-probability, as the model gives it, and ``(id, log-probability)`` of the likeliest."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Cycle:
    """One round of draft, verify, accept. Every engine writes the same record.

    Attributes:
        k_asked: how many positions ahead the controller asked the draft to look.
        proposed: draft tokens handed to verification; fewer than asked where a gate stopped, more where the
            draft is a tree.
        depth: how many positions ahead the draft looked; of a chain, ``proposed``.
        accepted: draft tokens that stand (at most ``depth``).
        new_tokens: tokens emitted; ``accepted`` and the target's own one, less what a stop cut off.
        signals: the gate's signal of every token the draft looked at, in order: the proposed ones,
            then the one it doubted, if it stopped. Empty where the gate computes none.
        draft_ms: milliseconds spent drafting, gate included.
        verify_ms: milliseconds spent in the target's pass and in accepting.
        batch: requests that shared the cycle, and its milliseconds.
    """

    k_asked: int
    proposed: int
    depth: int
    accepted: int
    new_tokens: int
    signals: tuple[float, ...]
    draft_ms: float
    verify_ms: float
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a request.

    Attributes:
        tokens: the generated token ids, the stop token included.
        cycles: one record for each verification after the first token.
        ttft_s: seconds from arrival to the first token (prefill).
        total_s: seconds from arrival to the last token.
        finish: ``stop`` (end-of-sequence token) or ``length``.
        queue_s: seconds from arrival to when its prompt began to be read.
    """

    tokens: tuple[int, ...]
    cycles: tuple[Cycle, ...]
    ttft_s: float
    total_s: float
    finish: Literal["stop", "length"]
    queue_s: float = 0.0


class Score(NamedTuple):
    """How likely a continuation is.

    Attributes:
        logprobs: of each of its tokens after those before it, natural logarithms.
        greedy: whether each is the likeliest there.
    """

    logprobs: tuple[float, ...]
    greedy: bool


class Signals(NamedTuple):
    """What the gates would see at every position where one exit drafts, and whether its likeliest token stands.

    Attributes:
        layer: the exit layer.
        head: what reads it: ``raw``, or the draft mode whose head was fitted.
        max_prob: in [0, 1];
        entropy: in nats;
        var_entropy: in nats squared, all three of the draft's distribution.
        accepted: whether its likeliest token is the one that was emitted.
    """

    layer: int
    head: str
    max_prob: tuple[float, ...]
    entropy: tuple[float, ...]
    var_entropy: tuple[float, ...]
    accepted: tuple[bool, ...]


Measurements = dict[str, float]
