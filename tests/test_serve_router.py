"""The router: whose turn it is by each policy, who follows where one is down, and what is told of it."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from http_servers import Rogue
from hypothesis import given
from hypothesis import strategies as st
from plans import planned
from serving import Clock, Scripted, says, serving

from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.serve import build, remote
from selfspec.serve import router as module
from selfspec.serve.backend import Call, Chunk, Price, Route
from selfspec.serve.config import RouteName, RouterConfig
from selfspec.serve.errors import Unavailable
from selfspec.serve.estimates import Timed, dollars
from selfspec.serve.router import AUTO, Option, PolicyRouter

CALL = Call("c1", AUTO, prompt=(5, 6, 7), max_tokens=100, temperature=0.0)


class Stub(Scripted):
    """A back end that says three tokens, a second apart, by a clock of its own."""

    def __init__(self, name: str, price: Price | None = None, well: bool = True) -> None:
        super().__init__(says("a", "b", "c"), name, price or Price())
        self.well, self.clock, self.asked = well, Clock(), 0

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().stream(call):
            self.clock.now += chunk.tokens
            yield chunk

    async def healthy(self) -> bool:
        self.asked += 1
        return self.well


def option(stub: Stub, first_s: float = 0.0, token_s: float = 0.0, **limits: Any) -> Option:
    timed = Timed(stub, stub.clock)
    if first_s or token_s:
        timed.first_s, timed.token_s, timed.seen = first_s, token_s, 0.0
    return Option(timed, (stub.name, f"model-of-{stub.name}"), **limits)


def router(options: Sequence[Option], **settings: Any) -> PolicyRouter:
    async def read(call: Call) -> Sequence[int]:
        assert isinstance(call.prompt, tuple)
        return call.prompt

    return PolicyRouter(RouterConfig(**settings), options, read, 512)


def chosen(options: Sequence[Option], call: Call = CALL, **settings: Any) -> list[tuple[str, str]]:
    made = router(options, **settings)

    async def ask() -> Sequence[Route]:
        return await made.routes(call)

    routes = asyncio.run(ask())
    assert all(route.policy == settings.get("policy", RouteName.fixed).name for route in routes)
    return [(route.backend.name, route.reason) for route in routes]


def test_fixed_keeps_the_order() -> None:
    options = [option(Stub("a")), option(Stub("b"))]
    assert chosen(options) == [("a", "default"), ("b", "fallback")]
    assert router(options).models == ["a", "model-of-a", "b", "model-of-b", AUTO]


@pytest.mark.parametrize("policy", RouteName)
def test_who_names_a_back_end_gets_no_other(policy: RouteName) -> None:
    options = [option(Stub("a"), max_total_tokens=1), option(Stub("b"))]
    for name in ("b", "model-of-b"):
        assert chosen(options, replace(CALL, model=name), policy=policy) == [("b", "named")]
    with pytest.raises(Unavailable, match="no back end serves c"):
        chosen(options, replace(CALL, model="c"), policy=policy)


def test_two_that_serve_a_model_stand_in_for_each_other() -> None:
    options = [option(Stub("a", well=False)), option(Stub("b"))]
    shared = [each._replace(models=("m",)) for each in options]
    assert chosen(shared, replace(CALL, model="m")) == [("b", "fallback"), ("a", "named")]


def test_length_takes_the_first_back_end_that_fits() -> None:
    options = [
        option(Stub("a"), max_total_tokens=104),
        option(Stub("b"), max_total_tokens=200),
        option(Stub("c"), max_total_tokens=300),
    ]
    for answer, name, reason in ((101, "a", "length"), (102, "b", "length"), (298, "c", "beyond_all")):
        found = chosen(options, replace(CALL, max_tokens=answer), policy=RouteName.length)
        assert found[0] == (name, reason)
    assert chosen(options, replace(CALL, max_tokens=None), policy=RouteName.length)[0] == ("c", "beyond_all")


def test_cost_keeps_the_budgets() -> None:
    dear, cheap = Price(10.0, 30.0), Price(1.0, 3.0)
    slow = option(Stub("local"), 1.0, 0.1)  # 100 tokens: 10.9 s
    quick = option(Stub("api", dear), 0.2, 0.01)  # 1.19 s, 0.00303 USD
    middle = option(Stub("other", cheap), 0.5, 0.02)  # 2.48 s, 0.000303 USD
    options = [slow, quick, middle]
    asked = {
        (): ("local", "cheapest"),
        (("budget_s", 5.0),): ("other", "cheapest"),
        (("budget_s", 2.0),): ("api", "cheapest"),
        (("budget_s", 2.0), ("budget_usd", 0.001)): ("other", "too_slow"),
        (("budget_s", 1.0),): ("api", "too_slow"),
    }
    for budget, expected in asked.items():
        assert chosen(options, policy=RouteName.cost, **dict(budget))[0] == expected
    assert chosen([quick, middle], policy=RouteName.cost, budget_usd=1e-6)[0] == ("other", "too_dear")


def test_a_back_end_of_unknown_latency_is_tried() -> None:
    """An unknown latency counts as none, so that a new back end is asked once; so is one unheard of for a minute."""
    stub = Stub("old")
    options = [option(stub, 9.0, 9.0), option(Stub("new"))]
    assert chosen(options, policy=RouteName.cost, budget_s=1.0)[0] == ("new", "cheapest")
    stub.clock.now = 61.0
    assert options[0].backend.expected(10) == 0


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 5), st.booleans()), min_size=1, max_size=5),
    st.floats(0.01, 600) | st.none(),
    st.floats(0, 0.01) | st.none(),
    st.integers(1, 500),
)
def test_cost_is_the_best_there_is(
    backs: list[tuple[float, float, bool]], most_s: float | None, most_usd: float | None, answer: int
) -> None:
    """Against the definition, spelt out: within both budgets, none is cheaper; and the healthy ones come first."""
    options = [
        option(Stub(str(at), Price(price, price), well), token_s, token_s)
        for at, (price, token_s, well) in enumerate(backs)
    ]
    routes = chosen(
        options, replace(CALL, max_tokens=answer), policy=RouteName.cost, budget_s=most_s, budget_usd=most_usd
    )
    assert sorted(name for name, _ in routes) == [str(at) for at in range(len(backs))]
    health = [backs[int(name)][2] for name, _ in routes]
    assert health == sorted(health, reverse=True)
    name, reason = next(route for route in routes if route[1] != "fallback")
    facts = [(dollars(o.backend.price, 3, answer), o.backend.expected(answer)) for o in options]
    within = [f for f in facts if (most_usd is None or f[0] <= most_usd) and (most_s is None or f[1] <= most_s)]
    if len(backs) > 1:
        assert (reason == "cheapest") == bool(within)
        if within:
            assert facts[int(name)] == min(within)


async def test_latency_is_learned_from_answers() -> None:
    stub = Stub("a")
    timed = Timed(stub, stub.clock)
    async for _ in timed.stream(CALL):
        pass
    assert (timed.first_s, timed.token_s) == (1.0, 1.0) and timed.expected(10) == 10.0
    timed.observe(2.0, None)
    assert timed.first_s == pytest.approx(1.2) and timed.token_s == 1.0


async def test_an_answer_that_is_left_teaches_nothing() -> None:
    stub = Stub("a")
    timed = Timed(stub, stub.clock)
    chunks = timed.stream(CALL)
    await anext(chunks)
    await chunks.aclose()
    assert not timed.known


async def test_health_is_asked_beside_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before the first call, then not again for some seconds; who is not well comes last."""
    monkeypatch.setattr(module, "_HEALTH_S", 1e6)
    sick, well = Stub("sick", well=False), Stub("well")
    made = router([option(sick), option(well)])
    for _ in range(3):
        assert [route.backend.name for route in await made.routes(CALL)] == ["well", "sick"]
    assert sick.asked == well.asked == 1
    made._asked, sick.well = -1e9, True
    await made.routes(CALL)
    await asyncio.gather(made._asking or asyncio.sleep(0))
    assert sick.asked == 2
    assert [route.backend.name for route in await made.routes(CALL)] == ["sick", "well"]


def test_decisions_are_logged_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "selfspec.serve.router")
    chosen([option(Stub("a")), option(Stub("b"))], replace(CALL, prompt=(424242,)))
    told = json.loads(caplog.messages[0].removeprefix("route "))
    assert told == {"call": "c1", "policy": "fixed", "backend": "a", "reason": "default"}
    assert "424242" not in caplog.text


@pytest.fixture
def served(fake: list[str]) -> Any:
    return lambda *more: planned(*fake, *more)


async def test_a_dead_back_end_is_stood_in_for_over_http(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API is named first by the policy and refuses: our engine answers, and both choices are counted."""
    monkeypatch.setattr(remote, "_HEALTH_S", 1e6)
    rogue = Rogue(500)
    async with rogue.serving() as url:
        back_ends = f"serve.backends=[{{name: api, url: '{url}', retries: 0, connect_s: 1e6, first_s: 1e6}}]"
        plan: Plan = served(back_ends, "serve.router.policy=length", "serve.router.max_total_tokens=1")
        with serving(plan) as server:
            call = replace(CALL, prompt="hello", max_tokens=5, stats=True)
            chunks = [chunk async for chunk in server.gateway.answer(call)]
            assert chunks[-1].stats is not None and chunks[-1].stats["backend"] == "local"
            text = server.metrics.exposition().decode()
            assert 'selfspec_routes_total{backend="api",policy="length",reason="length"} 1.0' in text
            assert 'selfspec_routes_total{backend="local",policy="length",reason="fallback"} 1.0' in text
            rogue.behaviours = ["ok"]
            chunks = [chunk async for chunk in server.gateway.answer(call)]
            assert "".join(chunk.text for chunk in chunks) == "ab"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("serve.backends=[{name: local, url: 'http://h/v1'}]", r"serve.backends\[0\].name=local: is taken; must be"),
        ("serve.backends=[{name: a, url: 'http://h/v1'},{name: a}]", r"serve.backends\[1\].name=a: is taken"),
        ("serve.backends=[{name: a, url: 'ftp://h'}]", r"serve.backends\[0\].url=ftp://h: must be http"),
        ("serve.backends=[{name: a, url: 'http://me:pw@h/v1'}]", r"url=http://h/v1: .* without credentials"),
        ("serve.backends=[{name: a, model: m}]", r"serve.backends\[0\].url=null: must be"),
        ("serve.backends=[{name: a, url: 'http://h/v1', key_env: 'sk-1 2'}]", "must be the name of an environment"),
        ("serve.backends=[{url: 'http://h/v1'}]", r"serve.backends\[0\].name: has no value"),
        ("serve.backends=[{name: a, url: 'http://h/v1', first_s: 0}]", r"serve.backends\[0\].first_s=0.0: must be >="),
        ("serve.backends=[{name: a, url: 'http://h/v1', input_price: -1}]", r"input_price=-1.0: must be >= 0"),
        ("serve.router.policy=length", "serve.router.max_total_tokens=null: policy=length needs to know"),
        ("serve.router.budget_s=-1", "serve.router.budget_s=-1.0: must be >= 0"),
        ("serve.cache.entries=0", "serve.cache.entries=0: must be >= 1"),
    ],
)
def test_what_is_wrong_is_refused(served: Any, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        served(override)
    assert "pw" not in str(caught.value) and "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("+serve.backends=[{name: a, nonsense: 1}]", "nonsense"),
        ("serve.router.nonsense=1", "serve.router.nonsense"),
        ("+serve.router.nonsense=1", "nonsense"),
        ("serve.router.policy=best", "serve.router.policy"),
        ("serve.router.policy=difficulty", "serve.router.policy"),  # as there once was
        ("serve.router.hardest=6", "serve.router.hardest"),
        ("serve.cache.mode=similar", "serve.cache.mode"),
        ("serve.cache.threshold=0.7", "serve.cache.threshold"),
        ("serve.backends=[{name: a, hardest: 6}]", "hardest"),
    ],
)
def test_wrong_keys_are_refused_in_one_line(run: Any, fake: list[str], override: str, says: str) -> None:
    code, _, told = run(*fake, override)
    assert code == 2 and says in told and told.count("\n") == 1, told


def test_what_cannot_be_served_is_refused_before_it_is_loaded(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ConfigError, match="a: key_env=NO_KEY: the environment has none"):
        build.check(served("serve.backends=[{name: a, url: 'http://h/v1', key_env: NO_KEY}]"))


@pytest.mark.real
async def test_local_full_local_quantised_and_the_cache_on_the_real_model() -> None:
    """``serve=routed``: both engines answer by name, and nobody is asked twice."""
    limits = ("serve.max_model_len=256", "serve.max_prompt_tokens=128", "serve.max_tokens=64", "serve.max_batch=2")
    plan = planned("draft=ngram", "serve=routed", *limits)

    def asking(model: str, text: str) -> Call:
        said = ({"role": "user", "content": text},)
        return Call("c1", model, messages=said, max_tokens=24, temperature=0.0, stats=True)

    async def answer(call: Call) -> tuple[str, Any]:
        chunks = [chunk async for chunk in server.gateway.answer(call)]
        return "".join(chunk.text for chunk in chunks), chunks[-1].stats

    with serving(plan) as server:
        int8 = server.gateway.router.backends[1]
        while not await int8.healthy():
            await asyncio.sleep(0.1)
        for model in ("local", "int8"):
            text, stats = await answer(asking(model, "What is the capital of France?"))
            assert text and stats["backend"] == model
        text, stats = await answer(asking(AUTO, "Name the capital of Italy."))
        assert stats["backend"] in ("local", "int8") and stats["cache"] == "miss"
        again, stats = await answer(asking(AUTO, "Please name the capital of Italy!"))
        assert (again, stats["backend"], stats["cache"]) == (text, "cache", "hit")
        _, stats = await answer(asking(AUTO, "Name the capital of Spain."))
        assert stats["cache"] == "miss"
