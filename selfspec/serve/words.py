"""What a prompt says, as the words that must be the same for another to have its answer.

All words count, in order; case, spacing, sentence punctuation, articles, and politeness at either end do not. Numbers,
operators and other symbols are words here.
"""

import re

_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d]+(?:['\N{RIGHT SINGLE QUOTATION MARK}][^\W\d]+)*|[^\w\s]", re.UNICODE)
_IDLE = frozenset({"a", "an", "the", *".,;:!?\"'`"})
_BEFORE = re.compile(
    r"(?:hi|hello|hey)(?: there)?[,.!]\s*|(?:please|kindly)\s+|(?:can|could|would|will) you (?:please|help me)\s+|"
    r"i (?:want|need|would like|'d like) you to ",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"[,.!?;\n]\s*(?:please|thanks|thank you)(?: a lot| very much| so much| in advance)?[.!\s]*$", re.IGNORECASE
)


def normalise(text: str) -> tuple[str, ...]:
    """What must be the same, in order and lower case."""
    bare, before = text.strip(), ""
    while bare != before:
        before = bare
        bare = _AFTER.sub("", _BEFORE.sub("", bare, count=1) if _BEFORE.match(bare) else bare).strip()
    return tuple(word for word in _WORD.findall((bare or text).casefold()) if word not in _IDLE)
