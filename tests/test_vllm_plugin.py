"""Early exit inside vLLM: tokens are plain vLLM's, whatever vLLM does with requests, and cached prefixes stay whole.

On tiny random models, in float32; with planted faults, which the same checks find.
"""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from vllm_inside import BLOCK, LAYERS, Inside, model_folder, prompts, take_all

from selfspec.errors import ConfigError
from selfspec.vllm_plugin import early_exit, layers, versions
from selfspec.vllm_plugin.slots import Slots

pytest.importorskip("vllm", reason="vLLM is not installed here; .ci/vllm has it in an environment of its own")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
EXIT = {"exit_layer": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return model_folder("LlamaForCausalLM", models)


@pytest.fixture(scope="module")
def plain(llama: Path) -> Inside:
    return Inside(llama)


@pytest.mark.parametrize("family", layers.FAMILIES)
def test_the_walk_through_all_layers_is_the_model(models: Path, family: str) -> None:
    inside = Inside(model_folder(family, models), {"exit_layer": LAYERS})
    inside(prompts())
    assert inside.totals["accepted"] == inside.totals["proposed"] > 200


ASKED = {
    "together": {},
    "more requests than rows": {"max_num_seqs": 3},
    "prompts in pieces beside decoding": {"max_num_batched_tokens": 24},
    "cached prefixes": {"enable_prefix_caching": True},
    "prefixes and pieces": {"enable_prefix_caching": True, "max_num_batched_tokens": 24, "max_num_seqs": 3},
    "preempted requests": {"num_gpu_blocks_override": 13, "enable_prefix_caching": True},
}


@pytest.mark.parametrize("how", ASKED)
def test_greedy_tokens_are_plain_vllms(llama: Path, plain: Inside, how: str) -> None:
    inside = Inside(llama, EXIT, **ASKED[how])
    asked = prompts() * 2  # the second time prefixes are cached, where they are
    assert inside(asked) == plain(asked)
    assert 0 < inside.totals["accepted"] < inside.totals["proposed"]
    if "preempted" in how:
        assert inside.metric("num_preemptions") > 0
    if "prefixes" in how:
        assert inside.metric("prefix_cache_hits") > 0


def test_to_the_models_end(llama: Path, plain: Inside) -> None:
    inside = Inside(llama, EXIT, max_model_len=128)
    asked = prompts()
    counts = [128 - len(prompt) for prompt in asked]
    assert inside(asked, counts) == plain(asked, counts)
    assert inside.totals["accepted"] > 0


def test_no_more_is_drafted_than_is_asked_for(llama: Path, plain: Inside) -> None:
    inside = Inside(llama, {"exit_layer": LAYERS})
    assert inside(prompts(), 2) == plain(prompts(), 2)
    assert inside.totals["proposed"] == 0  # after the first token one is missing, and verification gives that
    assert inside(prompts(), 4) == plain(prompts(), 4)
    assert inside.totals["proposed"] == 2 * len(prompts())


class Watched(Slots):
    """Notes every slot that is written, and whether it was the scheduler's to give."""

    inside: Inside
    written = 0
    trespasses: ClassVar[list[str]] = []

    def step(self, positions: Tensor, longest: int) -> Any:
        metadata, slots = super().step(positions, longest)
        scheduler = self.inside.core.scheduler
        pool, owned = scheduler.kv_cache_manager.block_pool, dict[int, str]()
        for request in scheduler.running:
            for blocks in scheduler.kv_cache_manager.get_blocks(request.request_id).blocks:
                owned |= {block.block_id: request.request_id for block in blocks}
        for slot in next(iter(slots.values())).tolist():
            number = slot // BLOCK
            Watched.written += 1
            if number not in owned:
                Watched.trespasses.append(f"block {number} is nobody's")
            elif pool.blocks[number].block_hash is not None or pool.blocks[number].ref_cnt != 1:
                Watched.trespasses.append(f"block {number} is cached or shared")
        return metadata, slots


def watched(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What drafts wrote that they should not have."""
    Watched.inside, Watched.written, Watched.trespasses = inside, 0, []
    monkeypatch.setattr(early_exit, "Slots", Watched)
    inside(prompts() * 2)
    assert Watched.written > 500
    return Watched.trespasses


def test_drafts_write_into_their_requests_own_blocks(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(llama, EXIT, enable_prefix_caching=True, max_num_batched_tokens=24)
    assert watched(inside, monkeypatch) == []


def test_the_scheduler_sets_slots_aside(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(llama, EXIT, k=7)
    short = list[int]()
    rooms = Slots.room

    def room(self: Slots, row: int) -> int:
        found, tokens = rooms(self, row), int(inside.runner.input_batch.num_tokens_no_spec[row])
        short.append(found - (tokens - 1) < 7)
        return found

    monkeypatch.setattr(Slots, "room", room)
    inside(prompts())
    assert len(short) > 50 and not any(short)
    scheduler = inside.core.scheduler
    monkeypatch.setattr(scheduler, "num_lookahead_tokens", 0)  # as for any other class of one's own
    inside(prompts())
    assert any(short)  # and drafts end where their blocks do


def test_cached_prefixes_are_what_plain_vllm_would_have_cached(llama: Path) -> None:
    asked = prompts()
    own, wanted = Inside(llama, EXIT, enable_prefix_caching=True), Inside(llama, enable_prefix_caching=True)
    assert own(asked, 90) == wanted(asked, 90)
    found, expected = own.cached(), wanted.cached()
    assert len(found) > 16 and found.keys() <= expected.keys()
    for what, tensors in found.items():
        for got, there in zip(tensors, expected[what], strict=True):
            torch.testing.assert_close(got, there, rtol=1e-4, atol=1e-4)


class Astray(Slots):
    """Writes one position too early: over a verified token's."""

    def step(self, positions: Tensor, longest: int) -> Any:
        return super().step(positions - 1, longest)


def test_a_planted_write_over_a_verified_position_is_found(
    llama: Path, plain: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = Inside(llama, EXIT, enable_prefix_caching=True)
    monkeypatch.setattr(early_exit, "Slots", Astray)
    assert inside(prompts()) != plain(prompts())


def test_a_planted_write_beyond_the_own_blocks_is_found(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(llama, EXIT, max_num_batched_tokens=24)
    monkeypatch.setattr(inside.core.scheduler, "num_lookahead_tokens", 0)
    monkeypatch.setattr(Slots, "room", lambda self, row: 10_000)
    assert any("nobody's" in trespass for trespass in watched(inside, monkeypatch))


def test_a_planted_draft_of_an_unverified_token_is_found(
    llama: Path, plain: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample import rejection_sampler

    inside = Inside(llama, EXIT)
    monkeypatch.setattr(rejection_sampler, "rejection_sample", take_all)
    assert inside(prompts()) != plain(prompts())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exit_layer": 7}, "selfspec.exit_layer=7: must be from 1 to 6"),
        ({"exit_layer": 3, "head": "/none"}, "/none: no head can be read there"),
    ],
)
def test_what_the_model_has_not_is_refused(llama: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        Inside(llama, settings)


def test_an_unknown_family_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "FAMILIES", ("Qwen3ForCausalLM",))
    with pytest.raises(ConfigError, match=r"model=LlamaForCausalLM: .* knows the families Qwen3ForCausalLM"):
        Inside(llama, EXIT)


def test_an_unknown_version_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "KNOWN", ("0.31",))
    with pytest.raises(ConfigError, match=r"vllm=0.32.*: early exit inside vLLM knows the versions 0.31.\*"):
        Inside(llama, EXIT)
