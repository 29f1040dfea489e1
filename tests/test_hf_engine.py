"""hf_engine: transformers' own generate behind the Engine protocol, with the figures it really has."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from selfspec import plan
from selfspec.axes import CONTROLLER, DRAFT, ENGINE, GATE, POLICY, DraftOptions
from selfspec.engine import factory
from selfspec.engine.hf.engine import HFEngine
from selfspec.engine.torch.engine import TorchEngine
from selfspec.errors import ConfigError, StageError
from selfspec.model.base import Layers
from selfspec.model.hf import HFModel
from selfspec.run import CONF
from selfspec.types import Request, Sampling

Maker = Callable[..., HFEngine]
K, NEW = 3, 18


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    threads = torch.get_num_threads()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain(overrides: list[str]) -> plan.Plan:
    """The tiny model's plan with ``engine=hf`` and no draft."""
    more = ["hardware.threads=1", f"K={K}", "engine=hf", "draft=none"]
    return plan.make(compose("config", [*overrides, *more]))


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(5, 80, (n,), generator=random).tolist()) for n in lengths]


REQUESTS = [Request(prompt, NEW, ignore_eos=True) for prompt in prompts(3, 12, 20)]
DRAFTS = {
    "none": DRAFT.new("none"),
    "ngram": DRAFT.new("ngram", max_match=3, min_match=1),
    "layerskip": DRAFT.new("layerskip", exit_layer=3),
    "draft_model": DRAFT.new("draft_model"),
}


def draft(name: str, folder: Path) -> DraftOptions:
    return replace(DRAFTS[name], source=f"file:{folder}") if name == "draft_model" else DRAFTS[name]


@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_and_cycles(plain: plan.Plan, tiny_folder: Path, name: str) -> None:
    """Ours are theirs; and what they say of their cycles adds up."""
    ours = TorchEngine(replace(plain, engine=ENGINE.new("torch"))).generate(REQUESTS)
    theirs = HFEngine(replace(plain, draft=draft(name, tiny_folder)))
    lm, passes = theirs._lm, list[int]()
    lm.register_forward_hook(lambda *_: passes.append(lm.config.num_hidden_layers))
    for request, wanted in zip(REQUESTS, ours, strict=True):
        passes.clear()
        began = time.perf_counter()
        (done,) = theirs.generate([request])
        elapsed = time.perf_counter() - began
        assert done.tokens == wanted.tokens and done.finish == "length"
        assert 0 < done.ttft_s < done.total_s < elapsed
        assert len(done.cycles) == passes.count(6) - 1, "one for every pass of the target after the first"
        first = NEW - sum(cycle.new_tokens for cycle in done.cycles)
        assert first == 1 if name == "none" else 1 <= first <= K + 1
        emitted = first
        for cycle in done.cycles:
            assert cycle.k_asked == (0 if name == "none" else min(K, NEW - emitted - 1))
            assert 0 <= cycle.accepted <= cycle.proposed <= (0 if name == "none" else K)
            assert cycle.proposed == cycle.k_asked or name == "ngram", "no schedule, no confidence: K always"
            assert (cycle.depth, cycle.new_tokens) == (cycle.proposed, cycle.accepted + 1)
            assert cycle.verify_ms > 0 and (cycle.draft_ms > 0) == (name != "none")
            emitted += cycle.new_tokens
        spent = sum(cycle.draft_ms + cycle.verify_ms for cycle in done.cycles)
        assert spent <= 1e3 * (done.total_s - done.ttft_s) + 1e-6
    if name == "layerskip":
        assert passes.count(3) > 0, "the first layers drafted"
    assert "_get_candidate_generator" not in vars(lm)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngram", "layerskip", "draft_model"])
def test_drafts_are_of_some_use(plain: plan.Plan, tiny_folder: Path, name: str) -> None:
    """Else the counts above would all be nothing; and K is what was asked, or the plan's."""
    engine = HFEngine(replace(plain, draft=draft(name, tiny_folder)))
    for k, most in ((None, K), (1, 1), (5, 5)):
        cycles = [cycle for done in engine.generate(REQUESTS, k=k) for cycle in done.cycles]
        assert max(cycle.proposed for cycle in cycles) == most
        assert 0 < sum(cycle.accepted for cycle in cycles) <= sum(cycle.proposed for cycle in cycles)
        if name == "draft_model":  # its draft is the model itself
            assert all(cycle.accepted == cycle.proposed for cycle in cycles)
    plainly = [cycle for done in engine.generate(REQUESTS, plain=True) for cycle in done.cycles]
    assert all((cycle.k_asked, cycle.proposed, cycle.new_tokens) == (0, 0, 1) for cycle in plainly)


@pytest.mark.parametrize("name", DRAFTS)
def test_logits_that_are_not_finite_are_said(plain: plan.Plan, tiny_folder: Path, name: str) -> None:
    engine = HFEngine(replace(plain, draft=draft(name, tiny_folder)))
    norm = engine._lm.model.norm.weight.data
    kept = norm.clone()
    norm[3] = torch.nan
    try:
        with pytest.raises(StageError, match=r"^logits are not finite: "):
            engine.generate(REQUESTS[:1])
    finally:
        norm.copy_(kept)


@pytest.mark.parametrize("name", DRAFTS)
def test_a_stop_token_stops(plain: plan.Plan, tiny_folder: Path, name: str) -> None:
    engine = HFEngine(replace(plain, draft=draft(name, tiny_folder)))
    (whole,) = engine.generate(REQUESTS[1:2])
    stop = whole.tokens[7]
    engine.weights.model.shape = replace(engine.weights.model.shape, eos=frozenset({stop}))
    (stopped,) = engine.generate([replace(REQUESTS[1], ignore_eos=False)])
    assert stopped.tokens == whole.tokens[: whole.tokens.index(stop) + 1] and stopped.finish == "stop"
    assert engine.generate(REQUESTS[1:2])[0].tokens == whole.tokens


def test_tokens_are_drawn_by_the_requests_own_seed(plain: plan.Plan) -> None:
    engine = HFEngine(plain)
    (greedy,) = engine.generate(REQUESTS[:1])

    def drawn(temperature: float, seed: int, new: int = NEW, **more: Any) -> tuple[int, ...]:
        sampling = Sampling(temperature, seed=seed, **more)
        return engine.generate([replace(REQUESTS[0], max_new_tokens=new, sampling=sampling)])[0].tokens

    assert drawn(3.0, 1) == drawn(3.0, 1) != drawn(3.0, 2)
    assert drawn(1e-3, 1) == drawn(5.0, 1, top_k=1) == drawn(5.0, 1, top_p=1e-6) == greedy.tokens
    assert len({drawn(1e4, seed, 1) for seed in range(160)}) > 50, "of 80: no top-k of 50 by default"


def test_references_share_weights_and_nothing_else(plain: plan.Plan, tiny_folder: Path) -> None:
    configured = replace(
        plain,
        engine=ENGINE.new("torch", layers=Layers.hf),
        draft=draft("layerskip", tiny_folder),
        gate=GATE.new("maxp", threshold=0.5),
        controller=CONTROLLER.new("cost", K=K, window=4),
        policy=POLICY.new("topk_agree", k=2),
    )
    assisted = replace(configured, draft=draft("draft_model", tiny_folder))
    references = {
        name: factory.reference(name, assisted if name == "hf_assistant" else configured) for name in factory.REFERENCES
    }
    ours = TorchEngine(configured)
    assert isinstance(ours.model, HFModel)
    wanted = [completion.tokens for completion in ours.generate(REQUESTS, plain=True)]
    for reference in references.values():
        assert isinstance(reference, HFEngine)
        assert [completion.tokens for completion in reference.generate(REQUESTS)] == wanted
    assert len({id(reference.weights.model) for reference in references.values()}) == 1  # type: ignore[attr-defined]
    assert reference.weights.model is not ours.model, "nothing that is set on one is seen by the other"


def test_the_rest_of_the_protocol(plain: plan.Plan) -> None:
    engine = HFEngine(plain)
    assert {"engine": "hf", "dtype": "float32", "device": "cpu"}.items() <= engine.describe().items()
    assert "transformers" in engine.describe() and engine.state() == {}
    engine.restore({})
    (answer,) = engine.generate(REQUESTS[:1])
    tie = engine.ties.compare(REQUESTS[0].tokens, answer.tokens[0], (answer.tokens[0] + 1) % 80)
    assert tie.gap > 0 and tie.rounding == 0.0
    assert engine.tokenizer.encode("a model drafts", False) == [5, 6, 7]


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"draft": DRAFT.new("lsq", exit_layer=3)}, r"^draft=lsq: engine=hf cannot run it; it runs draft_model, l"),
            ({"draft": DRAFT.new("layerskip", exit_layer=3, vocab=40)}, "^draft.vocab=40: means nothing to engine=hf$"),
            ({"draft": DRAFT.new("ngram", max_match=3, min_match=2)}, "^draft.min_match=2: .* must be 1$"),
            ({"policy": POLICY.new("topk_agree", k=2)}, "^policy=topk_agree: engine=hf decodes ex"),
            (
                {"policy": POLICY.new("longest_prefix", verify=False)},
                "^policy=longest_prefix: engine=hf decodes exactly, and verif",
            ),
            (
                {"draft": DRAFT.new("ngram", max_match=3, min_match=1), "gate": GATE.new("maxp", threshold=0.5)},
                "^gate=maxp: engine=hf asks no gate",
            ),
            ({"engine": ENGINE.new("hf", max_batch=8)}, "^engine.max_batch=8: .* one request at a time$"),
            (
                {
                    "draft": DRAFT.new("ngram", max_match=3, min_match=1),
                    "controller": CONTROLLER.new("cost", K=4),
                },
                "^controller=cost: engine=hf drafts K tokens always",
            ),
            (
                {
                    "draft": DRAFT.new("layerskip", exit_layer=3),
                    "policy": POLICY.new("rejection", temperature=0.7),
                },
                r"^policy\.temperature=0\.7: engine=hf drafts greedily",
            ),
        ],
    )
    def test_what_it_does_not_have(self, plain: plan.Plan, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            HFEngine(replace(plain, **change))

    def test_too_many_positions(self, plain: plan.Plan) -> None:
        with pytest.raises(ConfigError, match="come to 513 positions; the model has 512"):
            HFEngine(plain).generate([Request(REQUESTS[0].tokens, 510)])

    def test_too_late_an_exit(self, plain: plan.Plan) -> None:
        with pytest.raises(ConfigError, match="must be from 1 to 5"):
            HFEngine(replace(plain, draft=DRAFT.new("layerskip", exit_layer=6))).generate(REQUESTS)
