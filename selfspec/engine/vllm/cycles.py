"""Our cycle records from what vLLM records of a request's drafts (``--per-request-spec-decode-metrics=detailed``).

vLLM has an entry for each draft that it verified: tokens proposed, tokens accepted. A step that nothing was drafted
for has none; with us it is a cycle too. And vLLM drafts its K tokens even where fewer may still be said, and counts
those beyond, as accepted or not; here, as with our own decoder, what lies beyond the last token that was asked for is
not proposed. So acceptance and acceptance length mean the same for both engines.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from selfspec.types import Cycle


def cycle(
    k: int,
    left: int,
    entry: tuple[int, int] | None,
    new: int,
    draft_ms: float,
    verify_ms: float,
    batch: int = 1,
    signals: tuple[float, ...] = (),
) -> Cycle:
    """One cycle.

    Args:
        k: tokens that the draft was asked for.
        left: tokens that the request could still have said before it.
        entry: proposed and accepted, as vLLM has them; ``None``: there was no draft.
        new: tokens that it brought, a stop's cut made.
    """
    proposed, accepted = entry or (0, 0)
    most = left - 1
    return Cycle(
        k_asked=min(k, most),
        proposed=min(proposed, most),
        depth=min(proposed, most),
        accepted=min(accepted, most),
        new_tokens=new,
        signals=signals,
        draft_ms=draft_ms,
        verify_ms=verify_ms,
        batch=batch,
    )


def of_answer(metrics: Mapping[str, Any], pieces: Sequence[int], most: int, seconds: float) -> tuple[Cycle, ...]:
    """Those of an answer that came over HTTP.

    The pieces of a stream say which entry is which step, but for an order that no figure depends on; where a server
    is busy it may join steps in a piece. When a step began is not told: all get an equal share of the time.

    Args:
        metrics: vLLM's ``metrics.speculative_decoding`` of the answer, with its per-step lists.
        pieces: tokens of each piece; the first one's first is of no cycle.
        most: tokens that were asked for.
        seconds: from the first token to the last.
    """
    entries = list(zip(metrics.get("per_step_drafted") or (), metrics.get("per_step_accepted") or (), strict=True))
    first, *later = pieces
    entries.reverse()
    steps: list[tuple[tuple[int, int] | None, int]] = []
    for at, tokens in enumerate((first - 1, *later)):
        cut = at == len(later)  # a stop, or the end, may have cut the last draft
        while tokens:
            fits = bool(entries) and (entries[-1][1] < tokens or (cut and len(entries) == 1))
            entry = entries.pop() if fits else None
            new = min(tokens, 1 + (entry[1] if entry else 0))
            steps.append((entry, new))
            tokens -= new
    share, left, cycles = 1e3 * seconds / max(len(steps), 1), most - 1, []
    for entry, new in steps:
        cycles.append(cycle(metrics["num_spec_tokens"], left, entry, new, 0.0, share))
        left -= new
    return tuple(cycles)
