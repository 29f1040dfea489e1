"""Answers given again: to the same call, and, if asked for, to one that says the same in other words.

An answer is kept under everything that could change it: the model, all parameters, the whole prompt; and under the
caller's key, so that nobody sees what another was told. A drawn answer is given again only where its seed is, and
only to the same call. Two prompts say the same where everything before the last user message is equal, the vectors of
that message are near enough, and its words are the same (``words.py``).
"""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfspec.config import CacheConfig, CacheMode
from selfspec.serve.backend import Call, Chunk, Hit
from selfspec.serve.words import same, words

Vector = NDArray[np.float32]
_NO_PART = ("id", "stats", "detail", "cache")
"""Fields of a call that do not change its answer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer, and what it answered.

    Attributes:
        group: what a call must share with it to be answered by it.
        vector: of the last user message; ``None`` where only the same call is answered.
        expires: by the clock.
    """

    chunks: tuple[Chunk, ...]
    group: str
    vector: Vector | None
    words: tuple[str, ...]
    expires: float


class AnswerCache:
    """See the module's docstring.

    Args:
        embed: text -> a vector of length 1; asked in a thread, and only with ``mode=similar``.
        clock: seconds, monotonic.
    """

    def __init__(
        self, config: CacheConfig, embed: Callable[[str], Vector], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._embed, self._clock = config, embed, clock
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._groups: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    async def find(self, call: Call) -> Hit | None:
        """What was answered to the same call, or to one that says the same."""
        if not _repeatable(call):
            return None
        key = _digest(_parts(call))
        entry = self._live(key)
        if entry is not None:
            self._entries.move_to_end(key)
            return Hit("exact", entry.chunks)
        if not self._compares(call):
            return None
        group, text = _split(call)
        others = [(other, near) for other in self._groups.get(group, ()) if (near := self._live(other, drop=False))]
        if not others:
            return None
        found = await asyncio.to_thread(self._nearest, text, others)
        if found is None:
            return None
        if found in self._entries:  # another call may have pushed it out meanwhile
            self._entries.move_to_end(found)
        return Hit("similar", dict(others)[found].chunks)

    async def keep(self, call: Call, chunks: Sequence[Chunk]) -> None:
        """Remembers a whole answer, if it may be given again."""
        if not _repeatable(call) or not chunks or chunks[-1].finish is None:
            return
        group, vector, said = "", None, tuple[str, ...]()
        if self._compares(call):
            group, text = _split(call)
            vector, said = await asyncio.to_thread(self._embed, text), words(text)
        key = _digest(_parts(call))
        self._drop(key)
        bare = tuple(replace(chunk, stats=None) for chunk in chunks)
        self._entries[key] = Entry(bare, group, vector, said, self._clock() + self._config.ttl_s)
        self._groups.setdefault(group, set()).add(key)
        while len(self._entries) > self._config.entries:
            self._drop(next(iter(self._entries)))

    def _compares(self, call: Call) -> bool:
        """Whether a call may be answered by what another was told: a chat; a text goes on from its very last word."""
        return self._config.mode is CacheMode.similar and call.temperature == 0 and bool(call.messages)

    def _nearest(self, text: str, others: Sequence[tuple[str, Entry]]) -> str | None:
        """The key of the nearest whose words are the same."""
        vector, said = self._embed(text), words(text)
        near = np.stack([entry.vector for _, entry in others if entry.vector is not None]) @ vector
        for index in np.argsort(-near):
            if near[index] < self._config.threshold:
                return None
            key, entry = others[int(index)]
            if same(said, entry.words, lambda a, b: float(self._embed(" " + a) @ self._embed(" " + b))):
                return key
        return None

    def _live(self, key: str, drop: bool = True) -> Entry | None:
        """An entry that is not too old."""
        entry = self._entries.get(key)
        if entry is not None and self._clock() >= entry.expires:
            if drop:
                self._drop(key)
            return None
        return entry

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        group = self._groups[entry.group]
        group.discard(key)
        if not group:
            del self._groups[entry.group]


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


def _split(call: Call) -> tuple[str, str]:
    """What must be equal, and the text that may be put in other words: the last message, if it is a user's."""
    parts = _parts(call)
    *before, last = parts["messages"]
    text = last.get("content")
    if last.get("role") != "user" or not isinstance(text, str):
        return _digest(parts), ""
    return _digest(parts | {"messages": [*before, {**last, "content": None}]}), text


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
