"""eagle: states foretold from states, by extrapolation or regression, and the trees that grow from them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from selfspec.axes import DRAFT, GATE
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation import fit
from selfspec.speculation.draft import eagle
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, HeadForm, features
from selfspec.speculation.sequence import Seq
from selfspec.types import Request, Sampling

pytestmark = pytest.mark.usefixtures("inference")

EAGLE = DRAFT.new("eagle", form=HeadForm.affine, ridge=1e-6)


@pytest.fixture
def model(tiny_folder: Path) -> Llama:
    """Every final state depends on its own token alone: what is drafted can be right for ever."""
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    for layer in model.layers:
        layer.out.zero_()
        layer.down.zero_()
    return model


@pytest.fixture
def traces(model: Llama) -> list[Trace]:
    """The model's own answers to two tokens each."""
    follows = model.logits(model.norm(model.embedding)).argmax(-1).tolist()
    texts = []
    for start in torch.randint(80, (100, 2), generator=torch.Generator().manual_seed(1)).tolist():
        text = list(start)
        while len(text) < 14:
            text.append(follows[text[-1]])
        texts.append(fit.trace(model, text[:2], text[2:], None))
    return texts


def row(token: int, seed: int = 0) -> Seq:
    state = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    made = Seq(Request((4, 5), 20))
    made.tokens, made.state = [4, 5, token], state
    return made


def random_head(vocab: int | None = None) -> Head:
    random = torch.Generator().manual_seed(4)
    tensors = {"weight": torch.randn(32, 64, generator=random), "bias": torch.randn(32, generator=random)}
    return Head(tensors | ({"ids": torch.arange(vocab)} if vocab else {}), {})


def propose(draft: eagle.Eagle, rows: list[Seq], ks: list[int], doubt: Gate | None = None) -> list[Tree]:
    return draft.propose(rows, ks, doubt or Gate(), draft.model.new_cache(0)).trees


class TestExtrapolation:
    def test_it_goes_on_in_a_straight_line(self, model: Llama) -> None:
        for alpha in (0.0, 0.5, 2.0):
            draft = DRAFT.new("eagle", alpha=alpha).make(model, None)
            at, (before, h) = row(7), torch.randn(2, 32, generator=torch.Generator().manual_seed(8))
            draft.observe(at, 0, [1, 2, 3], torch.stack((torch.ones(32), before, h)), model.new_cache(0))
            wanted = [7]
            for _ in range(4):
                before, h = h, h + alpha * (h - before)
                wanted.append(int(model.logits(h[None]).argmax()))
            assert propose(draft, [at], [4])[0].tokens == wanted

    def test_it_remembers_the_last_two_verified_states(self, model: Llama) -> None:
        draft, at = DRAFT.new("eagle", alpha=1.0).make(model, None), row(7)
        states = torch.randn(6, 32, generator=torch.Generator().manual_seed(9))
        draft.observe(at, 0, [1], states[:1], model.new_cache(0))
        assert torch.equal(at.memory, torch.cat((states[0], states[0]))[None]), "of one token there is one"
        draft.observe(at, 0, [1, 2], states[1:3], model.new_cache(0))
        assert torch.equal(at.memory, torch.cat((states[2], states[1]))[None])
        draft.observe(at, 0, [1], states[3:4], model.new_cache(0))
        assert torch.equal(at.memory, torch.cat((states[3], states[2]))[None])

    def test_its_agreement_is_that_of_its_drafts(self, model: Llama, traces: list[Trace]) -> None:
        """Nothing but a vocabulary is fitted."""
        config = DRAFT.new("eagle", alpha=0.3, vocab=60)
        made = config.fit(model, *fit.split(traces), 0)
        assert list(made.tensors) == ["ids"] and made.facts["parameters"] == 0
        draft, right = config.make(model, made), [0] * 6
        for trace in fit.split(traces)[1]:
            for root in trace.at.tolist():
                at = row(int(trace.tokens[root]))
                draft.observe(at, 0, [0], trace.final[max(root - 2, 0) : root], model.new_cache(0))
                for step, token in enumerate(propose(draft, [at], [5])[0].tokens):
                    if root + step >= len(trace.tokens) or token != trace.tokens[root + step]:
                        break
                    right[step] += 1
        assert made.facts["agreement"] == pytest.approx(right[1] / right[0]) and right[1] > 0


class TestRegression:
    def test_what_is_an_affine_map_is_foretold_for_ever(self, model: Llama, traces: list[Trace]) -> None:
        head = EAGLE.fit(model, *fit.split(traces), 0)
        assert head.facts["agreement_by_position"] == [1.0] * 5
        assert head.facts["parameters"] == 32 * 65
        follows = model.logits(model.norm(model.embedding)).argmax(-1).tolist()
        (tree,) = propose(EAGLE.make(model, head), [row(7)], [9])
        assert tree.tokens[1:] == [follows[token] for token in tree.tokens[:-1]] and tree.is_chain

    def test_training_holds_over_its_own_states(self, model: Llama, traces: list[Trace]) -> None:
        """Planted: of so low a rank the closed form is poor, and cross-entropy is what counts."""
        draft = replace(EAGLE, form=HeadForm.low_rank, rank=4, vocab=70)
        before = draft.fit(model, *fit.split(traces), 0).facts
        after = replace(draft, sgd_epochs=20).fit(model, *fit.split(traces), 0)
        assert after.facts["sgd_gain"] == pytest.approx(after.facts["agreement"] - before["agreement"])
        assert after.facts["sgd_gain"] > 0.05
        lengths = [sum(torch.tensor(facts["agreement_by_position"]).cumprod(0)) for facts in (before, after.facts)]
        assert lengths[1] > lengths[0] + 0.1
        again = replace(draft, sgd_epochs=20).fit(model, *fit.split(traces), 0)
        assert all(torch.equal(t, after.tensors[name]) for name, t in again.tensors.items())

    def test_short_answers_are_passed_over(self, model: Llama, traces: list[Trace]) -> None:
        short = fit.trace(model, [3, 4], [5, 6], None)
        assert replace(EAGLE, sgd_epochs=1).fit(model, [short, *traces[:9]], traces[9:], 0).facts["agreement"] > 0


class TestTrees:
    @pytest.mark.parametrize("vocab", [None, 9])
    @pytest.mark.parametrize("width, budget", [(1, None), (2, None), (3, 6), (4, 20)])
    def test_by_brute_force(self, model: Llama, width: int, budget: int | None, vocab: int | None) -> None:
        """Every path is followed by itself; at each depth the likeliest go on; of all, the likeliest are proposed."""
        head, k = random_head(vocab), 3
        rows = [row(7, 1), row(20, 2), row(3, 3)]
        trees = propose(replace(EAGLE, width=width, budget=budget).make(model, head), rows, [k, 1, 2])
        for at, depth, tree in zip(rows, [k, 1, 2], trees, strict=True):
            paths, pool = {(at.tokens[-1],): (0.0, at.state)}, {}
            for _ in range(depth):
                born = {}
                for path, (score, state) in paths.items():
                    x = features(state, model.embedding[[path[-1]]])
                    state = x @ head.tensors["weight"].T + head.tensors["bias"]
                    log_p = model.logits(state)[0, :vocab].log_softmax(-1)
                    best = log_p.topk(width)
                    for token, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                        born[(*path, token)] = (score + p, state)
                pool |= {path: score for path, (score, _) in born.items()}
                paths = dict(sorted(born.items(), key=lambda item: -item[1][0])[:width])
            wanted = sorted(pool, key=lambda path: -pool[path])[:budget] if width > 1 else list(pool)
            assert {path_of(tree, node) for node in range(1, len(tree))} == set(wanted)
            assert (
                len(tree)
                == len(wanted) + 1
                <= replace(EAGLE, width=width, budget=budget).make(model, head).nodes(depth)
            )

    @pytest.mark.parametrize("width", [1, 3])
    def test_the_gate_judges_the_likeliest_path(self, model: Llama, width: int) -> None:
        """Each row stops where its own likeliest path is doubted; what was proposed before stays."""
        rows, draft = [row(t, t) for t in range(8)], replace(EAGLE, width=width).make(model, random_head())
        free = propose(draft, rows, [4] * 8, GATE.new("maxp", threshold=0.0).make())
        doubt = GATE.new("maxp", threshold=0.9).make()
        stopped = propose(draft, rows, [4] * 8, doubt)
        depths = set()
        for at, whole, cut in zip(rows, free, stopped, strict=True):
            assert propose(draft, [at], [4], doubt)[0].signals == pytest.approx(cut.signals, rel=1e-4)
            sure = next((i for i, signal in enumerate(whole.signals) if signal < 0.9), 4)
            assert len(whole.signals) == 4
            assert cut.signals == pytest.approx(whole.signals[: sure + 1], rel=1e-4)
            wanted = [n for n, depth in enumerate(whole.depths()) if depth <= sure]
            assert cut.tokens == [whole.tokens[n] for n in wanted] and max(cut.depths()) == sure
            depths.add(sure)
        assert len(depths) > 1

    def test_a_drawn_chain_goes_on_from_what_was_drawn(self, model: Llama) -> None:
        head, at = random_head(50), row(7)
        at.request = replace(at.request, sampling=Sampling(60.0, seed=5))
        (tree,) = propose(replace(EAGLE, sample=True).make(model, head), [at], [4])
        state, greedy = at.state, 0
        assert tree.drawn_from is not None and len(tree.drawn_from) == 4
        for token, drawn, q in zip(tree.tokens, tree.tokens[1:], tree.drawn_from, strict=False):
            state = features(state, model.embedding[[token]]) @ head.tensors["weight"].T + head.tensors["bias"]
            logits = model.logits(state)[0, :50]
            assert_close(q[:50], (logits / 60).softmax(-1))
            assert float(q[50:].sum()) == 0
            greedy += drawn == int(logits.argmax())
        assert greedy < 4

    def test_a_chain_may_be_cut_by_its_budget(self, model: Llama) -> None:
        (tree,) = propose(replace(EAGLE, budget=2).make(model, random_head()), [row(7)], [4])
        assert len(tree) == 3 and tree.is_chain

    def test_of_nothing_asked_nothing_comes(self, model: Llama) -> None:
        trees = propose(EAGLE.make(model, random_head()), [row(7), row(9)], [0, 0])
        assert [tree.tokens for tree in trees] == [[7], [9]]


def path_of(tree: Tree, node: int) -> tuple[int, ...]:
    own = (tree.tokens[node],)
    return own if node == 0 else path_of(tree, tree.parents[node]) + own
