"""Tokens become text in pieces: together they are the whole, and no stop text shows, wherever the pieces end."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfspec.serve.text import Detokenizer, Stops


def by_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def by_words(tokens: Sequence[int]) -> str:
    """As word-level tokenizers: spaces between words, and special tokens (0) left out."""
    return " ".join(f"w{token}" for token in tokens if token)


def pieces(decode: "type[str] | object", tokens: Sequence[int]) -> list[str]:
    made = Detokenizer(decode)  # type: ignore[arg-type]
    return [*(made.push(token) for token in tokens), made.flush()]


@given(st.text())
def test_characters_come_whole(text: str) -> None:
    got = pieces(by_bytes, text.encode())
    assert "".join(got) == text
    assert all(piece == "" or piece in text for piece in got)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_characters(data: bytes) -> None:
    got = pieces(by_bytes, data)
    assert "".join(got) == by_bytes(data)
    "".join(got).encode()  # raises for half a surrogate pair


@given(st.lists(st.integers(0, 9), max_size=30))
def test_words_keep_their_spaces(tokens: list[int]) -> None:
    assert "".join(pieces(by_words, tokens)) == by_words(tokens)


def test_a_character_waits_for_its_last_byte() -> None:
    assert pieces(by_bytes, "a€b".encode()) == ["a", "", "", "€", "b", ""]
    assert pieces(by_bytes, "a€".encode()[:-1]) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("stops", "said", "shown"),
    [
        (["END"], ["a", "E", "N", "D", "b"], ["a", "", "", "", "", ""]),
        (["END"], ["a", "E", "N", "d"], ["a", "", "", "ENd", ""]),
        (["END"], ["a", "EN"], ["a", "", "EN"]),
        (["aab"], ["a", "a", "a", "b", "c"], ["", "", "a", "", "", ""]),
        (["\n\n"], ["x\n", "\ny"], ["x", "", ""]),
        (["b", "abc"], ["ab", "c"], ["a", "", ""]),
        (["b", "ab"], ["xab"], ["x", ""]),
        ([], ["a", "b"], ["a", "b", ""]),
    ],
)
def test_what_may_be_a_stop_is_held_back(stops: list[str], said: list[str], shown: list[str]) -> None:
    made = Stops(stops)
    assert [*(made.push(text) for text in said), made.flush()] == shown


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_pieces_do_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    said = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    made = Stops(stops)
    shown = "".join([*(made.push(piece) for piece in said), made.flush()])
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert made.hit == bool(ends)
