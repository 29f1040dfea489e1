"""What a bench asks: the workload's own prompts, or several sets of prompts, each of which is reported by itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from selfspec.data import workload as prompts
from selfspec.data.config import Part, Workload
from selfspec.types import Prompt


def select(workload: Workload, count: int, seed: int, encode: Callable[[str], Sequence[int]]) -> list[Prompt]:
    """The bench's prompts: ``count`` of its split; of a workload of parts, so many of each, or all that one has.

    Of a part the whole set is drawn from, in the order of the seed: nothing is fitted on it. Ids then begin with its
    name: ``gsm8k/17``.

    Raises:
        AssetError, ConfigError, StorageError: as :func:`selfspec.data.workload.select`.
    """
    if not workload.parts:
        return prompts.select(workload, "bench", count, seed, encode, turns=workload.turns)
    return [
        replace(prompt, id=f"{name}/{prompt.id}")
        for name, part in workload.parts.items()
        for prompt in prompts.select(
            _alone(workload, name, part), None, min(count, part.prompts), seed, encode, turns=workload.turns
        )
    ]


def chunks(workload: Workload, count: int, size: int) -> list[slice]:
    """Which of these prompts are decoded at once: up to ``size``, all of one part."""
    sizes = [min(count, part.prompts) for part in workload.parts.values()] or [count]
    begins = accumulate(sizes, initial=0)
    return [
        slice(at, min(at + size, begin + own))
        for begin, own in zip(begins, sizes, strict=False)
        for at in range(begin, begin + own, size)
    ]


def grouped(workload: Workload, units: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """A bench's units by part; none where a workload is one set of prompts."""
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in workload.parts}
    for unit in units if found else ():
        found[name_of(unit["prompts"][0])].append(unit)
    return {name: own for name, own in found.items() if own}


def notes(workload: Workload, count: int) -> list[str]:
    """Which parts have fewer prompts than were asked for."""
    fewer = [f"{name} ({part.prompts})" for name, part in workload.parts.items() if part.prompts < count]
    return [f"fewer than {count} prompts, as there are no more: {', '.join(fewer)}"] if fewer else []


def name_of(prompt: str) -> str:
    """The part's, of a prompt's id."""
    return prompt.partition("/")[0]


def _alone(workload: Workload, name: str, part: Part) -> Workload:
    """A part as a workload of its own."""
    taken = {key: getattr(part, key) for key in ("source", "sha256", "prompt", "where", "max_prompt_tokens")}
    return replace(workload, name=name, parts={}, **taken)
