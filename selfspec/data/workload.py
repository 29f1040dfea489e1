"""Prompts: which conversations of a ShareGPT file, in which order, cut to which length.

The rule, all of it:

1. *The prompt* of a conversation is its first human turn that is not blank, stripped; *the answer* is the
   assistant's next turn, stripped, where there is one. Of conversations with one id, and of prompts with one
   text, only the first in the file stands.
2. *The split* is fixed by a hash of the id's stem, whatever the seed: 60% fit, 20% bench, 20% quality. ShareGPT
   cuts long conversations into parts ``abc_0``, ``abc_47``, ...; the stem ``abc`` keeps them together. With
   rule 1, neither a conversation nor a text is in two splits.
3. *The order* within a split is that of a hash of seed and id. Prompts that fit are taken in that order, so the
   first n are the same whatever count is asked for.
4. *Fitting*: with ``prompt_tokens=P`` a prompt of at least P tokens, cut to its first P; else one of at most
   ``max_prompt_tokens``. Of prompts that are equal once cut, the first stands.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from selfspec.config import Workload
from selfspec.data import assets, folders
from selfspec.errors import AssetError, ConfigError
from selfspec.types import Prompt

Split = Literal["fit", "bench", "quality"]

_VERSION = 2
"""Raise it when the same file would give other prompts: the old table is then not taken."""
_TABLE = "prompts.jsonl"
_BLOCK = 1 << 20
_LONGEST_TOKEN = 16
"""No JSON token that is not a string is longer: an error this near to the end may be the end's."""


def select(
    workload: Workload,
    split: Split,
    count: int,
    seed: int,
    encode: Callable[[str], Sequence[int]],
    answered: bool = False,
) -> list[Prompt]:
    """The first ``count`` prompts of a split that fit, by the rule at the head of this module.

    Args:
        workload: where the prompts are, and how long they may be.
        split: ``fit`` (heads are fitted on these), ``bench`` or ``quality``.
        count: how many.
        seed: another seed is another order, and never moves a prompt to another split.
        encode: text -> token ids, chat template included where asked for; called only as often as needed.
        answered: pass over prompts that the conversation has no answer to.

    Raises:
        AssetError: the source cannot be had, or holds no conversations.
        ConfigError: the split has fewer prompts that fit.
        StorageError: the cache cannot be written.
    """
    chosen: dict[tuple[int, ...], Prompt] = {}
    for id, text, answer in _ordered(table(workload), split, seed):
        if len(chosen) == count:
            break
        if answered and not answer:
            continue
        tokens = tuple(encode(text))
        if workload.prompt_tokens is not None:
            if len(tokens) < workload.prompt_tokens:
                continue
            tokens = tokens[: workload.prompt_tokens]
        elif not 0 < len(tokens) <= workload.max_prompt_tokens:
            continue
        chosen.setdefault(tokens, Prompt(id, tokens, answer))
    if len(chosen) < count:
        key = {"fit": "scale.fit_prompts", "bench": "scale.prompts", "quality": "quality.prompts"}[split]
        limit = "max_prompt_tokens" if workload.prompt_tokens is None else "prompt_tokens"
        raise ConfigError(
            f"{key}={count}: must be at most {len(chosen)}, the {split} prompts that workload={workload.name} has "
            f"with workload.{limit}={getattr(workload, limit)}"
        )
    return [*chosen.values()]


def table(workload: Workload) -> Path:
    """The workload's prompts as a JSONL of {"id", "prompt", "answer"}, made once from its source (rule 1 above).

    Raises:
        AssetError: the source cannot be had, or holds no conversations.
        StorageError: the cache cannot be written.
    """
    source = assets.fetch(workload.source, workload.sha256)
    if not source.is_file():
        raise AssetError(f"workload.source={workload.source}: must be one file of ShareGPT conversations")

    def build(folder: Path) -> None:
        with source.open(encoding="utf-8-sig", errors="replace") as file:
            _write_table(conversations(file, workload.source), folder / _TABLE, workload.source)

    return folders.derived("prompts", folders.fingerprint(source, _VERSION), build) / _TABLE


def conversations(file: TextIO, source: str) -> Iterator[dict[str, Any]]:
    """The whole conversations of a JSON array, or of JSONL, in order, in about a block of memory.

    A file that is cut off (the best known copy of ShareGPT is) ends with its last whole conversation.

    Args:
        file: opened as text.
        source: what to call it in an error.

    Raises:
        AssetError: something that is not JSON, or not a conversation, before the end.
    """
    decoder = json.JSONDecoder()
    buffer, index = file.read(_BLOCK).lstrip(), 0
    at = 1 if buffer.startswith("[") else 0
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if buffer.startswith("]", at):
            return
        try:
            record, at = decoder.raw_decode(buffer, at)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - _LONGEST_TOKEN
            if not unfinished:
                raise AssetError(f"{source}: is not JSON after conversation {index}: {error.msg}") from error
            more = file.read(max(_BLOCK, len(buffer)))  # as much again, so that long records stay linear
            if not more:
                return
            buffer, at = buffer[at:] + more, 0
            continue
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise AssetError(f'{source}: item {index} is not {{"id", "conversations": [{{"from", "value"}}, ...]}}')
        index += 1
        yield record


def _write_table(records: Iterator[dict[str, Any]], path: Path, source: str) -> None:
    ids: set[str] = set()
    texts: set[bytes] = set()
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for total, record in enumerate(records, 1):
            id, (text, answer) = str(record.get("id", total - 1)), _first_exchange(record["conversations"])
            digest = hashlib.sha256(text.encode()).digest()
            if not text or id in ids or digest in texts:
                continue
            ids.add(id)
            texts.add(digest)
            file.write(json.dumps({"id": id, "prompt": text, "answer": answer}, ensure_ascii=False) + "\n")
    if not ids:
        raise AssetError(f"{source}: holds {total} whole conversations, and no prompt of a human in them")


def _first_exchange(turns: list[Any]) -> tuple[str, str]:
    """The first human turn that is not blank, and what the assistant says next; blank where there is none."""
    asked = ""
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            continue
        # half a surrogate pair is legal in a JSON escape, and in no tokenizer
        text = str(turn["value"]).encode(errors="replace").decode().strip()
        if not asked and turn.get("from") in ("human", "user"):
            asked = text
        elif asked:
            return asked, text if turn.get("from") in ("gpt", "chatgpt", "assistant") else ""
    return asked, ""


def _ordered(path: Path, split: Split, seed: int) -> list[tuple[str, str, str]]:
    """(id, prompt, answer) of every prompt of a split, in the order of the seed."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    mine = [(row["id"], row["prompt"], row["answer"]) for row in rows if _split_of(row["id"]) == split]
    return sorted(mine, key=lambda row: _hash(f"order:{seed}:{row[0]}"))


def _split_of(id: str) -> Split:
    """By the id less a final ``_<number>``, which counts the parts of one conversation."""
    share = int.from_bytes(_hash(f"split:{re.sub(r'_[0-9]+$', '', id)}")[:8]) / 2**64
    return "fit" if share < 0.6 else "bench" if share < 0.8 else "quality"


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
