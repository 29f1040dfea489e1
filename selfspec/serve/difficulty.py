"""How difficult a prompt looks, before anything is run on it."""

import math
from collections.abc import Sequence


def difficulty(tokens: Sequence[int]) -> float:
    """How rare a prompt's tokens are: the mean of ln(1 + token id), in nats; 0 of no tokens.

    A byte-pair tokenizer numbers its tokens in the order in which they were merged, the most frequent first: this is
    the mean log rank, which is low for plain English and high for code, names and other languages. It says what a
    prompt is made of, and not how sure the model will be of its answer: ``docs/routing.md`` has the measurement.
    """
    return sum(math.log1p(token) for token in tokens) / len(tokens) if tokens else 0.0
