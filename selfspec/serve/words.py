"""Whether two prompts say the same in hardly other words.

How near two vectors are cannot be trusted with that: in a longer prompt one word more or less hardly moves them, and
opposites are as near to each other as synonyms (``docs/routing.md`` has the figures). So every word must be in both,
in the same order; what may differ is case, spacing, sentence punctuation, articles, politeness at either end, and a
word's inflection. Numbers, operators and other symbols are words here.
"""

import re
from collections.abc import Callable
from os.path import commonprefix

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
_TAIL = re.compile(r"e?s|e?d|ing|e|y|ie[sd]|'s|")
_STEM = 3
"""Letters that two forms of a word share at least."""
_INFLECTED = 0.65
"""The least cosine of two forms of a word; see ``docs/routing.md``."""


def words(text: str) -> tuple[str, ...]:
    """What must be the same, in order and lower case."""
    bare, before = text.strip(), ""
    while bare != before:
        before = bare
        bare = _AFTER.sub("", _BEFORE.sub("", bare, count=1) if _BEFORE.match(bare) else bare).strip()
    return tuple(word for word in _WORD.findall((bare or text).casefold()) if word not in _IDLE)


def same(a: tuple[str, ...], b: tuple[str, ...], alike: Callable[[str, str], float]) -> bool:
    """Whether every word of one is the other's, or an inflection of it.

    Args:
        alike: the cosine of two words' vectors.
    """
    return len(a) == len(b) and all(x == y or _inflected(x, y, alike) for x, y in zip(a, b, strict=True))


def _inflected(x: str, y: str, alike: Callable[[str, str], float]) -> bool:
    stem = len(commonprefix((x, y)))
    if stem < _STEM or not (_TAIL.fullmatch(x[stem:]) and _TAIL.fullmatch(y[stem:])):
        return False
    return alike(x, y) >= _INFLECTED
