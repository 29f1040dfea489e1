"""What jobs leave: the form of ``result.json``, how it is read, and what a reader makes of one."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_origin, get_type_hints

from selfspec.axes import POLICY
from selfspec.config import flatten
from selfspec.errors import UserError, one_line, printable
from selfspec.files import from_json, storing, write_atomic
from selfspec.plan import Plan

VERSION = 1
"""Of the form of ``result.json``."""
FILE = "result.json"

_VERDICTS = {"no": "NO", "lossy": "LOSSY", None: "not checked"}
"""What is said otherwise than it is written."""


class Result(TypedDict):
    """What a job leaves in its ``result.json``.

    ``settings`` are the plan's, nested; ``measurements`` are flat (``bench/tok_s``, ``fit/agreement``, ...)
    and any may be missing. ``acceptance_by_position`` holds accepted / proposed of the first draft token
    of a cycle, the second, and so on.
    """

    version: int
    plan_id: str
    label: str
    name: str
    settings: dict[str, Any]
    measurements: dict[str, float]
    lossless: Literal["yes", "ties", "no", "sampled", "lossy", "reference"] | None
    notes: list[str]
    provenance: dict[str, Any]
    acceptance_by_position: list[float]
    status: str
    """``finished`` or ``failed``."""
    error: str | None


_OPEN = ("lossless", "error")
"""What may be missing."""
_GROUPS = ("draft", "policy", "model", "workload", "scale", "hardware")
_DEPTH, _LARGEST = 12, 1e300


def empty_result(plan: Plan, where: dict[str, Any]) -> Result:
    """The result of a plan that has measured nothing yet; ``where`` is the provenance of what will be."""
    return {
        "version": VERSION,
        "plan_id": plan.id,
        "label": plan.label,
        "name": plan.name,
        "settings": plan.settings(),
        "measurements": {},
        "lossless": None,
        "notes": [],
        "provenance": where,
        "acceptance_by_position": [],
        "status": "finished",
        "error": None,
    }


def failed(plan: Plan, folder: Path, error: BaseException, where: dict[str, Any]) -> None:
    """Leaves a result that says why there is none, unless the job wrote one before it failed."""
    known = read(folder / FILE) if (folder / FILE).exists() else empty_result(plan, where)
    write_result(folder, {**known, "status": "failed", "error": one_line(error)})


def write_result(folder: Path, result: Result) -> None:
    """Writes a job's result into its folder, which is made if need be.

    Raises:
        StorageError: it cannot be written.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, json.dumps(result, indent=1))


def clear(folder: Path) -> None:
    """Removes a result that an earlier job has left in a folder: it would stand for one that dies without a word.

    Raises:
        StorageError: it cannot be removed.
    """
    with storing(folder / FILE):
        (folder / FILE).unlink(missing_ok=True)


def read(path: Path) -> Result:
    """One result file.

    Raises:
        UserError: it cannot be read, is no result, or is one of a newer selfspec.
    """
    try:
        result = _plain(from_json(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    version = result.get("version") if isinstance(result, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path}: has version {version}, made by a newer selfspec; this one reads up to {VERSION}")
    if (wrong := next(_wrong(result), None)) is not None:
        raise UserError(f"{path}: is not a result: {wrong} is missing or of the wrong type")
    return cast(Result, {**dict.fromkeys(_OPEN), **result})


def _wrong(result: Any) -> Iterator[str]:
    """What of a result is not what its readers count on."""
    kinds = {key: get_origin(kind) or kind for key, kind in get_type_hints(Result).items() if key not in _OPEN}
    found = result if isinstance(result, dict) else {}
    yield from (key for key, kind in kinds.items() if not isinstance(found.get(key), kind))
    yield from (key for key in _OPEN if not isinstance(found.get(key), str | None))
    groups = {f"settings.{key}": found["settings"].get(key, {}) for key in _GROUPS}
    groups |= {f"provenance.{key}": found["provenance"].get(key) or {} for key in ("hardware", "extra")}
    yield from (key for key, group in groups.items() if not isinstance(group, dict))
    if not isinstance(groups["settings.scale"].get("repeats", 1), int):
        yield "settings.scale.repeats"
    if not isinstance(groups["settings.policy"].get("name", ""), str):
        yield "settings.policy.name"
    yield from ("notes" for note in found["notes"] if not isinstance(note, str))
    yield from ("acceptance_by_position" for rate in found["acceptance_by_position"] if not _finite(rate))


def _plain(value: Any, depth: int = 0) -> Any:
    """What JSON says, its text fit for a terminal: a result may be anybody's.

    Raises:
        ValueError: it is nested deeper than any result.
    """
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, dict):
        return {printable(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    return printable(value) if isinstance(value, str) else value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST  # which NaN is not


def find(folder: Path) -> list[Result]:
    """Every result at or below ``folder``, in the order of their paths (job 2 before job 10).

    Raises:
        UserError: no such folder, no result in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(folder.rglob(FILE), key=lambda path: [_natural(part) for part in path.parts])
    if not paths:
        raise UserError(f"{folder}: holds no {FILE}")
    return [read(path) for path in paths]


def distinct(results: Iterable[Result]) -> list[Result]:
    """One result a plan, in the order of first appearance: the latest that finished, else the latest."""
    chosen: dict[str, Result] = {}
    for result in results:
        earlier = chosen.get(result["plan_id"])
        if earlier is None or result["status"] == "finished" or earlier["status"] != "finished":
            chosen[result["plan_id"]] = result
    return list(chosen.values())


def speedup(folder: Path) -> float | None:
    """Of the job whose folder this is: what sweepers are told; ``None`` where it has come to none."""
    path = folder / FILE
    return value(read(path), "bench/speedup") if path.exists() else None


def value(result: Result, key: str) -> float | None:
    """A measurement, or ``None`` where it is missing or not a finite number."""
    found = result["measurements"].get(key)
    return found if _finite(found) else None


def curve(result: Result) -> dict[int, dict[str, float]]:
    """What the fit stage foretold of every exit layer it chose from, by layer; empty where it did not choose."""
    found: dict[int, dict[str, float]] = {}
    for key, told in result["measurements"].items():
        if match := re.fullmatch(r"fit/exits/(\d+)/(\w+)", key):
            found.setdefault(int(match[1]), {})[match[2]] = told
    return dict(sorted(found.items()))


def number(result: Result, key: str, form: str) -> str:
    """A measurement in ``form``, or a dash."""
    found = value(result, key)
    return "-" if found is None else format(found, form)


def interval(result: Result, key: str, form: str, unit: str = "") -> str:
    """A measurement in ``form`` with its 95% interval, as far as there is one, or a dash."""
    middle, low, high = (value(result, key + end) for end in ("", "_low", "_high"))
    if middle is None:
        return "-"
    if low is None or high is None:
        return f"{middle:{form}}{unit}"
    return f"{middle:{form}}{unit} [{low:{form}}, {high:{form}}]"


def lossy(result: Result) -> bool:
    """Whether the tokens are not those of plain decoding, by design or by mistake."""
    drafts = result["settings"].get("draft", {}).get("name", "none") != "none"
    policy = result["settings"].get("policy", {})
    option = POLICY.options.get(policy.get("name", "longest_prefix"))
    relaxed = not policy.get("verify", True) or option is None or option.lossy
    return result["lossless"] in ("lossy", "no") or (drafts and relaxed)


def verdict(result: Result) -> str:
    """Whether it is lossless, in a word: ``yes``, ``ties (3)``, ``NO``, ``LOSSY``, ``FAILED``, ..."""
    if result["status"] == "failed":
        return "FAILED"
    if lossy(result) and result["lossless"] != "no":
        return "LOSSY"
    ties = value(result, "bench/ties")
    if result["lossless"] == "ties" and ties is not None:
        return f"ties ({ties:g})"
    return _VERDICTS.get(result["lossless"], str(result["lossless"]))


def labels(rows: Sequence[Result]) -> list[str]:
    """Labels, with what tells apart those that share one."""
    alike: dict[str, list[Result]] = {}
    for row in rows:
        alike.setdefault(row["label"], []).append(row)
    differing = {label: varying(those) if len(those) > 1 else [] for label, those in alike.items()}
    made = []
    for row in rows:
        label = row["label"]
        if len(alike[label]) > 1:
            own = flatten(row["settings"])
            label += f" ({', '.join(f'{key}={own.get(key)}' for key in differing[label]) or row['plan_id']})"
        made.append(label)
    return made


def varying(rows: Sequence[Result]) -> list[str]:
    """The settings, keys joined with dots, that are not the same in all rows."""
    settings = [flatten(row["settings"]) for row in rows]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1]


def setup(row: Result) -> str:
    """What a row was measured on, such as ``SmolLM2 on EPYC (2 cores), device=cpu, 16 prompts x 96 tokens``."""
    settings, machine = row["settings"], row["provenance"].get("hardware") or {}
    group: dict[str, dict[str, Any]] = {
        key: settings.get(key) or {} for key in ("model", "workload", "scale", "hardware")
    }
    where = row["provenance"].get("extra") or {
        key: group["hardware"].get(key) for key in ("device", "dtype", "threads")
    }
    parts = [f"{group['model'].get('name', 'model')} on {machine.get('cpu', group['hardware'].get('name', 'unknown'))}"]
    if "physical_cores" in machine:
        parts[0] += f" ({machine['physical_cores']} cores)"
    parts += [f"{key}={known}" for key, known in flatten(where).items() if known is not None]
    turns = group["workload"].get("turns", 1)
    asked = f"{group['scale'].get('prompts', '?')} prompts" + (f" x {turns} turns" if turns > 1 else "")
    work = f"{asked} x {group['workload'].get('new_tokens', '?')} tokens"
    if sets := group["workload"].get("parts"):
        work = f"{len(sets)} sets of {work}"
    if group["scale"].get("repeats", 1) > 1:
        work += f" x {group['scale']['repeats']} repeats"
    return ", ".join([*parts, f"{work} ({group['workload'].get('name', 'workload')})"])


def _natural(words: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", words)]
