"""Answers given again: to the same call, and, if asked for, to one in the same words.

An answer is kept under everything that could change it: the model, all parameters, the whole prompt; and under the
caller's key, so that nobody sees what another was told. A drawn answer is given again only where its seed is, and
only to the same call. Two chats are in the same words where everything before the last user message is equal, and so
are the words of that message (``words.py``).
"""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from selfspec.serve.backend import Call, Chunk, Hit
from selfspec.serve.config import CacheConfig, CacheMode
from selfspec.serve.words import normalise

_NO_PART = ("id", "stats", "detail", "cache")
"""Fields of a call that do not change its answer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer, and what it answered.

    Attributes:
        wording: the key of all calls in the same words; ``None`` where only the same call is answered.
        expires: by the clock.
    """

    chunks: tuple[Chunk, ...]
    wording: str | None
    expires: float


class AnswerCache:
    """See the module's docstring.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, config: CacheConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._worded: dict[str, str] = {}
        """Wording -> the entry that was kept last."""

    def __len__(self) -> int:
        return len(self._entries)

    async def find(self, call: Call) -> Hit | None:
        """What was answered to the same call, or to one in the same words."""
        if not _repeatable(call):
            return None
        key = _digest(_parts(call))
        entry = self._live(key)
        if entry is not None:
            return Hit("exact", entry.chunks)
        wording = self._wording(call)
        entry = None if wording is None else self._live(self._worded.get(wording, ""))
        return None if entry is None else Hit("same_words", entry.chunks)

    async def keep(self, call: Call, chunks: Sequence[Chunk]) -> None:
        """Remembers a whole answer, if it may be given again."""
        if not _repeatable(call) or not chunks or chunks[-1].finish is None:
            return
        key, wording = _digest(_parts(call)), self._wording(call)
        self._drop(key)
        bare = tuple(replace(chunk, stats=None) for chunk in chunks)
        self._entries[key] = Entry(bare, wording, self._clock() + self._config.ttl_s)
        if wording is not None:
            self._worded[wording] = key
        while len(self._entries) > self._config.entries:
            self._drop(next(iter(self._entries)))

    def _wording(self, call: Call) -> str | None:
        """What calls in the same words share; ``None`` of a call that is to be answered by its own answer only."""
        if self._config.mode is not CacheMode.same_words or call.temperature > 0 or not call.messages:
            return None  # a text is gone on from its very last character
        parts = _parts(call)
        *before, last = parts["messages"]
        text = last.get("content")
        said = normalise(text) if last.get("role") == "user" and isinstance(text, str) else ()
        return _digest(parts | {"messages": [*before, {**last, "content": said}]}) if said else None

    def _live(self, key: str) -> Entry | None:
        """An entry that is not too old; it is now the one used last."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() >= entry.expires:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and entry.wording is not None and self._worded.get(entry.wording) == key:
            del self._worded[entry.wording]


def _repeatable(call: Call) -> bool:
    return call.cache and (call.temperature == 0 or call.seed is not None)


def _parts(call: Call) -> dict[str, Any]:
    """All that may change the answer."""
    parts = asdict(call)
    for name in _NO_PART:
        del parts[name]
    if call.temperature == 0:
        parts |= {"seed": None, "top_p": None, "top_k": None}  # these only matter where tokens are drawn
    return parts


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
