"""The cache: what is given again, to whom, how long; and what never is."""

import asyncio
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import planned
from serving import Clock, serving

from selfspec.serve.backend import Call, Chunk, TokenLogprob, Usage
from selfspec.serve.cache import AnswerCache
from selfspec.serve.config import CacheConfig, CacheMode
from selfspec.serve.words import normalise

ANSWER = (Chunk("It is ", 2, [TokenLogprob("It", -0.5)]), Chunk("so.", 1, None, "stop", Usage(3, 3), {"cycles": 2}))


def asking(text: str, **fields: Any) -> Call:
    call = Call("c1", "m", messages=({"role": "user", "content": text},), max_tokens=8, temperature=0.0)
    return replace(call, **fields)


CALL = asking("How tall is the tower?")


def cache(mode: CacheMode = CacheMode.same_words, clock: Clock | None = None, **settings: Any) -> AnswerCache:
    return AnswerCache(CacheConfig(mode=mode, **settings), clock or Clock())


def kept(made: AnswerCache, *calls: Call) -> AnswerCache:
    for call in calls:
        asyncio.run(made.keep(call, ANSWER))
    return made


def found(made: AnswerCache, call: Call) -> str | None:
    hit = asyncio.run(made.find(call))
    return None if hit is None else hit.result


def test_the_same_call_gets_the_same_answer() -> None:
    hit = asyncio.run(kept(cache(), CALL).find(replace(CALL, id="c2", stats=True)))
    assert hit is not None and hit.result == "exact"
    assert [chunk.text for chunk in hit.chunks] == ["It is ", "so."]
    assert hit.chunks[0].logprobs == [TokenLogprob("It", -0.5)]
    assert hit.chunks[-1].usage == Usage(3, 3) and hit.chunks[-1].stats is None  # another call's statistics


@pytest.mark.parametrize(
    "other",
    [
        {"key": "bob"},
        {"key": None},
        {"model": "n"},
        {"max_tokens": 9},
        {"max_tokens": None},
        {"stop": ("x",)},
        {"logprobs": 0},
        {"ignore_eos": True},
        {"temperature": 0.5},
        {
            "messages": (
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "How tall is the tower?"},
            )
        },
        {"messages": ({"role": "assistant", "content": "How tall is the tower?"},)},
        {"messages": None, "prompt": "How tall is the tower?"},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", [CacheMode.exact, CacheMode.same_words])
def test_nothing_is_shared_across_keys_and_what_changes_the_answer(other: dict[str, Any], mode: CacheMode) -> None:
    made = kept(cache(mode), replace(CALL, key="alice"))
    assert found(made, replace(CALL, key="alice")) == "exact"
    assert found(made, replace(CALL, key="alice") if not other else replace(CALL, **{"key": "alice", **other})) is None


def test_what_does_not_change_a_greedy_answer_is_no_part_of_it() -> None:
    made = kept(cache(), CALL)
    assert found(made, replace(CALL, seed=3, top_p=0.5, top_k=4)) == "exact"


def test_a_drawn_answer_is_given_again_only_by_its_seed_and_to_the_same_call() -> None:
    drawn = replace(CALL, temperature=0.7)
    assert len(kept(cache(), drawn)) == 0
    made = kept(cache(), replace(drawn, seed=3))
    assert found(made, replace(drawn, seed=3)) == "exact"
    assert found(made, replace(drawn, seed=4)) is None and found(made, drawn) is None
    assert found(made, asking("how tall is the tower", temperature=0.7, seed=3)) is None


def test_who_opts_out_neither_gives_nor_takes() -> None:
    assert found(kept(cache(), CALL), replace(CALL, cache=False)) is None
    assert len(kept(cache(), replace(CALL, cache=False))) == 0


def test_a_broken_answer_is_not_kept() -> None:
    made = cache()
    asyncio.run(made.keep(CALL, ANSWER[:1]))
    asyncio.run(made.keep(CALL, ()))
    assert len(made) == 0


SAME = [
    "how tall is the tower",
    "  How tall   is the tower ?",
    "Please how tall is a tower?",
    "How tall is the tower? Thanks!",
    "Hello! HOW tall is the 'tower'",
]
OTHER = [
    "How tall is the tower not?",
    "How old is the tower?",
    "tower the is tall How?",
    "How tall is the tower 2?",
    "How tall is the",
    "How tall are the towers?",
    "",
    "?!",
]


def test_another_wording_with_the_same_words_is_answered() -> None:
    made = kept(cache(), CALL)
    assert [found(made, asking(text)) for text in SAME] == ["same_words"] * len(SAME)
    assert [found(made, asking(text)) for text in OTHER] == [None] * len(OTHER)
    strict = kept(cache(mode=CacheMode.exact), CALL)
    assert [found(strict, asking(text)) for text in SAME] == [None] * len(SAME)


def test_where_nothing_is_said_only_the_same_call_will_do() -> None:
    made = kept(cache(), asking("?!"), asking("the"))
    assert (
        found(made, asking("?!")) == "exact" and found(made, asking("...")) is None and found(made, asking("")) is None
    )
    image = replace(CALL, messages=({"role": "user", "content": [{"type": "text", "text": "How tall?"}]},))
    assert found(kept(made, image), image) == "exact"


def test_of_two_in_the_same_words_the_last_answer_is_given() -> None:
    made = kept(cache(entries=2), CALL, asking(SAME[0]))
    assert found(made, asking(SAME[1])) == "same_words"
    kept(made, asking("one"), asking("two"))
    assert found(made, asking(SAME[1])) is None and not set(made._worded.values()) - set(made._entries)


def test_what_comes_before_the_last_message_must_be_equal() -> None:
    """Also where it means the same: earlier turns are not compared."""

    def talk(first: str, last: str) -> Call:
        said = [{"role": "user", "content": first}, {"role": "assistant", "content": "Yes."}]
        return asking("", messages=(*said, {"role": "user", "content": last}))

    made = kept(cache(), talk("Is it tall?", "How tall?"))
    assert found(made, talk("Is it tall?", "how tall")) == "same_words"
    assert found(made, talk("is it tall", "how tall")) is None


def test_a_text_to_go_on_from_is_only_ever_matched_exactly() -> None:
    text = replace(CALL, messages=None, prompt="The cat sat on the")
    made = kept(cache(), text)
    assert found(made, text) == "exact" and found(made, replace(text, prompt="The cat sat on a")) is None
    ids = replace(CALL, messages=None, prompt=(1, 2, 3))
    assert found(kept(made, ids), ids) == "exact" and found(made, replace(ids, prompt=(1, 2, 4))) is None


def test_answers_grow_old() -> None:
    clock = Clock()
    made = kept(cache(clock=clock, ttl_s=10.0), CALL)
    clock.now = 9.9
    assert found(made, CALL) == "exact" and found(made, asking(SAME[0])) == "same_words"
    clock.now = 10.0
    assert found(made, asking(SAME[0])) is None and found(made, CALL) is None
    assert len(made) == 0 and not made._worded


def test_the_one_unused_for_longest_goes_first() -> None:
    made = kept(cache(entries=2), asking("one"), asking("two"))
    assert found(made, asking("one")) == "exact"
    kept(made, asking("three"))
    assert [found(made, asking(text)) for text in ("one", "two", "three")] == ["exact", None, "exact"]


@settings(max_examples=60, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["find", "keep", "wait"]), st.integers(0, 5), st.sampled_from([None, "a", "b"])),
        max_size=40,
    ),
    st.integers(1, 4),
)
def test_it_is_an_lru_with_an_expiry_whatever_happens(events: list[tuple[str, int, str | None]], entries: int) -> None:
    """Against a model of it, a few lines long; and its two tables never disagree."""
    clock = Clock()
    made, model = (
        cache(CacheMode.same_words, clock, entries=entries, ttl_s=5.0),
        OrderedDict[tuple[int, str | None], float](),
    )
    for what, number, key in events:
        clock.now += 2.0 if what == "wait" else 0.0
        call, name = asking(f"number {number}", key=key), (number, key)
        if what == "keep":
            kept(made, call)
            model.pop(name, None)
            model[name] = clock.now + 5.0
            while len(model) > entries:
                model.popitem(last=False)
        elif what == "find":
            alive = model.get(name, -1.0) > clock.now
            if alive:
                model.move_to_end(name)
            else:
                model.pop(name, None)
            assert (found(made, call) == "exact") == alive
        assert len(made) == len(model) <= entries and set(made._worded.values()) == set(made._entries)


@given(st.text(max_size=60))
def test_case_spacing_and_punctuation_do_not_count(text: str) -> None:
    assert normalise(f"  {text}\n ") == normalise(text) and set(normalise(text)).isdisjoint("?!,.;: ")


@pytest.mark.parametrize(
    ("one", "two", "agree"),
    [
        ("Can you please list five cats?", "List five cats.", True),
        ("I want you to act as a pirate", "act as the pirate", True),
        ("List five cat", "list five cats", False),
        ("Can you swim?", "Swim?", False),
        ("How do you say thanks", "How do you say please", False),
        ("hello world program", "world program", False),
        ("Is 3.5 > 2?", "Is 3.5 < 2?", False),
        ("Is it 3.5?", "Is it 35?", False),
        ("I can go", "I cannot go", False),
        ("translate French to German", "translate German to French", False),
        ("cheapest flight", "dearest flight", False),
        ("import", "export", False),
        ("Please", "Thanks", False),
    ],
)
def test_which_texts_have_the_same_words(one: str, two: str, agree: bool) -> None:
    assert (normalise(one) == normalise(two)) is agree


def test_over_http_on_a_tiny_model(overrides: list[str]) -> None:
    """The header opts out; hits are counted, and say so; nobody is given what another was told."""
    from openai import OpenAI

    limits = ("serve.max_model_len=128", "serve.max_prompt_tokens=64", "serve.max_tokens=32")
    plan = planned(*overrides, "draft=none", "serve.cache.mode=same_words", *limits)
    asked: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    asked["extra_body"] = {"selfspec": {"stats": True}, "ignore_eos": True}
    with serving(plan) as server, OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=None) as client:

        def ask(text: str, **more: Any) -> tuple[str, str, str]:
            messages: Any = [{"role": "user", "content": text}]
            told: Any = client.chat.completions.create(messages=messages, **asked, **more)
            return told.choices[0].message.content, told.selfspec["cache"], told.selfspec["backend"]

        text, *first = ask("a model drafts tokens")
        assert first == ["miss", "local"]
        assert ask("a model drafts tokens") == (text, "hit", "cache")
        assert ask("model drafts tokens") == (text, "hit", "cache")
        assert ask("another model drafts tokens")[1:] == ("miss", "local")
        assert ask("a model drafts tokens", extra_headers={"X-Selfspec-Cache": "off"}) == (text, "off", "local")
        client.api_key = "another caller's"
        assert ask("a model drafts tokens") == (text, "miss", "local")
        told = server.metrics.exposition().decode()
    for result, count in (("exact", 1), ("same_words", 1), ("miss", 3), ("off", 1)):
        assert f'selfspec_cache_lookups_total{{result="{result}"}} {count}.0' in told
