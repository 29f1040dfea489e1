"""The trained block: identity through the loop, keys and values that are complete, and what training adds."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache as memo
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfspec.axes import DRAFT
from selfspec.engine.torch.session import Scheduler
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation import block
from selfspec.speculation import fit as fitting
from selfspec.speculation.block import Block
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, HeadForm
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.readout import Readout
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Request

pytestmark = pytest.mark.usefixtures("inference")

EXIT = 1
CONFIGS = {
    "adapter": DRAFT.new("adapter", exit_layer=EXIT, ridge=1e-3, sgd_epochs=5, vocab=60),
    "eagle": DRAFT.new("eagle", form=HeadForm.block, ridge=1e-3, sgd_epochs=5, vocab=60),
}


class Bench:
    """The tiny model, made unruly; traces of its own answers; and blocks trained on them."""

    def __init__(self, folder: Path) -> None:
        self.model = Llama.load(folder, torch.device("cpu"), torch.float32)
        for layer in self.model.layers[EXIT + 1 :]:
            layer.out *= 4
            layer.down *= 4
        self.model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
        self.model.shape = replace(self.model.shape, eos=frozenset({9}))
        random = torch.Generator().manual_seed(6)
        prompts = [tuple(torch.randint(80, (n,), generator=random).tolist()) for n in (3, 12, 30, 1, 5)]
        self.requests = [Request(prompt, 16 + i, ignore_eos=i != 1) for i, prompt in enumerate(prompts)]
        prompts = [tuple(torch.randint(80, (6,), generator=random).tolist()) for _ in range(200)]
        asked = [Request(prompt, 20, ignore_eos=True) for prompt in prompts]
        self.pairs = list(zip(prompts, self.decode(Draft(self.model), asked, 0, 50), strict=True))
        self.plain = self.decode(Draft(self.model), self.requests, 0, 1)

    @memo  # noqa: B019
    def halves(self, name: str) -> tuple[list[Trace], list[Trace]]:
        exit_layer = CONFIGS[name].get("exit_layer")
        return fitting.split([fitting.trace(self.model, p, run.tokens, exit_layer) for p, run in self.pairs])

    @memo  # noqa: B019
    def head(self, name: str) -> Head:
        head: Head = CONFIGS[name].fit(self.model, *self.halves(name), 0)
        return head

    def draft(self, name: str, width: int = 1, budget: int | None = None) -> Draft:
        draft: Draft = replace(CONFIGS[name], width=width, budget=budget).make(self.model, self.head(name))
        return draft

    def decode(
        self, draft: Draft, requests: list[Request], k: int, rows: int, gate: Gate | None = None
    ) -> list[Completion]:
        target = Target(self.model, self.model.shape.layers, self.model.norm)
        cache = self.model.new_cache(60 + draft.nodes(k), rows, draft.layers)
        cache.kv.fill_(99.0)  # what is read must have been written
        speculation = Speculation(target, draft, gate or Gate(), Controller(k), LongestPrefix())
        return Scheduler(speculation, cache).run(requests)


@pytest.fixture(scope="module")
def bench(tiny_folder: Path, inference: None) -> Bench:
    return Bench(tiny_folder)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("width", "budget"), [(1, None), (3, 7)], ids=["chain", "tree"])
@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_of_what_stands_are_those_of_one_pass(
    bench: Bench, name: str, width: int, budget: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was accepted, rejected or evicted before; trees keep a path that is no prefix of theirs."""
    draft, model, checks = bench.draft(name, width, budget), bench.model, []
    layer, observe = model.shape.layers, draft.observe

    def checked(row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        observe(row, index, tokens, states, cache)
        stands = row.tokens[: cache.lengths[index]]
        fresh = model.new_cache(len(stands), 1, 1)
        at = fresh.place([Tree.chain(stands)], row=fresh.admit())
        exit = model.run(model.embed(stands, at), fresh, at, 0, EXIT)
        final = model.norm(model.run(exit, fresh, at, EXIT, layer))
        one_pass = Trace(torch.tensor(stands), final, exit if name == "adapter" else None, 1)
        Block(bench.head(name).tensors, model.shape).write(block.whole(model, one_pass, name == "eagle"), fresh, at)
        ours, theirs = (kv.kv[layer, :, r, :, : len(stands)] for kv, r in ((cache, index), (fresh, 0)))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        checks.append(len(stands))

    monkeypatch.setattr(draft, "observe", checked)
    got = bench.decode(draft, bench.requests, 3, rows)
    assert [run.tokens for run in got] == [run.tokens for run in bench.plain]
    assert len(checks) == sum(1 + len(run.cycles) for run in got)
    assert {0, 1, 2} <= {cycle.accepted for run in got for cycle in run.cycles}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_sees_what_drafting_does(bench: Bench, name: str) -> None:
    """The same estimates of whole sequences at once, and token by token on the cache."""
    model, head, traces = bench.model, bench.head(name), bench.halves(name)[1][:2]
    features = [block.whole(model, trace, name == "eagle") for trace in traces]
    everywhere = [torch.arange(len(x)) for x in features]
    together = block.estimate(head.tensors, model.shape, features, everywhere)
    layer, alone = Block(head.tensors, model.shape), list[Tensor]()
    for x in features:
        cache = model.new_cache(len(x), 1, 1)
        cache.admit()
        for i in range(len(x)):
            alone.append(layer(x[i : i + 1], cache, cache.place([Tree.chain([0])])))
            cache.commit(0, [0])
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_agreement_foretells_what_is_accepted(bench: Bench, name: str) -> None:
    """By drafted position: of the real loop, begun at every token of some answers."""
    # From the answers' second token on: a row's last token is one that the model gave.
    traces = [replace(trace, first=trace.first + 1) for trace in bench.halves(name)[1][:6]]
    accepted, inside = list[int](), list[int]()
    for trace in traces:
        tokens = trace.tokens.tolist()
        starts = range(trace.first, len(tokens) - 1)
        requests = [Request(tuple(tokens[:at]), len(tokens) - at + 1, ignore_eos=True) for at in starts]
        runs = bench.decode(bench.draft(name), requests, fitting.AHEAD, 1)
        assert all(run.tokens[: len(tokens) - at] == tuple(tokens[at:]) for at, run in zip(starts, runs, strict=True))
        accepted += [min(run.cycles[0].accepted, len(tokens) - 1 - at) for at, run in zip(starts, runs, strict=True)]
        inside += [len(tokens) - 1 - at for at in starts]
    asked = [sum(a >= step and i > step for a, i in zip(accepted, inside, strict=True)) for step in range(5)]
    right = [sum(a > step for a in accepted) for step in range(5)]
    readout = Readout(bench.model, bench.head(name).tensors["ids"])
    found = block.agreement(bench.model, readout, traces, name == "eagle", bench.head(name).tensors)
    assert found == pytest.approx([r / a for r, a in zip(right, asked, strict=True)])
    assert len(set(found)) > 3, "else nothing is proven"


@pytest.mark.parametrize("name", CONFIGS)
def test_training_begins_at_least_squares_and_learns(bench: Bench, name: str) -> None:
    train, heldout = bench.halves(name)
    facts, start = (
        bench.head(name).facts,
        replace(CONFIGS[name], sgd_epochs=0).fit(bench.model, train, heldout, 0).facts,
    )
    assert start["sgd_gain"] == 0 and facts["agreement"] - facts["sgd_gain"] == pytest.approx(start["agreement"])
    assert facts["agreement_by_position"][0] == facts["agreement"]
    on_what_it_saw = CONFIGS[name].fit(bench.model, train[:40], train[:40], 0).facts
    assert on_what_it_saw["sgd_gain"] > 0.02
    if name == "adapter":
        raw = DRAFT.new("lsq", exit_layer=EXIT, form=HeadForm.affine, ridge=1e-3, vocab=60).fit(
            bench.model, train, heldout, 0
        )
        assert start["agreement"] == pytest.approx(raw.facts["agreement"])
        assert facts["agreement"] > raw.facts["raw_agreement"]


def test_the_head_is_kept_whole(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(bench.head("adapter").to_bytes())
    loaded = Head.load(tmp_path / "head")
    assert loaded.facts == bench.head("adapter").facts
    assert all(bool((loaded.tensors[name] == t).all()) for name, t in bench.head("adapter").tensors.items())


def test_attention_knows_how_far_apart_tokens_are(bench: Bench) -> None:
    """Scores of the same query and key depend on the distance of their positions, and on nothing else of them."""
    shape, x = bench.model.shape, torch.ones(6, 32)
    t = {"qkv": torch.randn(64, 32, generator=torch.Generator().manual_seed(1))}

    def scores(start: int) -> Tensor:
        q, k, _ = block.project(t, shape, x, *block.rotation(torch.arange(start, start + 6), shape.head_dim))
        return q[:, 0] @ k[:, 0].T

    torch.testing.assert_close(scores(0), scores(40), atol=1e-3, rtol=1e-3)
    assert len({round(float(score), 2) for score in scores(0)[0]}) == 6
