"""Tokens -> text as it comes: whole characters, and nothing that a stop text may yet take back."""

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder puts for bytes that are no character, or not yet."""

_CONTEXT = 8
"""Tokens before an answer that say how its first ones are written: enough to end in whole characters."""


class Detokenizer:
    """Decodes a growing sequence; what it has given out together is the decoded whole.

    A token's text may depend on those before it (a space, the rest of a character), so the last tokens that ended
    in a whole character are decoded again with what is new (as Text Generation Inference does).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """``before``: what the sequence goes on from, whose text is not given out."""
        self._decode = decode
        self._tokens = list(before[-_CONTEXT:])
        self._known = len(self._tokens)
        """Of the tokens kept, those whose text is out."""

    def push(self, token: int) -> str:
        """The text that a token makes certain; empty while a character is unfinished."""
        self._tokens.append(token)
        text = self._new()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._tokens = self._tokens[self._known :]
        self._known = len(self._tokens)
        return text

    def ahead(self, token: int) -> str | None:
        """The text that a token would add, were it next; ``None`` where it adds or goes on with a part of a character.

        A special token, too, has no text.
        """
        before, whole = self._decode(self._tokens) if self._tokens else "", self._decode([*self._tokens, token])
        text = whole[len(before) :]
        plain = text and UNFINISHED not in text and not before.endswith(UNFINISHED) and whole.startswith(before)
        return text if plain else None

    def flush(self) -> str:
        """What is left where the sequence ends, unfinished as it may be."""
        return self._new()

    def _new(self) -> str:
        before = self._decode(self._tokens[: self._known]) if self._known else ""
        return self._decode(self._tokens)[len(before) :]


class Stops:
    """Holds back the end of a text while it may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False
        """Whether one came; nothing after it is given out, nor it."""

    def push(self, text: str) -> str:
        """What is certain to be part of the answer.

        Of several stop texts the one that is complete first counts, and of those that end together the longest,
        so that the answer does not depend on the pieces it came in.
        """
        if self.hit or not self._stops:
            return "" if self.hit else text
        text, self._held = self._held + text, ""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.hit = True
            return text[: min(found)[1]]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back where the text ends."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``, and is not all of it."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
