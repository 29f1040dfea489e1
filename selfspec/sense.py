"""Whether what was measured can be: what makes no sense fails its job, in one line. Pure.

What one unit shows on its own (:func:`impossible`) is said before the unit is journalled, so that the next run measures
it anew; what only all units show together (:func:`senseless`), at the end.
"""

import math
from collections.abc import Mapping, Sequence

from selfspec.metrics import Packed, Unit, decode_rate
from selfspec.types import Measurements

_COUNTS = ("accepted", "depth", "proposed")


def impossible(unit: Unit) -> str | None:
    """What no bench unit can have, in words: answers without tokens, times that run backwards, drafts overfulfilled."""
    ways: Mapping[str, Sequence[Packed]] = {
        "plain decoding": unit["plain"],
        "the configuration": unit["configured"],
        **unit["against"],
    }
    for way, answers in ways.items():
        for prompt, answer in zip(unit["prompts"], answers, strict=True):
            if (wrong := _wrong(answer)) is not None:
                return f"prompt {prompt}, {way}: {wrong}"
    return None


def _wrong(answer: Packed) -> str | None:
    first, last, cycles = answer["ttft_s"], answer["total_s"], answer["cycles"]
    if not answer["tokens"]:
        return "the answer has no token"
    if not 0 < first <= last < math.inf:  # nor where one is NaN
        return f"the first token came after {first:g} s, the last after {last:g} s"
    for accepted, depth, proposed in zip(*(cycles[name] for name in _COUNTS), strict=True):
        if not 0 <= accepted <= depth <= proposed:
            return f"a cycle accepted {accepted} tokens of {proposed} proposed for {depth} positions"
    if not all(map(math.isfinite, (*cycles["draft_ms"], *cycles["verify_ms"]))):
        return "a cycle took no finite time"
    return None


def senseless(units: Sequence[Unit], drafts: bool) -> str | None:
    """Why all units together tell nothing, in words: answers that are none, and a speed-up that there is no time for.

    Args:
        drafts: whether something is drafted, so that there is to be a speed-up.
    """
    answers = [answer for unit in units for side in ("plain", "configured") for answer in unit[side]]
    if all(len(answer["tokens"]) == 1 and answer["finish"] == "stop" for answer in answers):
        return "every answer is empty: its first token ends it"
    several = len({prompt for unit in units for prompt in unit["prompts"]}) > 1
    if several and (token := one_token([answer["tokens"] for answer in answers])) is not None:
        return f"every answer is token {token} over and over, whatever is asked"
    timed = [unit for unit in units if decode_rate(unit["plain"]) and decode_rate(unit["configured"])]
    if drafts and not timed:
        return "no speed-up is known: no answer has tokens after its first that come one after another"
    if drafts and all(len(answer["tokens"]) <= 2 for unit in timed for answer in unit["plain"]):
        return "no speed-up is known: plain decoding says no more than one token after its first"
    return None


def one_token(answers: Sequence[Sequence[int]]) -> int | None:
    """The token that all answers consist of, at least one of them of several; ``None``: there are others."""
    said = {token for answer in answers for token in answer}
    return said.pop() if len(said) == 1 and max(map(len, answers)) > 1 else None


def not_finite(measured: Measurements) -> list[str]:
    """The measurements that are no number, each with its value."""
    return [f"{name}={value:g}" for name, value in measured.items() if not math.isfinite(value)]
