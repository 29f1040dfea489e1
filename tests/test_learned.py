"""Learned drafts through the real loop: whatever was fitted, tokens are plain decoding's, one by one or in a batch."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfspec.axes import DRAFT, GATE, POLICY, DraftOptions
from selfspec.engine.torch.session import Scheduler
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation import fit
from selfspec.speculation.beam import DEEPER
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.draft.medusa import HeadInit
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, HeadForm
from selfspec.speculation.policy.base import Policy
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sampling import Purpose, draw, uniform
from selfspec.types import Completion, Request, Sampling

pytestmark = pytest.mark.usefixtures("inference")

K, EXIT, NEW = 4, 3, 16
DRAFTS = {
    "raw": DRAFT.new("layerskip", exit_layer=EXIT),
    "lsq": DRAFT.new("lsq", exit_layer=EXIT, form=HeadForm.affine, ridge=1e-3, previous=True),
    "low rank": DRAFT.new("lsq", exit_layer=EXIT, form=HeadForm.low_rank, rank=8, ridge=1e-3, sgd_epochs=1),
    "medusa": DRAFT.new("medusa", heads=3, init=HeadInit.lsq, ridge=1e-3),
    "medusa block": DRAFT.new("medusa", heads=5, init=HeadInit.copy, sgd_epochs=2),
    "extrapolated": DRAFT.new("eagle", alpha=0.2),
    "eagle": DRAFT.new("eagle", form=HeadForm.affine, ridge=1e-3),
}


class Bench:
    """A tiny model that says its prompts' answers in many ways, and what drafts are fitted on."""

    def __init__(self, folder: Path) -> None:
        self.model = Llama.load(folder, torch.device("cpu"), torch.float32)
        self.model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
        random = torch.Generator().manual_seed(2)
        lengths = torch.randint(3, 12, (40,), generator=random).tolist()
        prompts = [tuple(torch.randint(5, 80, (n,), generator=random).tolist()) for n in lengths]
        self.requests = [Request(prompt, NEW, ignore_eos=True) for prompt in prompts]
        self.plain = self.run(Draft(self.model), self.requests, rows=8, k=0)
        self.traces = [
            fit.trace(self.model, request.tokens, answer.tokens, EXIT)
            for request, answer in zip(self.requests, self.plain, strict=True)
        ]
        self.fitted: dict[str, Head] = {}

    def run(
        self,
        draft: Draft,
        requests: list[Request],
        rows: int,
        k: int = K,
        doubt: Gate | None = None,
        judge: Policy | None = None,
    ) -> list[Completion]:
        target = Target(self.model, 6, self.model.norm)
        speculation = Speculation(target, draft, doubt or Gate(), Controller(k), judge or LongestPrefix())
        capacity = max(len(r.tokens) + r.max_new_tokens for r in requests) + draft.nodes(k)
        return Scheduler(speculation, self.model.new_cache(capacity, rows, draft.layers)).run(requests)

    def make(self, draft: DraftOptions) -> Draft:
        """Fitted where it is to be, saved and loaded."""
        head = None
        if draft.fitted:
            shaped = replace(draft, width=1, budget=None, sample=False)
            if str(shaped) not in self.fitted:
                self.fitted[str(shaped)] = shaped.fit(self.model, *fit.split(self.traces), 0)
            head = self.fitted[str(shaped)]
        made: Draft = draft.make(self.model, head)
        return made


@pytest.fixture(scope="module")
def bench(tiny_folder: Path, inference: None) -> Bench:
    return Bench(tiny_folder)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "width, budget, vocab", [(1, None, None), (3, 7, 30), (2, None, None)], ids=["chain", "tree", "whole tree"]
)
@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_are_plain_decodings(
    bench: Bench, name: str, width: int, budget: int | None, vocab: int | None, rows: int
) -> None:
    draft = bench.make(replace(DRAFTS[name], vocab=vocab, width=width, budget=budget))
    for doubt in (Gate(), GATE.new("maxp", threshold=0.4).make()):
        got = bench.run(draft, bench.requests[:4], rows, doubt=doubt)
        assert [a.tokens for a in got] == [a.tokens for a in bench.plain[:4]]
        cycles = [cycle for answer in got for cycle in answer.cycles]
        heads = DRAFTS[name].get("heads", K)
        for cycle in cycles:
            depth = min(cycle.k_asked, heads)
            assert cycle.accepted <= cycle.depth <= depth and cycle.depth <= cycle.proposed
            assert cycle.proposed < draft.nodes(cycle.k_asked)
            if doubt.reads:
                doubted = len(cycle.signals) - sum(signal >= 0.4 for signal in cycle.signals)
                assert doubted in (0, 1) and all(signal >= 0.4 for signal in cycle.signals[:-1])
                assert cycle.depth <= len(cycle.signals) - doubted <= depth
                if width == 1:
                    assert cycle.proposed == len(cycle.signals) - doubted
            elif width == 1:
                assert cycle.proposed == depth
        if not doubt.reads:
            assert sum(cycle.accepted for cycle in cycles) > 0, "or little is shown"
        if width > 1:
            assert max(cycle.proposed for cycle in cycles) > K, "trees"


@pytest.mark.parametrize(
    "width, budget, worth",
    [(1, None, 0), (3, None, 0), (3, 5, 0), (2, 3, 0), (8, None, 0.01), (8, 6, 0.03), (4, None, 1)],
)
def test_an_exits_tree_by_its_definition(bench: Bench, width: int, budget: int | None, worth: float) -> None:
    """The likeliest nodes of a path of likeliest tokens, and of the next likeliest beside each of these."""
    model, ks = bench.model, [4, 2, 0]
    draft = bench.make(replace(DRAFTS["raw"], width=width, budget=budget, worth=worth))
    speculation = Speculation(Target(model, 6, model.norm), draft, Gate(), Controller(K), LongestPrefix())
    session = Scheduler(speculation, model.new_cache(60, 3))
    for request in bench.requests[:3]:
        session.submit(request)
    session.step()
    rows = session.running
    for row, k, tree in zip(rows, ks, draft.propose(rows, ks, Gate(), session.cache).trees, strict=True):
        said, pool, path = list(row.tokens), [], 0.0
        for step in range(min(k, budget or k)):
            if path < math.log(DEEPER * worth or 1e-99):
                break
            alone = model.new_cache(len(said))
            at = alone.place([Tree.chain(said)], row=alone.admit())
            exit = model.run(model.embed(said, at), alone, at, 0, EXIT)[-1:]
            log_p = model.logits(model.norm(exit))[0].log_softmax(-1).topk(width)
            scores = [path + value for value in log_p.values.tolist()]
            best, *others = log_p.indices.tolist()
            pool += [
                (scores[0], step, best, 0),
                *((s, step, token, 1) for s, token in zip(scores[1:], others, strict=True)),
            ]
            said.append(best)
            path = scores[0]
        likely = sorted((node for node in pool if node[0] >= math.log(worth or 1e-99)), reverse=True)[:budget]
        chain, leaves = ([(token, at) for _, at, token, leaf in likely if leaf == which] for which in (0, 1))
        assert tree.tokens == [row.tokens[-1], *(token for token, _ in chain + leaves)]
        assert tree.parents == [*range(-1, len(chain)), *(parent for _, parent in leaves)]
        assert worth < 1 or len(tree) == 1
        assert len(tree) <= draft.nodes(k)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raw", "medusa", "eagle"])
def test_a_tree_accepts_more_than_its_chain(bench: Bench, name: str) -> None:
    def accepted(width: int) -> int:
        got = bench.run(bench.make(replace(DRAFTS[name], vocab=40, width=width)), bench.requests, rows=8)
        return sum(cycle.accepted for answer in got for cycle in answer.cycles)

    assert accepted(4) > accepted(1)


@pytest.mark.parametrize("vocab", [None, 30])
@pytest.mark.parametrize("name", ["raw", "medusa", "eagle"])
def test_sampled_chains(bench: Bench, name: str, vocab: int | None) -> None:
    """Each token is drawn from what its tree says; and what a row says does not depend on its neighbours."""
    draft = bench.make(replace(DRAFTS[name], vocab=vocab, sample=True))
    judge = POLICY.new("rejection", temperature=1.5).make()
    trees = []
    propose = draft.propose

    def watched(rows, ks, doubt, cache):  # type: ignore[no-untyped-def]
        proposal = propose(rows, ks, doubt, cache)
        trees.extend((row, len(row.tokens), tree) for row, tree in zip(rows, proposal.trees, strict=True))
        return proposal

    draft.propose = watched  # type: ignore[method-assign]
    requests = [
        replace(request, sampling=Sampling(1.5 if i % 3 else 0.0, top_k=12, seed=i))
        for i, request in enumerate(bench.requests[:6])
    ]
    alone, together = (bench.run(draft, requests, rows, judge=judge) for rows in (1, 4))
    assert [a.tokens for a in alone] == [a.tokens for a in together]
    assert [a.tokens for a in alone][::3] == [a.tokens for a in bench.plain[:6:3]], "greedy rows stay greedy"
    likely = 0
    for row, position, tree in trees:
        if row.request.sampling.temperature == 0 or len(tree) == 1:
            assert tree.drawn_from is None
            continue
        q = tree.drawn_from
        assert q.shape == (len(tree) - 1, 80) and q.dtype == torch.float32
        torch.testing.assert_close(q.sum(-1), torch.ones(len(q)))
        assert (q > 0).sum(-1).tolist() == [12] * len(q)
        if vocab:
            ids = bench.fitted[str(replace(DRAFTS[name], vocab=vocab))].tensors["ids"]
            assert set(q.nonzero()[:, 1].tolist()) <= set(ids.tolist())
        chosen = q.gather(1, torch.tensor(tree.tokens[1:])[:, None])[:, 0]
        assert bool((chosen > 0).all())
        for ahead, token in enumerate(tree.tokens[1:]):
            u = uniform(row.request.sampling.seed, position + ahead, Purpose.draft, ahead)
            assert token == draw(q[ahead], u), "by a number of its own"
        likely += int((chosen == q.amax(-1)).sum())
    drawn = sum(len(tree) - 1 for *_, tree in trees if tree.drawn_from is not None)
    assert 0.1 * drawn < likely < 0.9 * drawn, "drawn, and not the likeliest each time"


def test_a_seen_trace_is_of_the_models_own_words(bench: Bench) -> None:
    trace: Trace = bench.traces[0]
    assert bench.model.logits(trace.final[trace.at]).argmax(-1).tolist() == trace.tokens[trace.at + 1].tolist()
