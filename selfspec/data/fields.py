"""Records of no known format: a template says what is asked, and fields say which are meant."""

import re
from collections.abc import Mapping
from typing import Any

from selfspec.data import formats
from selfspec.data.formats import Exchange, Malformed

_FIELD = re.compile(r"\{([\w.]+)\}")


def exchange(record: Any, template: str | None) -> Exchange:
    """What a record asks: by a template such as ``{doc.title}: {doc.question}``; without one, by its format.

    A list is its items, a line each; what stands in a record is never a template itself.

    Raises:
        Malformed: it lacks a field, or is of no known format.
    """
    if template is None:
        return formats.exchange(record)
    asked = _FIELD.sub(lambda found: "\n".join(_lines(found[1], _field(record, found[1]))), template)
    return Exchange(None, asked.encode(errors="replace").decode().strip())


def matches(record: Any, where: Mapping[str, Any]) -> bool:
    """Whether its fields have these values, or one of these where a list of them is given.

    Raises:
        Malformed: it lacks a field.
    """
    wanted = ((path, value if isinstance(value, list) else [value]) for path, value in where.items())
    return all(_field(record, path) in values for path, values in wanted)


def _field(record: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(record, Mapping) or key not in record:
            raise Malformed(f"has no {path}")
        record = record[key]
    return record


def _lines(path: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [line for item in value for line in _lines(path, item)]
    if not isinstance(value, str | int | float):
        raise Malformed(f"{path}: must be a text, a number or a list of them")
    return [str(value)]
