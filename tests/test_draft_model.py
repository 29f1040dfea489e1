"""A smaller model drafts: its cache keeps in step with the batch, and its tokens mean what the target's do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfspec.axes import DRAFT, GATE
from selfspec.engine.torch.session import Scheduler
from selfspec.errors import AssetError, ConfigError
from selfspec.model.llama import Llama
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft import draft_model
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.draft.draft_model import DraftModel
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.policy.base import Policy
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.policy.rejection import Rejection
from selfspec.types import Completion, Request, Sampling

pytestmark = pytest.mark.usefixtures("inference")


class Bench:
    """The tiny model, made unruly; the same with late layers that say less is the smaller one."""

    def __init__(self, folder: Path) -> None:
        self.target, self.small = self._model(folder, 2.0), self._model(folder, 1.0)
        random = torch.Generator().manual_seed(6)
        prompts = [tuple(torch.randint(80, (n,), generator=random).tolist()) for n in (3, 12, 30, 1, 5)]
        self.requests = [Request(prompt, 16 + i, ignore_eos=i != 1) for i, prompt in enumerate(prompts)]
        self.plain = self.decode(Draft(self.target), 0, 1)

    def _model(self, folder: Path, late: float) -> Llama:
        model = Llama.load(folder, torch.device("cpu"), torch.float32)
        for layer in model.layers[3:]:
            layer.out *= 4 * late
            layer.down *= 4 * late
        model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
        model.shape = replace(model.shape, eos=frozenset({9}))
        return model

    def decode(
        self,
        draft: Draft,
        k: int,
        rows: int,
        gate: Gate | None = None,
        policy: Policy | None = None,
        requests: list[Request] | None = None,
    ) -> list[Completion]:
        model = self.target
        cache = model.new_cache(60 + draft.nodes(k), rows, draft.layers)
        target = Target(model, model.shape.layers, model.norm)
        speculation = Speculation(target, draft, gate or Gate(), Controller(k), policy or LongestPrefix())
        return Scheduler(speculation, cache).run(requests or self.requests)


@pytest.fixture(scope="module")
def bench(tiny_folder: Path, inference: None) -> Bench:
    return Bench(tiny_folder)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_target_itself_is_always_right(bench: Bench, rows: int) -> None:
    """Through accepted drafts, tokens caught up on, rows that leave and rows that join: so its cache is right too."""
    draft = DraftModel(bench.target, bench.target)
    for k in (1, 4):  # the second time with another cache
        cycles = [cycle for run in bench.decode(draft, k, rows) for cycle in run.cycles]
        assert all(cycle.accepted == cycle.proposed == cycle.k_asked for cycle in cycles)


@pytest.mark.parametrize("rows", [1, 3])
def test_after_a_rejection_it_drafts_as_if_from_the_start(bench: Bench, rows: int) -> None:
    """What a draft with a cache proposes is what one that runs all tokens anew would."""

    class Anew(DraftModel):
        def _catch_up(self) -> Tensor:
            self._cache.lengths = [0] * len(self._rows)
            return super()._catch_up()

    kept, anew = (bench.decode(kind(bench.target, bench.small), 4, rows) for kind in (DraftModel, Anew))
    accepted = [[cycle.accepted for cycle in run.cycles] for run in kept]
    assert accepted == [[cycle.accepted for cycle in run.cycles] for run in anew]
    assert {0, 1, 4} <= {count for run in accepted for count in run}


def test_drawn_from_the_target_itself_every_token_stands(bench: Bench) -> None:
    """The ratio p / q by which tokens are accepted is 1: so the draft says truly what it drew from."""
    requests = [replace(request, sampling=Sampling(1.0, top_k=40)) for request in bench.requests]
    for sample in (True, False):
        draft = DraftModel(bench.target, bench.target, sample)
        runs = bench.decode(draft, 4, 3, policy=Rejection(), requests=requests)
        cycles = [cycle for run in runs for cycle in run.cycles]
        assert all(cycle.accepted == cycle.proposed == cycle.k_asked for cycle in cycles) == sample


def test_tokens_are_run_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right drafts are not run again: no token of prompt or answer goes through the smaller model twice."""
    ran = 0
    run = DraftModel._run

    def counted(self: DraftModel, tokens: list[int], at: object) -> Tensor:
        nonlocal ran
        ran += len(tokens)
        return run(self, tokens, at)  # type: ignore[arg-type]

    monkeypatch.setattr(DraftModel, "_run", counted)
    got = bench.decode(DraftModel(bench.target, bench.target), 3, 1)
    said = sum(len(request.tokens) + len(run.tokens) for request, run in zip(bench.requests, got, strict=True))
    assert ran < said


def test_embeddings_may_be_padded_differently(bench: Bench) -> None:
    """What only pads is never proposed, and a target's token beyond the smaller embedding does no harm."""
    wide, narrow = bench.small.to(torch.float32), bench.small.to(torch.float32)
    wide.embedding = torch.cat((wide.embedding, torch.randn(8, 32)))
    wide.lm_head = torch.cat((wide.lm_head, 50 * torch.randn(8, 32)))
    wide.shape = replace(wide.shape, vocab=88)
    narrow.embedding, narrow.lm_head = narrow.embedding[:60], narrow.lm_head[:60]
    narrow.shape = replace(narrow.shape, vocab=60)
    for small in (wide, narrow):
        got = bench.decode(DraftModel(bench.target, small), 3, 3)
        assert [run.tokens for run in got] == [run.tokens for run in bench.plain]
        assert any(cycle.accepted for run in got for cycle in run.cycles)
        for name in ("entropy", "varH"):
            runs = bench.decode(DraftModel(bench.target, small), 1, 3, GATE.new(name, threshold=1.0).make())
            assert all(signal >= 0 for run in runs for cycle in run.cycles for signal in cycle.signals)


def test_too_short_a_model_is_refused(bench: Bench) -> None:
    short = bench.small.to(torch.float32)
    short.shape = replace(short.shape, max_positions=47)
    with pytest.raises(ConfigError, match=r"^draft\.source: has 47 positions; 48 are needed$"):
        bench.decode(DraftModel(bench.target, short), 3, 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_just_long_enough_will_do(bench: Bench, rows: int) -> None:
    """The cache has more slots than that: room for drafts, which need no positions of their own."""
    enough = bench.small.to(torch.float32)
    enough.shape = replace(enough.shape, max_positions=48)
    got = bench.decode(DraftModel(bench.target, enough), 5, rows)
    assert [run.tokens for run in got] == [run.tokens for run in bench.plain]


class TestMake:
    def test_the_same_vocabulary_will_do(self, bench: Bench, tiny_folder: Path) -> None:
        made = DRAFT.new("draft_model", source=f"file:{tiny_folder}").make(bench.target, None)
        assert made.small.dtype is torch.float32 and made.small is not bench.target

    def test_another_vocabulary_of_the_same_size_is_refused(
        self, bench: Bench, tiny_folder: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny_folder, other)
        file = json.loads((other / "tokenizer.json").read_text())
        vocab = file["model"]["vocab"]
        vocab["tokens"], vocab["drafts"] = vocab["drafts"], vocab["tokens"]
        (other / "tokenizer.json").write_text(json.dumps(file))
        with pytest.raises(ConfigError, match=r"^draft\.source=file:.*other: .* vocabulary") as refused:
            DRAFT.new("draft_model", source=f"file:{other}").make(bench.target, None)
        assert "\n" not in str(refused.value)

    def test_no_tokenizer_is_refused(self, bench: Bench, tiny_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
        with pytest.raises(AssetError, match=r"bare: has no tokenizer\.json"):
            DRAFT.new("draft_model", source=f"file:{tmp_path / 'bare'}").make(bench.target, None)


@pytest.mark.parametrize("entries", [{"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]], ids=["mapping", "unigram"])
def test_vocabularies_are_read(tmp_path: Path, entries: object) -> None:
    added = [{"id": 2, "content": "<eos>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": entries}, "added_tokens": added}))
    assert draft_model.vocabulary(tmp_path) == {0: "a", 1: "b", 2: "<eos>"}
