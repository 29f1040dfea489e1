"""The formats people keep prompts in: each is read, and what cannot be read names the line and what was expected."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from selfspec.data import formats, records
from selfspec.data.config import Workload
from selfspec.data.workload import SPLITS, select, table
from selfspec.errors import AssetError, ConfigError

Make = Callable[..., Workload]
USER, SAYS = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
FORMATS: dict[str, tuple[Any, tuple[str | None, str, str]]] = {
    "sharegpt": (
        {"id": "a", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        ("a", "Why?", "So."),
    ),
    "role_content": ({"id": 0, "conversations": [USER, SAYS]}, ("0", "Why?", "So.")),
    "messages": ({"messages": [USER, SAYS, USER, SAYS]}, (None, "Why?", "So.")),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, (None, "Why?", "")),
    "batch": ({"custom_id": "r1", "method": "POST", "body": {"messages": [USER]}}, ("r1", "Why?", "")),
    "batch_prompt": ({"custom_id": "r1", "body": {"prompt": "Why?"}}, ("r1", "Why?", "")),
    "prompt": ({"prompt": " Why? "}, (None, "Why?", "")),
    "prompt_completion": ({"prompt": "Why?", "completion": "So."}, (None, "Why?", "So.")),
    "prompt_messages": ({"prompt": [USER], "id": None}, (None, "Why?", "")),
    "alpaca": ({"instruction": "Why?", "input": "", "output": "So."}, (None, "Why?", "So.")),
    "alpaca_input": ({"instruction": "Why", "input": "this?", "output": "So."}, (None, "Why\n\nthis?", "So.")),
    "spec_bench": ({"question_id": 81, "turns": ["Why?", "And then?"]}, ("81", "Why?", "")),
    "text": ("Why?", (None, "Why?", "")),
}
MALFORMED = [
    ({"text": "x"}, "has the keys 'text'; must have 'conversations' .ShareGPT."),
    ({}, "has the keys of an empty object"),
    ([["x"]], "is a list; must be an object"),
    (None, "is null; must be an object"),
    ({"messages": "x"}, "messages: is a text; must be a list of turns"),
    ({"messages": [{"text": "x"}]}, "messages: has no turn with a text"),
    ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]: is a number; must be a text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        r".*a part of type 'image_url'; must be texts",
    ),
    ({"body": {"input": "x"}}, "body: must be an object with 'messages' or 'prompt'"),
    ({"turns": []}, "turns: must be a list of texts"),
    ({"turns": [3]}, r"turns\[0\]: is a number"),
    ({"prompt": ["x"]}, "prompt: is a list; must be a text"),
    ({"id": ["a"], "prompt": "x"}, "id: is a list; must be a text or a number"),
]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A workload of a file of the given bytes."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))

    def make(content: bytes | str, name: str = "data.jsonl") -> Workload:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Workload(name="test", source=f"file:{path}")

    return make


def prompts(workload: Workload) -> dict[str, str]:
    rows = [json.loads(line) for line in table(workload).read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row["prompt"] for row in rows}


def asks(n: int, **more: object) -> list[dict[str, object]]:
    return [{"prompt": f"Question {i}?", **more} for i in range(n)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_what_is_asked(name: str) -> None:
    record, expected = FORMATS[name]
    found = formats.exchange(record)
    assert (found.id, found.prompt, found.answer) == expected


@pytest.mark.parametrize(("record", "says"), MALFORMED)
def test_what_is_no_format_names_its_line_and_what_was_expected(record: Any, says: str, make: Make) -> None:
    with pytest.raises(AssetError, match=f"^file:.*, line 3: {says}") as error:
        table(make(jsonl([*asks(2), record])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["array", "indented", "jsonl", "two_arrays", "gzip", "parquet", "text", "crlf"])
def test_every_layout_gives_every_prompt(layout: str, make: Make, tmp_path: Path) -> None:
    rows = asks(40)
    if layout == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet")
        workload = make((tmp_path / "made.parquet").read_bytes(), "any")
    elif layout == "text":
        workload = make("\n\n".join(str(row["prompt"]) for row in rows), "asked.txt")
    else:
        texts = {
            "array": json.dumps(rows),
            "indented": json.dumps(rows, indent=2),
            "two_arrays": json.dumps(rows[:20]) + "\n" + json.dumps(rows[20:]),
            "crlf": "\ufeff" + jsonl(rows).replace("\n", "\r\n"),
        }
        text = texts.get(layout, jsonl(rows)).encode()
        workload = make(gzip.compress(text, mtime=0) if layout == "gzip" else text)
    assert [*prompts(workload).values()] == [row["prompt"] for row in rows]


@pytest.mark.parametrize("id", [None, float("nan"), "", " "])
def test_an_id_that_says_nothing_is_missing(id: object, make: Make) -> None:
    assert [*prompts(make(jsonl(asks(60, id=id))))] == [str(n) for n in range(60)]


def test_a_count_is_no_ones_id(make: Make) -> None:
    rows: list[dict[str, object]] = [
        {"id": "1", "prompt": "a"},
        {"prompt": "b"},
        {"prompt": "c"},
        {"id": 2, "prompt": "d"},
    ]
    assert [*prompts(make(jsonl(rows))).values()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("ids", ["train_{n}", "{half}_{n}"])
def test_ids_that_number_the_file_are_split(ids: str, make: Make) -> None:
    rows = [{"id": ids.format(n=n, half=n % 2), "prompt": f"Question {n}?"} for n in range(300)]
    workload = make(jsonl(rows))
    assert all(len(select(workload, split, 40, 0, lambda text: [*text.encode()])) == 40 for split in SPLITS)


def test_too_few_in_a_split_says_why(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"scale\.prompts=9: must be at most \d, .*; \d of its 5 prompts are in that"):
        select(make(jsonl(asks(5))), "bench", 9, 0, lambda text: [*text.encode()])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (jsonl(asks(2)).encode() + '{"prompt": "Où?"}\n'.encode("latin-1"), "line 3: byte 0xf9 is not UTF-8; must be"),
        (gzip.compress('\n{"prompt": "Où?"}'.encode("latin-1"), mtime=0), "line 2: byte 0xf9 is not UTF-8"),
        (jsonl(asks(2)).encode("utf-16"), "line 1: is UTF-16; must be"),
        (jsonl(asks(2)) + '{"m":' + "[" * 100_000, "line 3: .*: nested too deeply"),
        (jsonl(asks(2)) + "[1" + "0" * 5000 + "]", "line 3: .*: Exceeds the limit"),
        (json.dumps(asks(2)) + " and more", "line 1: is not JSON after conversation 2"),
        (jsonl(asks(2)) + "{'prompt': 1}", "line 3: is not JSON after conversation 2: Expecting property name"),
        (gzip.compress(jsonl(asks(90)).encode(), mtime=0)[:-20], "is a damaged gzip file"),
        (b"PAR1 and nothing that is one", "is a damaged Parquet file"),
        (b"\xff\xfe", "line 1: is UTF-16"),
    ],
)
def test_what_cannot_be_read_is_one_line(content: bytes | str, says: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=f"^file:.*{says}") as error:
        table(make(content))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "derived").glob("prompts*[!k]")), "nothing half-written"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(asks(9))[:-9], "is cut off at its end, in line 1, after 8 whole conversations"),
        (jsonl(asks(9))[:-9], "is cut off at its end, in line 9, after 8 whole conversations"),
        (jsonl([*asks(2), {"prompt": " "}]), "2 prompts of 3 conversations; left out: 1 without a prompt of a human"),
        (jsonl([*asks(2), *asks(1)]), "left out: 1 with a prompt there before"),
        (jsonl([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}]), "left out: 1 with an id there before"),
        (jsonl([{"messages": [{"role": "system", "content": "Be brief."}, USER]}]), "left out: 1 system messages"),
        (jsonl([{"turns": ["a", "b", "c"]}]), "left out: 2 later turns"),
    ],
)
def test_what_is_left_out_is_said(text: str, says: str, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    table(make(text))
    assert f"{says}\n" in capsys.readouterr().err


_KEYS = [
    "id",
    "conversations",
    "messages",
    "body",
    "turns",
    "instruction",
    "prompt",
    "role",
    "content",
    "from",
    "value",
]
_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(_values)
def test_any_record_is_read_or_refused(record: Any) -> None:
    try:
        assert isinstance(formats.exchange(record).prompt, str)
    except formats.Malformed as error:
        assert "\n" not in str(error)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=60) | st.lists(_values, max_size=3).map(lambda rows: json.dumps(rows).encode()),
    st.integers(0, 40),
)
@example(b"\x1f\x8b", 0)
@example(b"PAR1", 0)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, cut: int) -> None:
    path = tmp_path_factory.mktemp("any") / "data"
    path.write_bytes(content[: len(content) - cut] if cut % 2 else content)
    try:
        for where, _ in records.read(path, "test"):
            assert where
    except AssetError as error:
        assert "\n" not in str(error) and str(error).startswith("test")


def test_lines_of_a_text() -> None:
    assert [*records.lines(io.StringIO("a\n\n b \n"))] == [("line 1", "a"), ("line 3", "b")]
