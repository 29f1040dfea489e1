"""decode: the loop's counts, its stops, what runs how often, and layer skipping, which verifies nothing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import caches
import pytest
import torch
from torch import Tensor

from selfspec.axes import GATE
from selfspec.engine.torch.session import Scheduler
from selfspec.model.attention import AttentionMetadata
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import ExitHead, FittedExit, RawExit
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Cycle, Request

pytestmark = pytest.mark.usefixtures("inference")

EXIT, LAYERS = 3, 6
OPEN = GATE.new("none").make()
PROMPT = (40, 7, 66, 7, 21)


@pytest.fixture
def model(tiny_folder: Path) -> Llama:
    """Late layers matter more than in the file, and no token ends a text."""
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    for layer in model.layers[EXIT:]:
        layer.out *= 8
        layer.down *= 8
    model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    return with_eos(model)


def with_eos(model: Llama, *tokens: int) -> Llama:
    model.shape = replace(model.shape, eos=frozenset(tokens))
    return model


def whole(model: Llama) -> Target:
    return Target(model, model.shape.layers, model.norm)


def run(
    target: Target,
    request: Request,
    draft: Draft | None = None,
    k: int | Controller = 0,
    gate: Gate = OPEN,
) -> Completion:
    """One request, in a cache that has no slot too many, checked after each cycle."""
    draft = draft or Draft(target.model)
    controller = Controller(k) if isinstance(k, int) else k
    cache = target.model.new_cache(len(request.tokens) + request.max_new_tokens - 1)
    scheduler = Scheduler(Speculation(target, draft, gate, controller, LongestPrefix()), cache)
    scheduler.submit(request)
    done = list[Completion]()
    while not done:
        done = [told.completion for told in scheduler.step() if told.completion]
        caches.check(cache, target.depth)
        for seq in scheduler.running:
            assert cache.lengths == [len(seq.tokens) - 1]
    assert not scheduler.busy and cache.lengths == []
    return done[0]


def stream(model: Llama, tokens: Sequence[int], depth: int = LAYERS) -> Tensor:
    """The residual stream ``[n, D]`` after ``depth`` layers, without anything cached before."""
    cache = model.new_cache(len(tokens))
    at = cache.place([Tree.chain(tokens)], row=cache.admit())
    return model.run(model.embed(tokens), cache, at, 0, depth)


class Script(Draft):
    """Proposes what it is told: what follows a position, tokens shifted by ``wrong``."""

    def __init__(self, model: Llama, prompt: int, tokens: Sequence[int], wrong: int = 0) -> None:
        super().__init__(model)
        self.prompt, self.tokens, self.wrong = prompt, tokens, wrong

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        (row,), (k,) = rows, ks
        at = len(row.tokens) - self.prompt
        assert tuple(self.tokens[:at]) == tuple(row.output_tokens())
        return Proposal([Tree.chain([row.tokens[-1], *((t + self.wrong) % 80 for t in self.tokens[at : at + k])])])


class TestCounts:
    """With drafts that are always right, and always wrong, every count is known."""

    @pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 64])
    @pytest.mark.parametrize("new", [1, 2, 3, 9, 10])
    def test_always_right(self, model: Llama, new: int, k: int) -> None:
        request = Request(PROMPT, new)
        plain = run(whole(model), request)
        got = run(whole(model), request, Script(model, len(PROMPT), plain.tokens), k)
        assert got.tokens == plain.tokens and len(got.tokens) == new and got.finish == "length"
        sizes = [min(k + 1, new - 1 - i) for i in range(0, new - 1, k + 1)]
        assert [cycle.new_tokens for cycle in got.cycles] == sizes
        assert all(c.accepted == c.proposed == c.depth == c.k_asked == c.new_tokens - 1 for c in got.cycles)

    @pytest.mark.parametrize("k", [1, 3, 64])
    def test_always_wrong(self, model: Llama, k: int) -> None:
        request = Request(PROMPT, 9)
        plain = run(whole(model), request)
        got = run(whole(model), request, Script(model, len(PROMPT), plain.tokens, wrong=1), k)
        assert got.tokens == plain.tokens
        room = [min(k, 7 - i) for i in range(8)]
        assert [(c.k_asked, c.proposed, c.accepted, c.new_tokens) for c in got.cycles] == [(r, r, 0, 1) for r in room]

    def test_of_a_tree(self, model: Llama) -> None:
        """Its size is what was proposed, its depth how far it looked; a gate's signals are written down."""
        plain = run(whole(model), Request(PROMPT, 4)).tokens

        class Bushy(Draft):
            def nodes(self, k: int) -> int:
                return 5

            def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
                root = rows[0].tokens[-1]
                if ks[0] < 2:
                    return Proposal([Tree.chain([root])])
                wrong = [(plain[1] + 1) % 80, (plain[2] + 1) % 80]
                tree = Tree([root, wrong[0], plain[1], wrong[1], plain[2]], [-1, 0, 0, 2, 2])
                tree.signals += [0.5, 0.25]
                return Proposal([tree])

        cache = model.new_cache(len(PROMPT) + 8)
        made = Speculation(whole(model), Bushy(model), OPEN, Controller(3), LongestPrefix())
        (got,) = Scheduler(made, cache).run([Request(PROMPT, 4)])
        (cycle,) = got.cycles
        assert got.tokens == plain
        assert (cycle.k_asked, cycle.proposed, cycle.depth, cycle.accepted, cycle.new_tokens) == (2, 4, 2, 2, 3)
        assert cycle.signals == (0.5, 0.25) and cycle.batch == 1

    def test_plain_decoding_is_a_cycle_a_token(self, model: Llama) -> None:
        got = run(whole(model), Request(PROMPT, 9))
        assert [(c.k_asked, c.proposed, c.depth, c.new_tokens, c.signals) for c in got.cycles] == [(0, 0, 0, 1, ())] * 8

    def test_it_is_greedy_decoding_without_a_cache(self, model: Llama) -> None:
        for prompt in (PROMPT, PROMPT[:1]):
            tokens: tuple[int, ...] = prompt
            for _ in range(12):
                tokens += (int(model.logits(model.norm(stream(model, tokens)[-1:])).argmax()),)
            assert run(whole(model), Request(prompt, 12)).tokens == tokens[len(prompt) :]

    def test_a_controller_sees_all_cycles_so_far(self, model: Llama) -> None:
        seen: list[list[Cycle]] = []
        told: list[Cycle] = []

        class Growing(Controller):
            def num_draft_tokens(self, history: Sequence[Cycle], batch: int) -> int:
                assert batch == 1
                seen.append(list(history))
                return len(history)

            def observe(self, cycles: list[Cycle]) -> None:
                told.extend(cycles)

        got = run(whole(model), Request(PROMPT, 9), EarlyExit(model, EXIT, RawExit(model)), Growing(0))
        assert seen == [list(got.cycles[:i]) for i in range(len(got.cycles))] and told == list(got.cycles)
        assert [c.k_asked for c in got.cycles[:3]] == [0, 1, 2]

    def test_a_gate_is_asked_and_told_each_cycle(self, model: Llama) -> None:
        events: list[str | Cycle] = []

        class Watching(Gate):
            def begin(self) -> None:
                events.append("begin")

            def observe(self, cycles: list[Cycle]) -> None:
                events.extend(cycles)

        got = run(whole(model), Request(PROMPT, 9), EarlyExit(model, EXIT, RawExit(model)), 2, Watching())
        assert events == [event for cycle in got.cycles for event in ("begin", cycle)]

    def test_a_controller_chooses_the_exit_by_the_prompt(self, model: Llama) -> None:
        class Choosing(Controller):
            def exit_layer(self, prompt_tokens: int) -> int | None:
                return prompt_tokens

        def accepted(draft: EarlyExit, controller: Controller) -> list[int]:
            return [c.accepted for c in run(whole(model), Request(PROMPT[:4], 24), draft, controller).cycles]

        four, three = (EarlyExit(model, depth, RawExit(model)) for depth in (4, EXIT))
        chosen = accepted(three, Choosing(3))
        assert chosen == accepted(four, Controller(3)) != accepted(three, Controller(3))


class TestStops:
    @pytest.mark.parametrize("k", [0, 1, 2, 4, 8])
    @pytest.mark.parametrize("at", range(8))
    def test_at_the_first_stop_token_wherever_it_falls(self, model: Llama, at: int, k: int) -> None:
        plain = run(whole(model), Request(PROMPT, 16)).tokens
        at = plain.index(plain[at])
        with_eos(model, plain[at], 79 if 79 not in plain else plain[at])
        got = run(whole(model), Request(PROMPT, 16), Script(model, len(PROMPT), plain), k)
        assert (got.tokens, got.finish) == (plain[: at + 1], "stop")
        assert sum(cycle.new_tokens for cycle in got.cycles) == at
        ignored = run(whole(model), Request(PROMPT, 16, ignore_eos=True), Script(model, len(PROMPT), plain), k)
        assert (ignored.tokens, ignored.finish) == (plain, "length")

    def test_a_stop_token_at_the_very_end_is_a_stop(self, model: Llama) -> None:
        plain = run(whole(model), Request(PROMPT, 16)).tokens
        last = next(i for i in range(15, 0, -1) if plain[i] not in plain[:i])
        with_eos(model, plain[last])
        assert run(whole(model), Request(PROMPT, last + 1)).finish == "stop"
        assert run(whole(model), Request(PROMPT, last)).finish == "length"

    def test_a_stop_token_in_the_prompt_stops_nothing(self, model: Llama) -> None:
        plain = run(whole(model), Request(PROMPT, 9))
        with_eos(model, *set(PROMPT) - set(plain.tokens))
        assert model.shape.eos and run(whole(model), Request(PROMPT, 9)).tokens == plain.tokens


class TestObserve:
    """A draft is told every token that became certain, once, with the state that gave it."""

    @pytest.mark.parametrize("stops", [False, True])
    @pytest.mark.parametrize("k", [0, 3, 8])
    def test_what_became_certain(self, model: Llama, k: int, stops: bool) -> None:
        plain = run(whole(model), Request(PROMPT, 16)).tokens
        if stops:
            with_eos(model, plain[9])
        certain, states, given = list[int](), list[Tensor](), list[Tensor]()

        class Told(Script):
            def observe(self, row: Seq, index: int, tokens: Sequence[int], states_: Tensor, cache: KVCache) -> None:
                assert index == 0 and len(tokens) == len(states_)
                assert cache.lengths[0] == len(row.tokens) - 1 and row.tokens[-len(tokens) :] == list(tokens)
                assert torch.equal(row.state, states_[-1:])
                certain.extend(tokens)
                states.append(states_)
                given.append(row.state)

        half_right = [token if i % 5 else token + 1 for i, token in enumerate(plain)]
        half_right = [token % 80 for token in half_right]

        class Mistaken(Told):
            def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
                at = len(rows[0].output_tokens())
                return Proposal([Tree.chain([rows[0].tokens[-1], *half_right[at : at + ks[0]]])])

        got = run(whole(model), Request(PROMPT, 16), Mistaken(model, len(PROMPT), plain), k)
        assert (*PROMPT[:1], *certain) == PROMPT + got.tokens and len(given) == len(got.cycles) + 1
        wanted = model.norm(stream(model, (PROMPT + got.tokens)[:-1]))
        torch.testing.assert_close(torch.cat(states), wanted, atol=1e-4, rtol=1e-4)

    def test_along_the_path_of_a_tree(self, model: Llama) -> None:
        plain = run(whole(model), Request(PROMPT, 12)).tokens
        states = list[Tensor]()

        class Siblings(Draft):
            """A wrong sibling before every right token."""

            def nodes(self, k: int) -> int:
                return 2 * k + 1

            def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
                tree, node, at = Tree.chain(rows[0].tokens[-1:]), 0, len(rows[0].output_tokens())
                for token in plain[at : at + ks[0]]:
                    tree.add(node, (token + 1) % 80)
                    node = tree.add(node, token)
                return Proposal([tree])

            def observe(self, row: Seq, index: int, tokens: Sequence[int], new: Tensor, cache: KVCache) -> None:
                states.append(new)

        made = Speculation(whole(model), Siblings(model), OPEN, Controller(3), LongestPrefix())
        (got,) = Scheduler(made, model.new_cache(len(PROMPT) + 12 + 7)).run([Request(PROMPT, 12)])
        assert got.tokens == plain and [cycle.accepted for cycle in got.cycles] == [3, 3, 2]
        wanted = model.norm(stream(model, PROMPT + plain[:-1]))
        torch.testing.assert_close(torch.cat(states), wanted, atol=1e-4, rtol=1e-4)


class TestSharing:
    """What the draft has run is not run again."""

    @pytest.fixture
    def passes(self, model: Llama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
        """Every pass: its first position, how many tokens, from which layer, to which."""
        passes: list[tuple[int, int, int, int]] = []
        real = Llama.run

        def counting(
            self: Llama, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int
        ) -> Tensor:
            passes.append((at.start, len(hidden), first, last))
            return real(self, hidden, cache, at, first, last)

        monkeypatch.setattr(Llama, "run", counting)
        return passes

    @pytest.mark.parametrize("gate_name", ["none", "maxp"])
    @pytest.mark.parametrize("k", [1, 3, 8])
    def test_each_layer_runs_once_for_a_token(
        self, model: Llama, passes: list[tuple[int, int, int, int]], k: int, gate_name: str
    ) -> None:
        draft, doubts = (
            EarlyExit(model, EXIT, RawExit(model)),
            GATE.new(gate_name, **({"threshold": 0.3} if gate_name != "none" else {})).make(),
        )
        got = run(whole(model), Request(PROMPT, 24), draft, k, doubts)
        assert passes.pop(0) == (0, len(PROMPT), 0, LAYERS)
        at = len(PROMPT)
        for cycle in got.cycles:
            at, before = at + cycle.new_tokens, at
            if cycle.k_asked == 0:  # the answer's end: nothing to draft, and nothing to run apart
                assert passes.pop(0) == (before, 1, 0, LAYERS)
                continue
            mine = [passes.pop(0) for _ in range(cycle.proposed + 2)]
            assert mine[:-1] == [(before + i, 1, 0, EXIT) for i in range(cycle.proposed + 1)]
            assert mine[-1] == (before, cycle.proposed + 1, EXIT, LAYERS)
        assert not passes
        assert gate_name == "none" or any(c.proposed < c.k_asked for c in got.cycles)

    def test_signals_are_those_of_the_tokens_looked_at(self, model: Llama) -> None:
        reading = GATE.new("maxp", threshold=0.3).make()
        draft = EarlyExit(model, EXIT, RawExit(model))
        for cycle in run(whole(model), Request(PROMPT, 24), draft, 3, reading).cycles:
            *sure, last = cycle.signals or (1.0,)
            assert all(signal >= 0.3 for signal in sure) and (last < 0.3) == (cycle.proposed < cycle.k_asked)

    def test_a_head_is_given_the_previous_final_state(self, model: Llama) -> None:
        """The verified one first, then its own estimates."""
        given: list[Tensor] = []
        said: list[Tensor] = []

        class Spy:
            def __call__(self, hidden: Tensor, previous: Tensor) -> Tensor:
                given.append(previous)
                said.append(model.norm(hidden))
                return said[-1]

        got = run(whole(model), Request(PROMPT, 12), EarlyExit(model, EXIT, Spy()), 3)
        tokens = PROMPT + got.tokens
        finals = model.norm(stream(model, tokens))
        at, step = len(PROMPT), 0
        for cycle in got.cycles:
            if cycle.proposed:
                torch.testing.assert_close(given[step], finals[at - 1 : at], atol=1e-4, rtol=1e-4)
                for j in range(1, cycle.proposed):
                    assert given[step + j] is said[step + j - 1]
            step, at = step + cycle.proposed, at + cycle.new_tokens
        assert step == len(given) > 4


class TestLayerSkipping:
    """``policy.verify=false``: the first layers alone decide."""

    @pytest.fixture(params=[1, 3, 5])
    def depth(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    @pytest.mark.parametrize("prompt", [(5,), PROMPT, PROMPT * 4], ids=len)
    def test_it_is_the_truncated_model(
        self, tiny_folder: Path, tmp_path: Path, depth: int, prompt: tuple[int, ...]
    ) -> None:
        config = json.loads((tiny_folder / "config.json").read_text()) | {"num_hidden_layers": depth}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").symlink_to(tiny_folder / "model.safetensors")
        short, full = (Llama.load(f, torch.device("cpu"), torch.float32) for f in (tmp_path, tiny_folder))
        read = RawExit(full)
        skipping = Target(full, depth, lambda hidden: read(hidden, hidden))
        assert len(short.layers) == depth
        assert run(skipping, Request(prompt, 20)).tokens == run(whole(short), Request(prompt, 20)).tokens

    def test_with_a_fitted_head(self, model: Llama, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
        random = torch.Generator().manual_seed(3)
        tensors = {"weight": torch.randn(32, 32, generator=random), "bias": torch.randn(32, generator=random)}
        head: ExitHead = FittedExit(tensors, previous=False)
        tokens: tuple[int, ...] = PROMPT
        for _ in range(10):
            hidden = stream(model, tokens, depth)[-1]
            unit = hidden / hidden.square().mean().sqrt()
            tokens += (int((model.lm_head @ (tensors["weight"] @ unit + tensors["bias"])).argmax()),)

        deepest = 0
        real: Callable[..., Tensor] = Llama.run

        def watching(
            self: Llama, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int
        ) -> Tensor:
            nonlocal deepest
            deepest = max(deepest, last)
            return real(self, hidden, cache, at, first, last)

        monkeypatch.setattr(Llama, "run", watching)
        got = run(Target(model, depth, lambda hidden: head(hidden, hidden)), Request(PROMPT, 10))
        assert PROMPT + got.tokens == tokens and deepest == depth
