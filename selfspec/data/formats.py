"""The formats that people keep prompts in: a record -> what is asked in it, and what is answered.

======================  ====================================================================
ShareGPT                ``{"id", "conversations": [{"from": "human", "value"}, ...]}``
role and content        ``{"conversations": [{"role": "user", "content"}, ...]}``, or ``"conversation"``
messages (OpenAI chat)  ``{"messages": [{"role": "user", "content"}, ...]}``
OpenAI's batch          ``{"custom_id", "body": {"messages": [...]}}``, or ``{"prompt"}`` there
prompt                  ``{"prompt"}``, with ``"completion"`` where there is an answer
Alpaca                  ``{"instruction", "input", "output"}``, with ``"history": [[asked, answered], ...]`` before it
Dolly                   ``{"instruction", "context", "response"}``
question                ``{"question", "answer"}`` (GSM8K), or ``"response"`` (OpenOrca)
Spec-Bench              ``{"question_id", "turns": ["...", ...]}``
plain text              a line of a ``*.txt``
======================  ====================================================================
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

ASKS, ANSWERS = ("human", "user"), ("gpt", "chatgpt", "assistant", "bot", "model")
KNOWN = (
    "'conversations' (ShareGPT), 'messages' (OpenAI chat), 'body' (OpenAI batch), 'turns' (Spec-Bench), "
    "'instruction' (Alpaca), 'question' or 'prompt'"
)


class Malformed(ValueError):
    """A record that is of no known format; says what was expected."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one record comes to.

    Attributes:
        id: ``None`` where the record has none.
        prompt: the first thing asked that is not blank, stripped; blank where nothing is asked.
        answer: what is answered to it, stripped; blank where nothing is.
        system: whether a system message comes with it, which the prompt is without.
        later: what else is asked after it, stripped, in order.
    """

    id: str | None
    prompt: str
    answer: str = ""
    system: bool = False
    later: tuple[str, ...] = ()


def exchange(record: Any) -> Exchange:
    """What a record asks.

    Raises:
        Malformed: it is of no known format.
    """
    if isinstance(record, str):
        return Exchange(None, _clean(record))
    if not isinstance(record, dict):
        raise Malformed(f"is {_kind(record)}; must be an object with {KNOWN}")
    for key, read in _READERS.items():
        if record.get(key) is not None:
            found = read(_id(record), record)
            apart = any(isinstance(record.get(name), str) and record[name].strip() for name in _SYSTEM)
            return replace(found, system=True) if apart else found
    raise Malformed(f"has the keys {_keys(record)}; must have {KNOWN}")


def _conversations(id: str | None, record: Mapping[str, Any]) -> Exchange:
    return _chat(id, "conversations", record["conversations"])


def _conversation(id: str | None, record: Mapping[str, Any]) -> Exchange:
    return _chat(id, "conversation", record["conversation"])


def _messages(id: str | None, record: Mapping[str, Any]) -> Exchange:
    return _chat(id, "messages", record["messages"])


def _body(id: str | None, record: Mapping[str, Any]) -> Exchange:
    body = record["body"]
    for key, read in (("messages", _messages), ("prompt", _prompt)):
        if isinstance(body, dict) and body.get(key) is not None:
            return read(id, body)
    raise Malformed("body: must be an object with 'messages' or 'prompt'")


def _turns(id: str | None, record: Mapping[str, Any]) -> Exchange:
    turns = record["turns"]
    if not isinstance(turns, list) or not turns:
        raise Malformed("turns: must be a list of texts")
    asked = [text for n, turn in enumerate(turns) if (text := _text(f"turns[{n}]", turn))]
    return Exchange(id, asked[0] if asked else "", later=tuple(asked[1:]))


def _instruction(id: str | None, record: Mapping[str, Any]) -> Exchange:
    asked, given = _first(record, "instruction"), _first(record, "input", "context")
    prompt, answer = f"{asked}\n\n{given}" if given else asked, _first(record, "output", "response")
    before = record.get("history") or []
    if not isinstance(before, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in before):
        raise Malformed("history: must be a list of pairs, what was asked and what was answered")
    said = [(_text(f"history[{n}]", asked), _text(f"history[{n}]", told)) for n, (asked, told) in enumerate(before)]
    said = [(asked, told) for asked, told in (*said, (prompt, answer)) if asked]
    if not said:
        return Exchange(id, "")
    return Exchange(id, *said[0], later=tuple(asked for asked, _ in said[1:]))


def _question(id: str | None, record: Mapping[str, Any]) -> Exchange:
    return Exchange(id, _first(record, "question"), _first(record, "answer", "response"))


def _prompt(id: str | None, record: Mapping[str, Any]) -> Exchange:
    if isinstance(record["prompt"], list) and all(isinstance(each, dict) for each in record["prompt"]):
        return _chat(id, "prompt", record["prompt"])
    answer = record.get("completion")
    return Exchange(id, _text("prompt", record["prompt"]), _text("completion", answer) if answer else "")


_READERS: dict[str, Callable[[str | None, Mapping[str, Any]], Exchange]] = {
    "conversations": _conversations,
    "conversation": _conversation,
    "messages": _messages,
    "body": _body,
    "turns": _turns,
    "instruction": _instruction,
    "question": _question,
    "prompt": _prompt,
}
"""By the key that tells a format from the others."""
_SYSTEM = ("system", "system_prompt")
"""Where a record has a system message that is no turn."""


def _chat(id: str | None, key: str, turns: Any) -> Exchange:
    """Of turns of ``from`` and ``value``, or of ``role`` and ``content``; those without a text say nothing."""
    if not isinstance(turns, list):
        raise Malformed(
            f"{key}: is {_kind(turns)}; must be a list of turns, {{'role', 'content'}} or {{'from', 'value'}}"
        )
    said = [each for n, turn in enumerate(turns) if (each := _turn(f"{key}[{n}]", turn)) is not None]
    if turns and not said:
        raise Malformed(f"{key}: has no turn with a text; a turn must be {{'role', 'content'}} or {{'from', 'value'}}")
    asked = [n for n, (who, text) in enumerate(said) if who in ASKS and text]
    system = any(who in ("system", "developer") and text for who, text in said)
    if not asked:
        return Exchange(id, "", system=system)
    first, *later = asked
    after = said[first + 1] if first + 1 < len(said) else ("", "")
    answer = after[1] if after[0] in ANSWERS else ""
    return Exchange(id, said[first][1], answer, system, tuple(said[n][1] for n in later))


def _turn(key: str, turn: Any) -> tuple[str, str] | None:
    """Who says what; ``None`` for a turn that has no text."""
    if not isinstance(turn, dict):
        return None
    who, text = (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    return None if text is None or not isinstance(who, str) else (who, _text(key, text))


def _first(record: Mapping[str, Any], *keys: str) -> str:
    """The first of these that the record has and that is not blank."""
    return next((text for key in keys if (text := _text(key, record.get(key) or ""))), "")


def _text(key: str, text: Any) -> str:
    """Of a string, or of OpenAI's list of parts."""
    if isinstance(text, list) and text and all(isinstance(part, dict) for part in text):
        for part in text:
            if not isinstance(part.get("text"), str):
                raise Malformed(f"{key}: has a part of type {part.get('type')!r}; must be texts alone")
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise Malformed(f"{key}: is {_kind(text)}; must be a text")
    return _clean(text)


def _clean(text: str) -> str:
    # Half a surrogate pair is legal in a JSON escape, and in no tokenizer.
    return text.encode(errors="replace").decode().strip()


def _id(record: Mapping[str, Any]) -> str | None:
    """Its own name; null, NaN (as pandas writes a missing one) and blank are none."""
    for key in ("id", "custom_id", "question_id", "conversation_id", "task_id"):
        value = record.get(key)
        if isinstance(value, float) and math.isnan(value):
            continue
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            if text := _clean(str(value)):
                return text
        elif value is not None:
            raise Malformed(f"{key}: is {_kind(value)}; must be a text or a number")
    return None


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _keys(record: Mapping[str, Any]) -> str:
    shown = ", ".join(repr(str(key))[:40] for key in list(record)[:8])
    return shown + (", ..." if len(record) > 8 else "") if shown else "of an empty object"
