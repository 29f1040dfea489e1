"""What a configuration costs in perplexity, and how far its text is from plain decoding's. Pure.

A *unit* is what the quality stage journals of a chunk of conversations: ids, the tokens scored of each one's own
answer, and the texts that were generated, each with its negative log-likelihood in nats.

- perplexity: exp(all nats / all tokens), over all conversations.
- delta-PPL: the configuration's less plain decoding's, with a bootstrap 95% interval (percentile method, over
  conversations, both sides of one drawn together).
- *reference*: conversations' own answers, under the distribution that the configuration decodes with. *text*: what
  was generated, scored by the whole model.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfspec.files import csv_text
from selfspec.metrics import RESAMPLES, first_difference
from selfspec.types import Measurements, Score

MOST_NATS = 700.0
"""A token, on average: a double holds no perplexity beyond."""
_SIDES = ("plain_reference", "reference", "plain_text", "text")


class Nats(NamedTuple):
    """How surprising a text is: negative log-likelihood, over so many tokens."""

    nats: float
    tokens: int

    @classmethod
    def of(cls, score: Score) -> "Nats":
        """Of a scored continuation."""
        return cls(-math.fsum(score.logprobs), len(score.logprobs))

    @property
    def sensible(self) -> bool:
        """Whether a perplexity comes of it: a finite number, of at least 1 but for rounding."""
        return bool(self.tokens) and -1e-3 <= self.nats / self.tokens <= MOST_NATS  # nor where it is NaN

    @property
    def perplexity(self) -> float:
        """Of this text alone."""
        return math.exp(self.nats / self.tokens)


class Conversation(NamedTuple):
    """All that is known of one: its own answer both ways, and the two texts."""

    prompt: str
    plain_reference: Nats
    reference: Nats
    plain_text: Nats
    text: Nats
    plain_tokens: Sequence[int]
    tokens: Sequence[int]


def conversations(units: Iterable[dict[str, Any]]) -> list[Conversation]:
    """Of all units, as they were journalled."""
    return [_conversation(row) for unit in units for row in unit["conversations"]]


def _conversation(row: dict[str, Any]) -> Conversation:
    known: dict[str, Any] = {key: Nats(*row[key]) if key in _SIDES else row[key] for key in Conversation._fields}
    return Conversation(**known)


def summarise(rows: Sequence[Conversation], seed: int) -> Measurements:
    """All measurements; at least one conversation."""
    found: Measurements = {"conversations": len(rows)}
    for name, plain, configured in (
        ("reference", [row.plain_reference for row in rows], [row.reference for row in rows]),
        ("text", [row.plain_text for row in rows], [row.text for row in rows]),
    ):
        delta, low, high = delta_perplexity(plain, configured, seed)
        found |= {
            f"{name}_tokens": sum(one.tokens for one in configured),
            f"plain_{name}_ppl": _pooled(plain),
            f"{name}_ppl": _pooled(configured),
            f"{name}_delta_ppl": delta,
            f"{name}_delta_ppl_low": low,
            f"{name}_delta_ppl_high": high,
        }
    differing = [at for at in map(divergence, rows) if at is not None]
    found["equal_tokens"] = float(np.mean([equal_tokens(row) for row in rows]))
    found["identical_texts"] = 1 - len(differing) / len(rows)
    if differing:
        found["first_divergence"] = float(np.median(differing))
    return found


def delta_perplexity(plain: Sequence[Nats], configured: Sequence[Nats], seed: int) -> tuple[float, float, float]:
    """The difference of two perplexities over the same conversations, and its 95% interval."""
    draws = np.random.default_rng(seed).integers(len(plain), size=(RESAMPLES, len(plain)))
    deltas = _resampled(configured, draws) - _resampled(plain, draws)
    low, high = np.percentile(deltas, [2.5, 97.5])
    return _pooled(configured) - _pooled(plain), float(low), float(high)


def equal_tokens(row: Conversation) -> float:
    """Share of positions at which both texts have the same token; of the longer one."""
    same = sum(a == b for a, b in zip(row.plain_tokens, row.tokens, strict=False))
    return same / max(len(row.plain_tokens), len(row.tokens))


def divergence(row: Conversation) -> int | None:
    """The first token, counted from 0, at which the texts differ; ``None``: they do not."""
    return first_difference(row.plain_tokens, row.tokens)


def table(rows: Sequence[Conversation]) -> str:
    """A line of CSV for each conversation."""
    numbers = [f"{side}_{what}" for side in _SIDES for what in ("ppl", "tokens")]
    lines: list[list[object]] = [["prompt", *numbers, "equal_tokens", "first_divergence"]]
    for row in rows:
        scored = [getattr(row, side) for side in _SIDES]
        values = [value for one in scored for value in (one.perplexity, one.tokens)]
        lines.append([row.prompt, *values, equal_tokens(row), divergence(row)])
    return csv_text(lines)


def _pooled(parts: Sequence[Nats]) -> float:
    return math.exp(math.fsum(part.nats for part in parts) / sum(part.tokens for part in parts))


def _resampled(parts: Sequence[Nats], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    nats, tokens = (np.asarray([part[i] for part in parts], dtype=float) for i in (0, 1))
    pooled: NDArray[np.float64] = np.exp(nats[draws].sum(1) / tokens[draws].sum(1))
    return pooled
