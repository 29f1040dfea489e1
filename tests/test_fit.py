"""fit: the states it learns from, the closed-form solutions, and what SGD adds; against planted maps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from selfspec.config import Draft, HeadForm
from selfspec.engine import fit
from selfspec.engine.fit import States
from selfspec.engine.head import Head, RawExit, features
from selfspec.engine.llama import Llama

pytestmark = pytest.mark.usefixtures("inference")

D, N = 12, 4000
AFFINE = Draft("lsq", 3, HeadForm.affine, ridge=1e-9)
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


def planted(noise: float = 0.0, previous: float = 0.0, n: int = N) -> tuple[States, Tensor, Tensor]:
    """Final states that are an affine map of unit exit states (and of previous ones), the map and the bias."""
    exit, before = 3 * random(n, D) @ random(D, D, seed=1) + 1, 2 * random(n, D, seed=2) + 1
    weight, bias = random(D, 2 * D, seed=3), random(D, seed=4)
    weight[:, D:] *= previous
    final = features(exit, before) @ weight.T + bias + noise * random(n, D, seed=5) @ random(D, D, seed=6)
    return States(exit, before, final), weight, bias


def head(states: States, draft: Draft) -> Head:
    return Head(fit.ridge(states, draft), {"previous": draft.previous})


def loss(head: Head, states: States) -> float:
    return float((head(states.exit, states.previous) - states.final).double().square().sum())


class TestCollect:
    PROMPT, ANSWER = (40, 7, 66), (7, 21, 3, 64, 50)

    @pytest.mark.parametrize("exit_layer", [1, 3, 5])
    def test_states_are_of_the_positions_that_predict_the_answer(self, model: Llama, exit_layer: int) -> None:
        sequence = self.PROMPT + self.ANSWER
        got = fit.collect(model, sequence, len(self.PROMPT), exit_layer)
        assert len(got) == len(got.previous) == len(got.final) == len(self.ANSWER)
        for i in range(len(self.ANSWER)):  # each state from a pass of its own, over no more than it may see
            seen = sequence[: len(self.PROMPT) + i]
            exit = model.run(model.embed(seen), model.new_cache(len(seen)), 0, 0, exit_layer)
            final = model.norm(model.run(model.embed(seen), model.new_cache(len(seen)), 0, 0, 6))
            assert_close(got.exit[i], exit[-1], atol=1e-4, rtol=1e-4)
            assert_close(got.final[i], final[-1], atol=1e-4, rtol=1e-4)
            assert_close(got.previous[i], final[-2], atol=1e-4, rtol=1e-4)

    def test_the_final_states_predict_the_models_own_answer(self, model: Llama) -> None:
        answer: tuple[int, ...] = ()
        for _ in range(6):
            sequence = self.PROMPT + answer
            hidden = model.run(model.embed(sequence), model.new_cache(len(sequence)), 0, 0, 6)
            answer += (int(model.logits(model.norm(hidden[-1:])).argmax()),)
        states = fit.collect(model, self.PROMPT + answer, len(self.PROMPT), 3)
        assert tuple(model.logits(states.final).argmax(-1).tolist()) == answer

    def test_every_fifth_sequence_is_held_out_whole(self) -> None:
        parts = [States(*(torch.full((i + 1, D), float(i)) for _ in range(3))) for i in range(11)]
        train, heldout = fit.split(parts)
        assert sorted(set(heldout.exit[:, 0].tolist())) == [4, 9] and len(heldout) == 15
        assert sorted(set(train.final[:, 0].tolist())) == [0, 1, 2, 3, 5, 6, 7, 8, 10] and len(train) == 66 - 15
        assert torch.equal(train.exit, train.previous) and torch.equal(train.exit, train.final)


class TestClosedForm:
    def test_a_planted_map_is_recovered(self) -> None:
        states, weight, bias = planted()
        tensors = fit.ridge(states, AFFINE)
        assert_close(tensors["weight"], weight[:, :D], atol=2e-3, rtol=2e-3)
        assert_close(tensors["bias"], bias, atol=2e-3, rtol=2e-3)

    @pytest.mark.parametrize("draft", [AFFINE, LOW_RANK, replace(LOW_RANK, rank=D)], ids=["affine", "4", "full"])
    def test_the_previous_state_is_used_where_asked(self, draft: Draft) -> None:
        states, weight, _ = planted(previous=1.0)
        blind, seeing = head(states, draft), head(states, replace(draft, previous=True))
        assert loss(seeing, states) < 0.6 * loss(blind, states)
        if draft is AFFINE:
            assert_close(seeing.tensors["weight"], weight, atol=2e-3, rtol=2e-3)
        shuffled = replace(states, previous=states.previous.roll(1, 0))
        assert loss(seeing, shuffled) > loss(blind, states), "of its own position, not of any"
        assert loss(blind, shuffled) == loss(blind, states)

    @pytest.mark.parametrize("previous", [False, True])
    @pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
    def test_ridge_by_its_definition(self, strength: float, previous: bool) -> None:
        """As ordinary least squares with a row sqrt(lambda) e_j -> 0 added for every feature, constant included."""
        states, *_ = planted(noise=1.0, previous=1.0)
        x = features(states.exit, states.previous if previous else None).double()
        x = torch.cat((x, torch.ones(N, 1)), 1)
        root = (strength * x.square().sum() / x.shape[1]).sqrt()
        rows = torch.cat((x, root * torch.eye(x.shape[1])))
        wanted = torch.linalg.lstsq(rows, torch.cat((states.final.double(), torch.zeros(x.shape[1], D)))).solution
        got = fit.ridge(states, replace(AFFINE, ridge=strength, previous=previous))
        assert_close(torch.cat((got["weight"], got["bias"][:, None]), 1), wanted.T.float(), atol=1e-3, rtol=1e-3)

    def test_blocks_add_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        states, *_ = planted(noise=1.0)
        whole = fit.ridge(states, AFFINE)
        monkeypatch.setattr(fit, "_BATCH", 37)
        for name, tensor in fit.ridge(states, AFFINE).items():
            assert_close(tensor, whole[name], atol=1e-3, rtol=1e-3)

    def test_states_in_half_width_are_summed_in_float32(self) -> None:
        states, *_ = planted(noise=0.1)
        half = States(*(getattr(states, name).bfloat16() for name in States.__slots__))
        assert loss(head(half, AFFINE), states) < 1.05 * loss(head(states, AFFINE), states)


class TestLowRank:
    @pytest.mark.parametrize("previous", [False, True])
    @pytest.mark.parametrize("rank", [1, 4, 9])
    def test_no_map_of_that_rank_is_better(self, rank: int, previous: bool) -> None:
        """Beside the fitted scale: reduced-rank regression by its textbook, in float64 and by SVD."""
        states, *_ = planted(noise=0.3, previous=1.0)
        made = head(states, replace(LOW_RANK, rank=rank, previous=previous))
        t = made.tensors
        assert t["up"].shape == (D, rank) and t["down"].shape == (rank, 2 * D if previous else D)
        x = features(states.exit, states.previous if previous else None).double()
        y = states.final.double() - x[:, :D] * t["scale"]
        x, y = x - x.mean(0), y - y.mean(0)
        fitted = x @ torch.linalg.lstsq(x, y).solution
        leading = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
        best = float((y - fitted @ leading.T @ leading).square().sum())
        assert loss(made, states) == pytest.approx(best, rel=1e-5)
        assert best > loss(head(states, replace(AFFINE, previous=previous)), states) + N / 10, "rank matters here"

    @pytest.mark.parametrize("previous", [False, True])
    def test_full_rank_is_the_affine_map(self, previous: bool) -> None:
        states, *_ = planted(noise=1.0, previous=1.0)
        affine = head(states, replace(AFFINE, previous=previous))
        full = head(states, replace(LOW_RANK, rank=D, previous=previous))
        at = states.exit[:50], states.previous[:50]
        assert_close(full(*at), affine(*at), atol=2e-3, rtol=2e-3)

    def test_a_planted_scale_needs_no_rank(self) -> None:
        """Late exits: the final state is nearly a rescaled exit state."""
        exit = 3 * random(N, D)
        scale = random(D, seed=1)
        states = States(exit, exit, features(exit, None) * scale)
        made = head(states, replace(LOW_RANK, rank=1))
        assert_close(made.tensors["scale"], scale, atol=1e-3, rtol=1e-3)
        assert loss(made, states) < 1e-3 * N


class TestFitHead:
    @pytest.fixture
    def parts(self, model: Llama) -> tuple[States, States]:
        texts = torch.randint(80, (60, 24), generator=torch.Generator().manual_seed(1)).tolist()
        return fit.split([fit.collect(model, tuple(text), 4, 3) for text in texts])

    @pytest.mark.parametrize("draft", [AFFINE, LOW_RANK, replace(AFFINE, previous=True)], ids=["affine", "low", "prev"])
    def test_facts(self, model: Llama, parts: tuple[States, States], draft: Draft) -> None:
        train, heldout = parts
        made = fit.fit_head(model, train, heldout, replace(draft, ridge=1e-3), seed=0)
        facts = made.facts
        assert (facts["previous"], facts["form"]) == (draft.previous, "low_rank" if draft.rank else "affine")
        assert (facts["train_tokens"], facts["heldout_tokens"]) == (48 * 20, 12 * 20)
        assert facts["parameters"] == (32 * 2 + 64 * 4 if draft.rank else 32 * (65 if draft.previous else 33))
        for name, reading in (("agreement", made), ("raw_agreement", RawExit(model))):
            guess = model.logits(reading(heldout.exit, heldout.previous)).argmax(-1)
            assert facts[name] == pytest.approx(float((guess == model.logits(heldout.final).argmax(-1)).float().mean()))
        assert 0 < facts["raw_agreement"] < 1 and "sgd_gain" not in facts

    def test_agreement_in_blocks(
        self, model: Llama, parts: tuple[States, States], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = fit.agreement(model, RawExit(model), parts[1])
        monkeypatch.setattr(fit, "_BATCH", 7)
        assert fit.agreement(model, RawExit(model), parts[1]) == whole
        perfect = replace(parts[1], exit=parts[1].final)
        assert fit.agreement(model, lambda hidden, previous: hidden, perfect) == 1

    @pytest.mark.parametrize("previous", [False, True])
    @pytest.mark.parametrize("form", HeadForm)
    def test_sgd_minds_what_least_squares_does_not(self, model: Llama, form: HeadForm, previous: bool) -> None:
        """Planted: a few huge states drag the squares along; the tokens they give are few all the same."""
        model.lm_head = 50 * random(80, 32, seed=1)
        exit = random(5000, 32, seed=2)
        final = 0.02 * features(exit, None) @ random(32, 32, seed=3)
        final[::23] *= -20
        parts = [States(exit[i::5], random(1000, 32, seed=i), final[i::5]) for i in range(5)]
        rank = 16 if form is HeadForm.low_rank else None
        draft = Draft("lsq", 3, form, rank, previous, ridge=1e-3, sgd_epochs=8)
        made = fit.fit_head(model, *fit.split(parts), draft, seed=0)
        closed = fit.fit_head(model, *fit.split(parts), replace(draft, sgd_epochs=0), seed=0)
        assert made.facts["sgd_gain"] == pytest.approx(made.facts["agreement"] - closed.facts["agreement"])
        assert made.facts["sgd_gain"] > 0.05
        assert {t.requires_grad for t in made.tensors.values()} == {False}
        again = fit.fit_head(model, *fit.split(parts), draft, seed=0)
        for name, tensor in again.tensors.items():
            assert torch.equal(tensor, made.tensors[name]), "the seed settles it"
        assert made.facts["parameters"] == closed.facts["parameters"]
