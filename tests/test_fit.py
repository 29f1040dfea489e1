"""fit: traces, agreement, vocabulary by their definitions, the closed-form solutions against planted maps, and SGD."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from selfspec.axes import DRAFT, DraftOptions
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation import fit
from selfspec.speculation.draft import layerskip
from selfspec.speculation.fit import Trace
from selfspec.speculation.head import FittedExit, HeadForm, RawExit, features, linear
from selfspec.speculation.readout import Readout

pytestmark = pytest.mark.usefixtures("inference")

D, N = 12, 4000
AFFINE = DRAFT.new("lsq", exit_layer=3, form=HeadForm.affine, ridge=1e-9)
LOW_RANK = replace(AFFINE, form=HeadForm.low_rank, rank=4)


@pytest.fixture
def model(tiny_folder: Path) -> Llama:
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    for layer in model.layers[3:]:  # more to learn
        layer.out *= 8
        layer.down *= 8
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(noise: float = 0.0, previous: float = 0.0, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exit, previous and final states, where the last are an affine map of the others at unit RMS; map and bias."""
    exit, before = 3 * random(n, D) @ random(D, D, seed=1) + 1, 2 * random(n, D, seed=2) + 1
    weight, bias = random(D, 2 * D, seed=3), random(D, seed=4)
    weight[:, D:] *= previous
    final = features(exit, before) @ weight.T + bias + noise * random(n, D, seed=5) @ random(D, D, seed=6)
    return exit, before, final, weight, bias


def loss(tensors: dict[str, Tensor], x: Tensor, final: Tensor) -> float:
    return float((linear(tensors, x) - final).double().square().sum())


def states(model: Llama, tokens: tuple[int, ...], last: int) -> Tensor:
    """The residual stream after ``last`` layers, from a pass of its own."""
    cache = model.new_cache(len(tokens))
    at = cache.place([Tree.chain(tokens)], row=cache.admit())
    return model.run(model.embed(tokens, at), cache, at, 0, last)


def answer(model: Llama, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """The model's own greedy answer."""
    said = prompt
    for _ in range(tokens):
        said += (int(model.logits(model.norm(states(model, said, 6)[-1:])).argmax()),)
    return said[len(prompt) :]


class TestTrace:
    PROMPT, ANSWER = (40, 7, 66), (7, 21, 3, 64, 50)

    @pytest.mark.parametrize("exit_layer", [1, 3, 5, None])
    def test_every_state_is_that_of_what_came_before(self, model: Llama, exit_layer: int | None) -> None:
        got = fit.trace(model, self.PROMPT, self.ANSWER, exit_layer)
        said = self.PROMPT + self.ANSWER
        assert tuple(got.tokens.tolist()) == said
        assert got.at.tolist() == [2, 3, 4, 5, 6], "what predicts the answer"
        assert len(got.final) == len(said) and (got.exit is None) == (exit_layer is None)
        for i in range(len(said)):
            if got.exit is not None:
                assert_close(got.exit[i], states(model, said[: i + 1], exit_layer or 0)[-1], atol=1e-4, rtol=1e-4)
            assert_close(got.final[i], model.norm(states(model, said[: i + 1], 6))[-1], atol=1e-4, rtol=1e-4)

    def test_the_final_states_predict_the_models_own_answer(self, model: Llama) -> None:
        said = answer(model, self.PROMPT, 6)
        got = fit.trace(model, self.PROMPT, said, None)
        assert tuple(model.logits(got.final[got.at]).argmax(-1).tolist()) == said
        assert tuple(got.tokens[got.at + 1].tolist()) == said

    def test_every_fifth_sequence_is_held_out_whole(self) -> None:
        train, heldout = fit.split([stub([i, 0]) for i in range(11)])
        assert [int(trace.tokens[0]) for trace in train] == [0, 1, 2, 3, 5, 6, 7, 8, 10]
        assert [int(trace.tokens[0]) for trace in heldout] == [4, 9]


def stub(tokens: list[int], first: int = 1) -> Trace:
    """States that say which they are."""
    final = torch.arange(float(len(tokens)))[:, None].repeat(1, 2)
    return Trace(torch.tensor(tokens), final, final + 100, first)


class TestVocabulary:
    def test_the_most_frequent_tokens_of_the_answers(self, model: Llama) -> None:
        traces = [stub([9, 9, 9, 9, 7, 5, 7, 30], first=3), stub([9, 9, 7, 5, 30, 70])]
        for size, wanted in ((1, [7]), (3, [7, 5, 30]), (6, [7, 5, 30, 70, 0, 1])):
            ids = fit.vocabulary(model, traces, size)["ids"]
            assert (ids.tolist(), ids.dtype) == (wanted, torch.int64)
        assert len(fit.vocabulary(model, traces, 10**6)["ids"]) == 80, "no more than there are"
        assert fit.vocabulary(model, traces, None) == {}


class TestAgreement:
    def test_by_its_definition(self) -> None:
        """Position j counts where all earlier ones were right; a draft sees the states that it made itself."""
        traces = [stub([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], 1), stub([3, 1, 4, 1, 5, 9], 3), stub([2, 7, 1], 1)]
        calls = []

        def guess(trace: Trace, at: Tensor, step: int, states: Tensor) -> tuple[Tensor, Tensor]:
            assert torch.equal(states[:, 0], (at - step - 1) * 10.0**step), "begun with the state before the root's"
            calls.append(step)
            wrong = (trace.tokens[at] + step) % 6 == 0
            return trace.tokens[at + 1] + wrong, states * 10

        right, asked = [0] * 4, [0] * 4
        for trace in traces:
            tokens = trace.tokens.tolist()
            for root in range(trace.first, len(tokens) - 1):
                for step in range(min(4, len(tokens) - 1 - root)):
                    asked[step] += 1
                    if (tokens[root + step] + step) % 6 == 0:
                        break
                    right[step] += 1
        assert asked[0] == 9 + 2 + 1 and 0 < right[3] < asked[3], "all there is to see"
        assert fit.agreement(traces, guess, 4) == pytest.approx([r / a for r, a in zip(right, asked, strict=True)])
        assert max(calls) == 3

    def test_what_is_never_asked_is_not_listed(self) -> None:
        never = fit.agreement([stub([1, 2, 3, 4])], lambda trace, at, step, states: (at * 0 - 1, states))
        assert never == [0.0]

    def test_of_an_exit(self, model: Llama) -> None:
        """An exit that is the last layer's agrees always; of a previous state, the chain's own estimate is read."""
        trace = fit.trace(model, (40, 7, 66), answer(model, (40, 7, 66), 12), 3)
        assert (
            layerskip.agreement(model, Readout(model), lambda hidden, previous: hidden, [with_exit(trace)]) == [1] * 5
        )

        def previous_only(hidden: Tensor, previous: Tensor) -> Tensor:
            seen.append(previous)
            return hidden

        seen = list[Tensor]()
        layerskip.agreement(model, Readout(model), previous_only, [with_exit(trace)])
        assert torch.equal(seen[0], trace.final[trace.at - 1])
        assert torch.equal(seen[1], trace.final[trace.at[:-1]]), "here its estimate is the final state itself"


def with_exit(trace: Trace) -> Trace:
    return replace(trace, exit=trace.final)


def ridge(parts: Iterable[tuple[Tensor, Tensor]], draft: DraftOptions) -> dict[str, Tensor]:
    return fit.ridge(parts, draft.get("ridge"), draft.get("rank"))


class TestTemperature:
    @pytest.mark.parametrize("planted", [0.4, 1.0, 1.7])
    def test_a_planted_one_is_found(self, model: Llama, planted: float) -> None:
        """Tokens drawn at a temperature; those that the vocabulary lacks are not looked at."""
        model.lm_head = 0.3 * random(80, 32, seed=1)
        readout, states, chance = Readout(model, torch.arange(40)), random(2000, 32), torch.Generator().manual_seed(2)
        tokens = (readout(states) / planted).softmax(-1).multinomial(1, generator=chance)[:, 0]
        states, tokens = torch.cat((states, states)), torch.cat((tokens, torch.full_like(tokens, 70)))
        parts = zip(states.split(500), tokens.split(500), strict=True)
        assert fit.temperature(readout, parts)["temperature"] == pytest.approx(planted, rel=0.06)

    def test_nothing_to_fit_it_on(self, model: Llama) -> None:
        readout = Readout(model, torch.arange(40))
        assert fit.temperature(readout, [(random(3, 32), torch.full((3,), 70))]) == {"temperature": 1.0}


class TestClosedForm:
    def test_a_planted_map_is_recovered(self) -> None:
        exit, _, final, weight, bias = planted()
        tensors = ridge([(features(exit), final)], AFFINE)
        assert_close(tensors["weight"], weight[:, :D], atol=2e-3, rtol=2e-3)
        assert_close(tensors["bias"], bias, atol=2e-3, rtol=2e-3)

    @pytest.mark.parametrize("draft", [AFFINE, LOW_RANK, replace(LOW_RANK, rank=D)], ids=["affine", "4", "full"])
    def test_a_second_state_is_used(self, draft: DraftOptions) -> None:
        exit, before, final, weight, _ = planted(previous=1.0)
        both = features(exit, before)
        blind, seeing = ridge([(features(exit), final)], draft), ridge([(both, final)], draft)
        assert loss(seeing, both, final) < 0.6 * loss(blind, features(exit), final)
        if draft is AFFINE:
            assert_close(seeing["weight"], weight, atol=2e-3, rtol=2e-3)
        shuffled = features(exit, before.roll(1, 0))
        assert loss(seeing, shuffled, final) > loss(blind, features(exit), final), "of its own position, not of any"

    @pytest.mark.parametrize("two", [False, True])
    @pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
    def test_ridge_by_its_definition(self, strength: float, two: bool) -> None:
        """As ordinary least squares with a row sqrt(lambda) e_j -> 0 added for every feature, constant included."""
        exit, before, final, *_ = planted(noise=1.0, previous=1.0)
        seen = features(exit, before if two else None)
        x = torch.cat((seen.double(), torch.ones(N, 1)), 1)
        root = (strength * x.square().sum() / x.shape[1]).sqrt()
        rows = torch.cat((x, root * torch.eye(x.shape[1])))
        wanted = torch.linalg.lstsq(rows, torch.cat((final.double(), torch.zeros(x.shape[1], D)))).solution
        got = ridge([(seen, final)], replace(AFFINE, ridge=strength))
        assert_close(torch.cat((got["weight"], got["bias"][:, None]), 1), wanted.T.float(), atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("block", [1, 100, 10**6])
    def test_parts_add_up(self, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        exit, _, final, *_ = planted(noise=1.0)
        whole = ridge([(features(exit), final)], AFFINE)
        monkeypatch.setattr(fit, "_BLOCK", block)
        parts = zip(features(exit).split(37), final.split(37), strict=True)
        for name, tensor in ridge(parts, AFFINE).items():
            assert_close(tensor, whole[name], atol=1e-3, rtol=1e-3)

    def test_states_in_half_width_are_summed_in_float32(self) -> None:
        exit, _, final, *_ = planted(noise=0.1)
        half = ridge([(features(exit).bfloat16(), final.bfloat16())], AFFINE)
        assert loss(half, features(exit), final) < 1.05 * loss(
            ridge([(features(exit), final)], AFFINE), features(exit), final
        )

    def test_more_may_be_foretold_than_a_state(self) -> None:
        exit, before, final, *_ = planted(noise=1.0)
        x, wide = features(exit), torch.cat((final, before, exit), 1)
        got = ridge([(x, wide)], AFFINE)
        assert got["weight"].shape == (3 * D, D)
        assert_close(linear(got, x)[:, :D], linear(ridge([(x, final)], AFFINE), x), atol=1e-3, rtol=1e-3)


class TestLowRank:
    @pytest.mark.parametrize("two", [False, True])
    @pytest.mark.parametrize("rank", [1, 4, 9])
    def test_no_map_of_that_rank_is_better(self, rank: int, two: bool) -> None:
        """Beside the fitted scale: reduced-rank regression by its textbook, in float64 and by SVD."""
        exit, before, final, *_ = planted(noise=0.3, previous=1.0)
        seen = features(exit, before if two else None)
        t = ridge([(seen, final)], replace(LOW_RANK, rank=rank))
        assert t["up"].shape == (D, rank) and t["down"].shape == (rank, 2 * D if two else D)
        x = seen.double()
        y = final.double() - x[:, :D] * t["scale"]
        x, y = x - x.mean(0), y - y.mean(0)
        fitted = x @ torch.linalg.lstsq(x, y).solution
        leading = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
        best = float((y - fitted @ leading.T @ leading).square().sum())
        assert loss(t, seen, final) == pytest.approx(best, rel=1e-5)
        assert best > loss(ridge([(seen, final)], AFFINE), seen, final) + N / 10, "rank matters here"

    @pytest.mark.parametrize("two", [False, True])
    def test_full_rank_is_the_affine_map(self, two: bool) -> None:
        exit, before, final, *_ = planted(noise=1.0, previous=1.0)
        seen = features(exit, before if two else None)
        affine, full = (ridge([(seen, final)], draft) for draft in (AFFINE, replace(LOW_RANK, rank=D)))
        assert_close(linear(full, seen[:50]), linear(affine, seen[:50]), atol=2e-3, rtol=2e-3)

    def test_a_planted_scale_needs_no_rank(self) -> None:
        """Late exits: the final state is nearly a rescaled exit state."""
        x, scale = features(3 * random(N, D)), random(D, seed=1)
        made = ridge([(x, x * scale)], replace(LOW_RANK, rank=1))
        assert_close(made["scale"], scale, atol=1e-3, rtol=1e-3)
        assert loss(made, x, x * scale) < 1e-3 * N


@pytest.fixture
def traces(model: Llama) -> list[Trace]:
    """Of random texts: what follows is rarely the model's own token."""
    texts = torch.randint(80, (60, 24), generator=torch.Generator().manual_seed(1)).tolist()
    return [fit.trace(model, text[:4], text[4:], 3) for text in texts]


class TestLeastSquaresExit:
    @pytest.mark.parametrize("vocab", [None, 20])
    @pytest.mark.parametrize("draft", [AFFINE, LOW_RANK, replace(AFFINE, previous=True)], ids=["affine", "low", "prev"])
    def test_facts(self, model: Llama, traces: list[Trace], draft: DraftOptions, vocab: int | None) -> None:
        traces = [replace(t, tokens=torch.cat((t.tokens[:1], told(model, t.final[:-1])))) for t in traces]
        train, heldout = fit.split(traces)
        made = replace(draft, ridge=1e-3, vocab=vocab).fit(model, train, heldout, 0)
        facts, ids = made.facts, made.tensors.get("ids", torch.arange(80))
        assert (facts["previous"], facts["form"]) == (draft.previous, "low_rank" if draft.rank else "affine")
        assert (facts["train_tokens"], facts["heldout_tokens"]) == (48 * 20, 12 * 20)
        assert facts["parameters"] == (32 * 2 + 64 * 4 if draft.rank else 32 * (65 if draft.previous else 33))
        assert len(ids) == (vocab or 80)
        exit, before, final = (
            torch.cat(list(parts))
            for parts in zip(*((t.exit[t.at], t.final[t.at - 1], t.final[t.at]) for t in heldout), strict=True)  # type: ignore[index]
        )
        for name, reading in (
            ("agreement", FittedExit(made.tensors, draft.previous)),
            ("raw_agreement", RawExit(model)),
        ):
            guess = ids[model.logits(reading(exit, before))[:, ids].argmax(-1)]
            assert facts[name] == pytest.approx(float((guess == told(model, final)).float().mean())), name
        assert facts["agreement_by_position"][0] == facts["agreement"] and len(facts["agreement_by_position"]) > 1
        assert 0 < facts["raw_agreement"] < 1 and "sgd_gain" not in facts

    def test_the_raw_exit_learns_a_vocabulary_only(self, model: Llama, traces: list[Trace]) -> None:
        train, heldout = fit.split(traces)
        made = DRAFT.new("layerskip", exit_layer=3, vocab=20).fit(model, train, heldout, 0)
        assert list(made.tensors) == ["ids"] and made.facts["parameters"] == 0
        readout = Readout(model, made.tensors["ids"])
        assert made.facts["agreement_by_position"] == layerskip.agreement(model, readout, RawExit(model), heldout)

    @pytest.mark.parametrize("vocab", [None, 60])
    @pytest.mark.parametrize("previous", [False, True])
    @pytest.mark.parametrize("form", [HeadForm.affine, HeadForm.low_rank])
    def test_sgd_minds_what_least_squares_does_not(
        self, model: Llama, form: HeadForm, previous: bool, vocab: int | None
    ) -> None:
        """Planted: a few huge states drag the squares along; the tokens they give are few all the same."""
        model.lm_head = 50 * random(80, 32, seed=1)
        exit = random(5000, 32, seed=2)
        final = 0.02 * features(exit) @ random(32, 32, seed=3)
        final[::23] *= -20
        parts = []
        for i in range(5):
            own = final[i::5]
            parts.append(
                Trace(torch.cat((torch.zeros(1, dtype=torch.int64), told(model, own)[:-1])), own, exit[i::5], 1)
            )
        rank = 16 if form is HeadForm.low_rank else None
        draft = DRAFT.new(
            "lsq", exit_layer=3, form=form, rank=rank, previous=previous, ridge=1e-3, sgd_epochs=8, vocab=vocab
        )
        made = draft.fit(model, *fit.split(parts), 0)
        closed = replace(draft, sgd_epochs=0).fit(model, *fit.split(parts), 0)
        assert made.facts["sgd_gain"] == pytest.approx(made.facts["agreement"] - closed.facts["agreement"])
        assert made.facts["sgd_gain"] > 0.05
        assert {t.requires_grad for t in made.tensors.values()} == {False}
        again = draft.fit(model, *fit.split(parts), 0)
        for name, tensor in again.tensors.items():
            assert torch.equal(tensor, made.tensors[name]), "the seed settles it"
        assert made.facts["parameters"] == closed.facts["parameters"]


def told(model: Llama, final: Tensor) -> Tensor:
    """The model's own tokens after final states."""
    return model.logits(final).argmax(-1)


def test_descent_reads_every_example_once_an_epoch_and_nothing_of_what_is_frozen_changes() -> None:
    seen, goal = list[Tensor](), torch.tensor([3.0, -1.0])

    def distance(learned: dict[str, Tensor], rows: Tensor, goal: Tensor) -> Tensor:
        seen.append(rows)
        return (learned["x"] - goal).square().sum()

    begin = torch.zeros(2)
    made = fit.descend({"x": begin}, [goal], distance, examples=600, epochs=2, seed=7, rate=0.5)
    assert [len(rows) for rows in seen] == [256, 256, 88] * 2
    assert all(sorted(torch.cat(seen[i : i + 3]).tolist()) == list(range(600)) for i in (0, 3))
    assert not torch.equal(seen[0], seen[3]) and torch.equal(begin, torch.zeros(2))
    assert float((made["x"] - goal).abs().sum()) < float(goal.abs().sum())


def test_cross_entropy_passes_over_what_the_vocabulary_lacks() -> None:
    state, weight = random(6, 4), random(9, 4, seed=1)
    log_p = (state @ weight.T).log_softmax(-1)
    wanted = torch.tensor([3, -1, 0, 8, -1, 2])
    by_hand = -sum(float(log_p[i, w]) for i, w in enumerate(wanted.tolist()) if w >= 0) / 6
    assert float(fit.cross_entropy(state, weight, wanted)) == pytest.approx(by_hand, rel=1e-5)
    assert float(fit.cross_entropy(state, weight, torch.full((6,), -1))) == 0
