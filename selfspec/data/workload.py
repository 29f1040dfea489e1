"""Prompts: which conversations of a file, in which order, cut to which length.

How a file is read is told in ``records.py``, what of a record is the prompt in ``formats.py``. The rule, all of it:

1. *The prompt* of a conversation is its first human turn that is not blank, stripped; *the answer* is the
   assistant's next turn, stripped, where there is one. Of conversations with one id, and of prompts with one
   text, only the first in the file stands; how many do not is said when the file is read.
2. *The split* is fixed by a hash of the id's stem, whatever the seed: 60% fit, 20% bench, 20% quality. ShareGPT
   cuts long conversations into parts ``abc_0``, ``abc_47``, ...; the stem ``abc`` keeps them together. A stem that
   more than 20 prompts and a twentieth of all have (``train_0``, ``train_1``, ...) numbers the file instead, and its
   ids count whole. With rule 1, neither a conversation nor a text is in two splits.
3. *The order* within a split is that of a hash of seed and id. Prompts that fit are taken in that order, so the
   first n are the same whatever count is asked for.
4. *Fitting*: with ``prompt_tokens=P`` a prompt of at least P tokens, cut to its first P; else one of at most
   ``max_prompt_tokens``. Of prompts that are equal once cut, the first stands. Where several turns are asked for, a
   conversation has as many, and none of what is asked in it is longer.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from selfspec.data import assets, fields, folders, formats, records
from selfspec.data.config import Prompts, Workload
from selfspec.data.records import note
from selfspec.errors import AssetError, ConfigError
from selfspec.types import Prompt

Split = Literal["fit", "bench", "quality"]
SPLITS: tuple[Split, ...] = get_args(Split)

_VERSION = 4
"""Raise it when the same file would give other prompts: the old table is then not taken."""
_TABLE = "prompts.jsonl"
_MOST_PARTS, _MOST_SHARE = 20, 0.05
"""A stem that more prompts have, and a larger share of them, is not a conversation's."""
_NOTHING, _SAME_ID, _SAME_TEXT = "without a prompt of a human", "with an id there before", "with a prompt there before"
_SYSTEM, _LATER = "system messages", "later turns (workload.turns asks them)"


def select(
    workload: Workload,
    split: Split | None,
    count: int,
    seed: int,
    encode: Callable[[str], Sequence[int]],
    answered: bool = False,
    turns: int = 1,
) -> list[Prompt]:
    """The first ``count`` prompts of a split that fit, by the rule at the head of this module.

    Args:
        workload: where the prompts are, and how long they may be.
        split: ``fit`` (heads are fitted on these), ``bench`` or ``quality``; ``None``: all there are.
        count: how many.
        seed: another seed is another order, and never moves a prompt to another split.
        encode: text -> token ids, chat template included where asked for; called only as often as needed.
        answered: pass over prompts that the conversation has no answer to.
        turns: pass over conversations in which less often something is asked.

    Raises:
        AssetError: the source cannot be had or read, or holds no prompts.
        ConfigError: the split has fewer prompts that fit.
        StorageError: the cache cannot be written.
    """
    chosen: dict[tuple[int, ...], Prompt] = {}
    rows, total = _ordered(table(workload), split, seed)
    for id, answer, *asked in rows:
        if len(chosen) == count:
            break
        if (answered and not answer) or len(asked) < turns:
            continue
        tokens, *later = (tuple(encode(text)) for text in asked[:turns])
        if workload.prompt_tokens is not None:
            if len(tokens) < workload.prompt_tokens:
                continue
            tokens = tokens[: workload.prompt_tokens]
        elif not all(0 < len(each) <= workload.max_prompt_tokens for each in (tokens, *later)):
            continue
        chosen.setdefault(tokens, Prompt(id, tokens, answer, tuple(asked[:turns])))
    if len(chosen) < count:
        limit = "max_prompt_tokens" if workload.prompt_tokens is None else "prompt_tokens"
        keys = {"fit": "scale.fit_prompts", "bench": "scale.prompts", "quality": "quality.prompts"}
        key = keys[split] if split else f"workload.parts.{workload.name}.prompts"
        raise ConfigError(
            f"{key}={count}: must be at most {len(chosen)}, the {split or 'distinct'} prompts that "
            f"workload={workload.name} has with workload.{limit}={getattr(workload, limit)}"
            f"{f' and workload.turns={turns}' if turns > 1 else ''}; "
            f"{len(rows)} of its {total} prompts are {'in that split' if split else 'distinct'}"
        )
    return [*chosen.values()]


def table(workload: Prompts) -> Path:
    """The workload's prompts as a JSONL of {"id", "prompt", "answer", "later"}, made once from its source (rule 1).

    Raises:
        AssetError: the source cannot be had or read, or holds no prompts.
        StorageError: the cache cannot be written.
    """
    source = assets.fetch(workload.source, workload.sha256)
    if not source.is_file():
        raise AssetError(f"workload.source={workload.source}: must be one file of prompts")

    def build(folder: Path) -> None:
        _write_table(records.read(source, workload.source), folder / _TABLE, workload)

    asked = [workload.prompt, workload.where] if workload.prompt or workload.where else []
    return folders.derived("prompts", folders.fingerprint(source, _VERSION, *asked), build) / _TABLE


def _write_table(found: Iterator[tuple[str, Any]], path: Path, workload: Prompts) -> None:
    source = workload.source
    ids: dict[str, bool] = {}  # with whether the record itself has it
    texts: set[bytes] = set()
    left: Counter[str] = Counter()
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for total, (where, record) in enumerate(found, 1):
            try:
                if not fields.matches(record, workload.where):
                    continue
                read = fields.exchange(record, workload.prompt)
            except formats.Malformed as error:
                raise AssetError(f"{source}, {where}: {error}") from error
            id, digest = read.id or str(total - 1), hashlib.sha256(read.prompt.encode()).digest()
            if id in ids and not (ids[id] and read.id):  # a count and a name that are alike are not one conversation
                id = next(other for n in count(total) if (other := f"{id}.{n}") not in ids)
            if not read.prompt or id in ids or digest in texts:
                left[_NOTHING if not read.prompt else _SAME_ID if id in ids else _SAME_TEXT] += 1
                continue
            ids[id] = read.id is not None
            texts.add(digest)
            left[_SYSTEM] += read.system
            left[_LATER] += len(read.later)
            row = {"id": id, "prompt": read.prompt, "answer": read.answer, "later": read.later}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not ids:
        raise AssetError(f"{source}: holds {total} whole conversations, and no prompt of a human in them")
    if said := ", ".join(f"{n} {what}" for what, n in left.items() if n):
        note(source, f"{len(ids)} prompts of {total} conversations; left out: {said}")


def _ordered(path: Path, split: Split | None, seed: int) -> tuple[list[tuple[str, ...]], int]:
    """(id, answer, prompt, *later) of a split, or of all, in the order of the seed; and how many there are in all."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    parts = _stems(row["id"] for row in rows)
    mine = [
        (row["id"], row["answer"], row["prompt"], *row["later"])
        for row in rows
        if split in (None, _split_of(row["id"], parts))
    ]
    return sorted(mine, key=lambda row: _hash(f"order:{seed}:{row[0]}")), len(rows)


def _stem(id: str) -> str:
    """An id less a final ``_<number>``, which counts the parts of one conversation."""
    return re.sub(r"_[0-9]+$", "", id)


def _stems(ids: Iterable[str]) -> frozenset[str]:
    """The stems that number no conversation's parts but the file: too many prompts have them (``train_0``, ...)."""
    counts = Counter(map(_stem, ids))
    most = max(_MOST_PARTS, counts.total() * _MOST_SHARE)
    return frozenset(stem for stem, number in counts.items() if number > most)


def _split_of(id: str, numbering: Collection[str] = ()) -> Split:
    """By the stem of the id, which keeps the parts of a conversation together."""
    stem = _stem(id)
    share = int.from_bytes(_hash(f"split:{id if stem in numbering else stem}")[:8]) / 2**64
    return "fit" if share < 0.6 else "bench" if share < 0.8 else "quality"


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
