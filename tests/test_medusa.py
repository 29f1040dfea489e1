"""medusa: which head says which position, from what they start, and what training gives them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from selfspec.axes import DRAFT, GATE
from selfspec.model.llama import Llama
from selfspec.speculation import fit
from selfspec.speculation.draft import medusa
from selfspec.speculation.draft.medusa import HeadInit
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.sequence import Seq
from selfspec.types import Request, Sampling

pytestmark = pytest.mark.usefixtures("inference")

MEDUSA = DRAFT.new("medusa", heads=3, init=HeadInit.lsq, ridge=1e-6)


@pytest.fixture
def model(tiny_folder: Path) -> Llama:
    """Every final state depends on its own token alone, and so each token on the one before."""
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    for layer in model.layers:
        layer.out.zero_()
        layer.down.zero_()
    return model


@pytest.fixture
def traces(model: Llama) -> list[Trace]:
    """Texts of which each token is the model's own, but for one in four."""
    random = torch.Generator().manual_seed(1)
    follows = model.logits(model.norm(model.embedding)).argmax(-1).tolist()
    texts = []
    for _ in range(100):
        text = torch.randint(80, (2,), generator=random).tolist()
        while len(text) < 24:
            strange = int(torch.randint(4, (), generator=random)) == 0
            text.append(int(torch.randint(80, (), generator=random)) if strange else follows[text[-1]])
        texts.append(fit.trace(model, text[:2], text[2:], None))
    return texts


def row(model: Llama, token: int, seed: int = 0) -> Seq:
    state = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    made = Seq(Request((4, 5), 20))
    made.tokens, made.state = [4, 5, token], state
    return made


def planted(model: Llama, tokens: list[int]) -> Head:
    """Heads that say these tokens, whatever they see."""
    bias = torch.cat([1e4 * model.lm_head[token] for token in tokens])
    tensors = {"weight": torch.zeros(32 * len(tokens), 64), "bias": bias}
    return Head(tensors, {"heads": len(tokens), "block": False})


class TestPropose:
    def test_head_j_says_position_j(self, model: Llama) -> None:
        draft = MEDUSA.make(model, planted(model, [11, 22, 33]))
        rows = [row(model, 7), row(model, 8), row(model, 9), row(model, 10)]
        trees = draft.propose(rows, [2, 0, 3, 9], Gate(), model.new_cache(0)).trees
        assert [tree.tokens for tree in trees] == [[7, 11, 22], [8], [9, 11, 22, 33], [10, 11, 22, 33]]
        assert all(tree.is_chain for tree in trees)
        assert draft.nodes(2) == 3 and draft.nodes(9) == 4

    def test_every_row_is_read_from_its_own_state_and_token(self, model: Llama, traces: list[Trace]) -> None:
        head = MEDUSA.fit(model, *fit.split(traces), 0)
        draft = replace(MEDUSA, width=3).make(model, head)
        rows = [row(model, 7, 1), row(model, 7, 2), row(model, 50, 1)]
        together = draft.propose(rows, [3] * 3, Gate(), model.new_cache(0)).trees
        alone = [draft.propose([r], [3], Gate(), model.new_cache(0)).trees[0] for r in rows]
        assert [(t.tokens, t.parents) for t in together] == [(t.tokens, t.parents) for t in alone]
        assert len({tuple(tree.tokens[1:]) for tree in together}) == 3

    def test_by_its_definition(self, model: Llama) -> None:
        random = torch.Generator().manual_seed(3)
        weight, bias = torch.randn(96, 64, generator=random), torch.randn(96, generator=random)
        state, verified = torch.randn(2, 5, 32, generator=random)
        unit = [x / x.square().mean(-1, keepdim=True).sqrt() for x in (state, verified)]
        for block in (False, True):
            for j in range(3):
                change = torch.cat(unit, -1) @ weight[32 * j : 32 * j + 32].T + bias[32 * j : 32 * j + 32]
                wanted = state + (F.silu(change) if block else change)
                assert_close(
                    medusa.estimate(weight, bias, block, state, verified, 3)[:, j], wanted, atol=1e-4, rtol=1e-4
                )

    def test_the_gate_judges_the_best_of_every_position(self, model: Llama) -> None:
        head = planted(model, [11, 22, 33])
        head.tensors["bias"][32:64] = 0  # of the second position, it is not sure
        for width, wanted in ((1, [7, 11]), (2, [7, 11])):
            draft = replace(MEDUSA, width=width).make(model, head)
            doubt = GATE.new("maxp", threshold=0.99).make()
            seq = row(model, 7)
            seq.state = torch.zeros(1, 32)
            (tree,) = draft.propose([seq], [3], doubt, model.new_cache(0)).trees
            assert tree.tokens[:2] == wanted and max(tree.depths()) == 1 and len(tree) == 1 + width
            assert len(tree.signals) == 2 and tree.signals[0] > 0.99 > tree.signals[1]

    def test_every_row_is_judged_by_itself(self, model: Llama, traces: list[Trace]) -> None:
        draft = MEDUSA.make(model, MEDUSA.fit(model, *fit.split(traces), 0))
        rows, ks, doubt = [row(model, t, t) for t in range(12)], [3, 1] * 6, GATE.new("maxp", threshold=0.6).make()
        together = draft.propose(rows, ks, doubt, model.new_cache(0)).trees
        for r, k, tree in zip(rows, ks, together, strict=True):
            (alone,) = draft.propose([r], [k], doubt, model.new_cache(0)).trees
            assert tree.tokens == alone.tokens
            assert tree.signals == pytest.approx(alone.signals, rel=1e-4)
        assert len({len(tree) for tree in together}) > 2

    def test_each_position_is_drawn_from_its_own_head(self, model: Llama, traces: list[Trace]) -> None:
        head = replace(MEDUSA, vocab=50).fit(model, *fit.split(traces), 0)
        draft = replace(MEDUSA, sample=True).make(model, head)
        at = row(model, 7)
        at.request = replace(at.request, sampling=Sampling(2.0))
        (tree,) = draft.propose([at], [3], Gate(), model.new_cache(0)).trees
        t, ids = head.tensors, head.tensors["ids"]
        later = medusa.estimate(t["weight"], t["bias"], False, at.state, model.embedding[[7]], 3)[0]
        wanted = torch.zeros(3, 80)
        wanted[:, ids] = (model.logits(later)[:, ids] / 2).softmax(-1)
        assert tree.drawn_from is not None
        assert_close(tree.drawn_from, wanted)


class TestFit:
    def test_the_first_head_is_exact_where_the_verified_token_says_it_all(
        self, model: Llama, traces: list[Trace]
    ) -> None:
        """Planted: a head that reads f only could not know; the later ones have more to guess."""
        train, heldout = fit.split([own(model, trace) for trace in traces])
        facts = MEDUSA.fit(model, train, heldout, 0).facts
        assert facts["agreement_by_position"][0] == 1 and len(facts["agreement_by_position"]) == 3
        assert facts["parameters"] == 3 * 32 * 65 and facts["agreement"] == 1

    def test_each_later_state_is_regressed_on(self, model: Llama, traces: list[Trace]) -> None:
        t = MEDUSA.fit(model, *fit.split(traces), 0).tensors
        residuals: list[list[Tensor]] = [[], [], []]
        seen = []
        for trace in fit.split(traces)[0]:
            for root in range(trace.first, len(trace.tokens) - 3):
                seen.append((trace.final[root - 1], model.embedding[trace.tokens[root]]))
                for j in range(3):
                    residuals[j].append(trace.final[root + j])
        state, verified = (torch.stack(part) for part in zip(*seen, strict=True))
        got = medusa.estimate(t["weight"], t["bias"], False, state, verified, 3)
        x = torch.cat([F.rms_norm(state, (32,)), F.rms_norm(verified, (32,)), torch.ones(len(state), 1)], -1)
        for j in range(3):
            best = x @ torch.linalg.lstsq(x, torch.stack(residuals[j]) - state).solution + state
            assert_close(got[:, j], best, atol=2e-2, rtol=2e-2)

    @pytest.mark.parametrize("init", [HeadInit.tie, HeadInit.copy])
    def test_untrained_every_head_reads_the_state_itself(
        self, model: Llama, traces: list[Trace], init: HeadInit
    ) -> None:
        head = replace(MEDUSA, init=init, ridge=None).fit(model, *fit.split(traces), 0)
        assert head.facts["block"] == (init is HeadInit.copy)
        at = row(model, 7)
        (tree,) = MEDUSA.make(model, head).propose([at], [3], Gate(), model.new_cache(0)).trees
        assert tree.tokens == [7] + [int(model.logits(at.state).argmax())] * 3

    def test_random_heads_begin_by_the_seed(self, model: Llama, traces: list[Trace]) -> None:
        draft = replace(MEDUSA, init=HeadInit.random)
        one, again, other = (draft.fit(model, *fit.split(traces), seed).tensors["weight"] for seed in (1, 1, 2))
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert 0.12 < float(one.max()) <= 64**-0.5 and float(one.min()) < -0.12

    @pytest.mark.slow
    @pytest.mark.parametrize("init", list(HeadInit))
    def test_training_helps(self, model: Llama, traces: list[Trace], init: HeadInit) -> None:
        """What follows what follows is no affine map of it."""
        draft = replace(MEDUSA, init=init, vocab=70)
        train, heldout = fit.split([own(model, trace) for trace in traces])
        before = draft.fit(model, train, heldout, 0)
        after = replace(draft, sgd_epochs=30).fit(model, train, heldout, 0)
        gained = after.facts["agreement"] - before.facts["agreement"]
        assert after.facts["sgd_gain"] == pytest.approx(gained)
        expected = [sum(torch.tensor(h.facts["agreement_by_position"]).cumprod(0)) for h in (before, after)]
        assert expected[1] > expected[0] + 0.05
        again = replace(draft, sgd_epochs=30).fit(model, train, heldout, 0)
        assert all(torch.equal(t, after.tensors[name]) for name, t in again.tensors.items())

    def test_answers_shorter_than_the_heads_are_passed_over(self, model: Llama, traces: list[Trace]) -> None:
        short = fit.trace(model, [3, 4], [5, 6], None)
        with_it, without = ([*[short] * n, *traces[:30]] for n in (3, 0))
        draft = replace(MEDUSA, sgd_epochs=1)
        one, other = (draft.fit(model, parts, traces[30:35], 0).tensors for parts in (with_it, without))
        assert all(torch.equal(t, other[name]) for name, t in one.items())


def own(model: Llama, trace: Trace) -> Trace:
    """The same states, and after each the model's own token: what is never strange."""
    follows = model.logits(model.norm(model.embedding)).argmax(-1)
    tokens = trace.tokens[:2].tolist()
    while len(tokens) < len(trace.tokens):
        tokens.append(int(follows[tokens[-1]]))
    return fit.trace(model, tokens[:2], tokens[2:], None)
