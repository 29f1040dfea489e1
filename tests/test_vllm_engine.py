"""engine=vllm with a real vLLM on the real model: its tokens, its figures and its probabilities are our engine's.

One vLLM drafts n-grams and one does not, for most tests here.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from test_hf import build
from vllm_inside import leave_unswept, look_at

from selfspec import job, plan
from selfspec.axes import ENGINE
from selfspec.data import workload
from selfspec.engine import factory
from selfspec.engine.torch.engine import TorchEngine
from selfspec.engine.vllm import engine as vllm_engine
from selfspec.engine.vllm import session as vllm_session
from selfspec.engine.vllm.engine import VLLMEngine
from selfspec.errors import ConfigError
from selfspec.metrics import first_difference
from selfspec.plan import Plan
from selfspec.run import CONF
from selfspec.serve.config import Order
from selfspec.types import Completion, Request, Sampling

pytest.importorskip("vllm", reason="vLLM is not installed here; .ci/vllm has it in an environment of its own")
pytestmark = [pytest.mark.vllm, pytest.mark.real, pytest.mark.filterwarnings("default")]

K, NEW, COUNT = 4, 40, 6
EARLY = ("draft=layerskip", "exit_layer=26", "gate=maxp", "tau=0.4")
CLOSE = 1e-3
"""Of two float32 logits: what two orders of summing explain."""
Drafted = tuple[list[Completion], dict[int, list[tuple[int, int]]]]
"""Answers, and by request what was verified in each step: drafted, and said."""


def made(*overrides: str) -> Plan:
    fast = ("engine=vllm", "engine.eager=true", "hardware=cpu_fp32", "tracking=none", f"K={K}", "draft=ngram")
    cut = ("workload.max_prompt_tokens=64", f"workload.new_tokens={NEW}", "scale=smoke")
    return plan.make(compose("config", [*fast, *cut, *overrides]))


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module", autouse=True)
def unswept() -> Iterator[None]:
    yield
    for core in vllm_engine._STARTED.values():
        leave_unswept(core)


@pytest.fixture(scope="module")
def engine() -> VLLMEngine:
    return VLLMEngine(made())


@pytest.fixture(scope="module")
def ours() -> TorchEngine:
    asked = made()
    return TorchEngine(replace(asked, engine=ENGINE.new("torch")))


@pytest.fixture(scope="module")
def requests(ours: TorchEngine) -> list[Request]:
    encode = lambda text: ours.tokenizer.encode(text, True)  # noqa: E731
    chosen = workload.select(ours.plan.workload, "bench", COUNT, 0, encode)
    return [Request(prompt.tokens, NEW) for prompt in chosen]


@pytest.fixture(scope="module")
def plain(engine: VLLMEngine, requests: list[Request]) -> list[Completion]:
    """By the vLLM that does not draft, one after the other."""
    return engine.generate(requests, plain=True)


@pytest.fixture(scope="module")
def drafted(engine: VLLMEngine, requests: list[Request]) -> Drafted:
    """By the one that does, one after the other; and what its scheduler was seen to have verified."""
    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    scheduler = engine._core.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    update = scheduler.update_from_output

    def watched(scheduled: Any, said: Any) -> Any:
        for id, at in said.req_id_to_index.items():
            seen[id].append((len(scheduled.scheduled_spec_decode_tokens.get(id, ())), len(said.sampled_token_ids[at])))
        return update(scheduled, said)

    scheduler.update_from_output = watched
    done = engine.generate(requests, max_batch=1)
    del scheduler.update_from_output
    return done, {int(id.split("-")[0]): steps for id, steps in seen.items()}


SCOUT = {
    **{"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "vocab_size": 256},
    **{"max_position_embeddings": 4096, "attention_chunk_size": 2048, "bos_token_id": 0, "eos_token_id": 1},
}
"""Llama-4-Scout, tiny; vLLM's attention on a CPU has no heads that are smaller."""
INT4 = {
    **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
    "ignore": ["lm_head", "re:.*router", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
"""As the INT4 checkpoint of ``model=llama4_scout_int4`` says of its weights."""


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scout")
    with torch.no_grad():
        build("Llama4ForCausalLM", SCOUT, folder)
    look_at("Llama4ForCausalLM")
    return folder


class TestScout:
    """Llama 4 as ``model=llama4_scout_int4`` has it, with tiny random weights."""

    @staticmethod
    def plan(folder: Path, *more: str) -> Plan:
        there = ("model=llama4_scout_int4", f"model.source=file:{folder}", "model.layers=4", "engine.kv_gib=0.1")
        return made(*there, "draft=none", *more)

    def test_tokens_are_those_of_its_layers(self, scout: Path) -> None:
        asked = self.plan(scout)
        theirs = factory.make(asked)
        ours = TorchEngine(replace(asked, engine=ENGINE.new("torch")))
        requests = [Request(tuple(range(5, 5 + n)), 16, ignore_eos=True) for n in (3, 25)]
        wanted = [one.tokens for one in ours.generate(requests, plain=True)]
        assert [one.tokens for one in theirs.generate(requests)] == wanted

    def test_int4_weights_are_what_vllm_expects(self, scout: Path, tmp_path: Path) -> None:
        config = json.loads((scout / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": INT4}))
        engine = factory.make(self.plan(tmp_path, "hardware=cpu", "hardware.dtype=bf16"))
        settled = engine.arguments({}).create_engine_config()  # type: ignore[attr-defined]
        assert settled.model_config.quantization == "compressed-tensors" and settled.quant_config is not None
        assert settled.cache_config.kv_cache_memory_bytes == int(0.1 * 2**30)


def test_an_early_exit_has_our_decoders_cycles(requests: list[Request]) -> None:
    """By our plugin inside vLLM, and by our own decoder: drafted, gated, verified and counted alike."""
    asked = made(*EARLY)
    theirs = factory.make(asked)
    ours = TorchEngine(replace(asked, engine=ENGINE.new("torch")))
    pairs = list(zip(theirs.generate(requests[:4], max_batch=2), ours.generate(requests[:4]), strict=True))
    equal = [one for one, other in pairs if (one.tokens, counts(one)) == (other.tokens, counts(other))]
    assert len(equal) >= len(pairs) - 1, "a logit or a probability may lie just on the other side"
    cycles = [cycle for one in equal for cycle in one.cycles]
    assert 0 < sum(c.accepted for c in cycles) < sum(c.proposed for c in cycles) < sum(c.k_asked for c in cycles)
    assert all(c.proposed <= len(c.signals) <= c.proposed + 1 or c.k_asked < K for c in cycles)


def counts(completion: Completion) -> list[tuple[int, ...]]:
    return [(c.k_asked, c.proposed, c.depth, c.accepted, c.new_tokens) for c in completion.cycles]


def explained(ours: TorchEngine, request: Request, one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether answers are equal, or first differ where two logits are as good as equal."""
    at = first_difference(one, other)
    return at is None or ours.ties.compare((*request.tokens, *one[:at]), one[at], other[at]).gap < CLOSE


def test_plain_tokens_are_our_engines(ours: TorchEngine, requests: list[Request], plain: list[Completion]) -> None:
    own = ours.generate(requests, plain=True)
    for request, one, other in zip(requests, plain, own, strict=True):
        assert explained(ours, request, one.tokens, other.tokens)
        assert one.finish == other.finish or one.tokens != other.tokens
    assert sum(one.tokens == other.tokens for one, other in zip(plain, own, strict=True)) >= COUNT - 1


@pytest.mark.parametrize("batch", [1, 4])
def test_drafting_changes_no_token(
    engine: VLLMEngine,
    ours: TorchEngine,
    requests: list[Request],
    plain: list[Completion],
    drafted: Drafted,
    batch: int,
) -> None:
    drafting = drafted[0] if batch == 1 else engine.generate(requests, max_batch=batch)
    for request, one, other in zip(requests, plain, drafting, strict=True):
        assert explained(ours, request, one.tokens, other.tokens)
    cycles = [cycle for one in drafting for cycle in one.cycles]
    assert 0 < sum(c.accepted for c in cycles) < sum(c.proposed for c in cycles), "else nothing is proven"
    assert max(c.batch for c in cycles) == batch
    assert all(c.proposed == c.k_asked == 0 for one in plain for c in one.cycles)


def test_cycles_are_a_count_by_hand(drafted: Drafted, requests: list[Request]) -> None:
    done, seen = drafted
    assert len(seen) == COUNT
    for number, (request, one) in enumerate(zip(requests, done, strict=True)):
        (first, *steps), told, expected = seen[number], 1, []
        assert first == (0, 1)
        for proposed, said in steps:
            most = request.max_new_tokens - told - 1  # of what vLLM drafts, that may still be said before the last
            new = min(said, most + 1, len(one.tokens) - told)
            expected.append((min(K, most), min(proposed, most), min(said - 1, most), new))
            told += new
        assert [(c.k_asked, c.proposed, c.accepted, c.new_tokens) for c in one.cycles] == expected
        assert told == len(one.tokens) and all(c.depth == c.proposed for c in one.cycles)
    cycles = [cycle for one in done for cycle in one.cycles]
    assert any(c.proposed == 0 for c in cycles) and any(c.accepted == K for c in cycles), "else nothing is proven"


def test_times_add_up(drafted: Drafted) -> None:
    for one in drafted[0]:
        assert 0 <= one.queue_s < one.ttft_s < one.total_s
        cycles_s = sum(c.verify_ms + c.draft_ms for c in one.cycles) / 1e3
        assert all(c.draft_ms > 0 for c in one.cycles)
        assert cycles_s < one.total_s


def test_scores_are_our_engines(engine: VLLMEngine, ours: TorchEngine, requests: list[Request]) -> None:
    (answer,) = ours.generate(requests[:1], plain=True)
    continuations = [answer.tokens, requests[1].tokens[:9], requests[2].tokens[:1]]
    for plain in (True, False):
        theirs = engine.score(requests[0].tokens, continuations, plain=plain)
        for one, other in zip(theirs, ours.score(requests[0].tokens, continuations, plain=True), strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE) and one.greedy == other.greedy
        assert [one.greedy for one in theirs] == [True, False, False]


def test_what_a_broken_session_left_is_dropped(engine: VLLMEngine, requests: list[Request]) -> None:
    (wanted,) = engine.score(requests[1].tokens, [requests[2].tokens[:4]])
    session = engine.open(1, 256, Order.fcfs)
    session.submit(requests[0])
    session.step()
    (found,) = engine.score(requests[1].tokens, [requests[2].tokens[:4]])
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=CLOSE)


def test_a_stop_token_ends_an_answer(engine: VLLMEngine, ours: TorchEngine) -> None:
    request = Request(tuple(ours.tokenizer.encode("Say only the word yes.", True)), 60)
    (own,), (theirs,) = ours.generate([request], plain=True), engine.generate([request])
    assert (theirs.tokens, theirs.finish) == (own.tokens, own.finish) and own.finish == "stop"
    assert theirs.tokens[-1] in ours.model.shape.eos
    (more,) = engine.generate([replace(request, ignore_eos=True)])
    assert len(more.tokens) == 60 and more.finish == "length"


def test_sampled_tokens_are_of_the_requests_seed(engine: VLLMEngine, requests: list[Request]) -> None:
    """Of plain decoding; where vLLM drafts, it draws of the same distribution, and others."""
    asked = [replace(requests[0], sampling=Sampling(0.9, None, 0.95, seed)) for seed in (-1, -1, 2)]
    one, same, other = (engine.generate([request], plain=True)[0].tokens for request in asked)
    assert one == same != other
    (drawn,) = engine.generate(asked[:1])
    assert drawn.finish == "stop" or len(drawn.tokens) == NEW


def test_a_session_takes_requests_as_they_come(
    engine: VLLMEngine, ours: TorchEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # a look at the clock each: no pause between two requests makes the first one wait
    monkeypatch.setattr(vllm_session, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1e3))
    session = engine.open(2, 256, Order.fcfs)
    numbers = [session.submit(replace(request, logprobs=2, max_new_tokens=8)) for request in requests[:4]]
    with pytest.raises(ValueError, match="new ones of 256"):
        session.submit(Request((1,), 256))
    done, logprobs = {}, defaultdict(list)
    assert session.busy and session.load[:2] == (4, 0)
    while session.busy:
        for told in session.step():
            logprobs[told.number] += told.logprobs
            if told.completion:
                done[told.number] = told.completion
        assert session.load.rows <= 2
        if numbers[3] not in done and len(done) == 2:
            assert session.cancel(numbers[3]) is not None or session.load.rows < 2
    assert set(done) >= set(numbers[:3]) and session.load == (0, 0, 0.0)
    assert done[numbers[2]].queue_s > done[numbers[0]].queue_s
    own = ours.open(1, 256, Order.fcfs)
    own.submit(replace(requests[0], logprobs=2, max_new_tokens=8))
    wanted = [logprob for _ in iter(lambda: own.busy, False) for told in own.step() for logprob in told.logprobs]
    for one, other in zip(logprobs[numbers[0]], wanted, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=CLOSE)
        assert [id for id, _ in one.top] == [id for id, _ in other.top]


def test_too_long_a_request_is_refused_in_a_line(engine: VLLMEngine, requests: list[Request]) -> None:
    with pytest.raises(
        ConfigError, match=r"prompt and new tokens come to \d+ positions; engine.kv_gib=1.0 and the mod"
    ):
        engine.generate([replace(requests[0], max_new_tokens=1 << 20)])


def test_there_are_rows_for_all_whom_the_gateway_lets_in(engine: VLLMEngine) -> None:
    asked: Any = factory.make(made("serve.max_batch=100"))
    assert asked.arguments({}).max_num_seqs == 100 and engine.arguments({}).max_num_seqs == 64  # type: ignore[attr-defined]


def test_a_bench_and_a_quality_stage(engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = ("quality.prompts=2", "quality.gate_prompts=0", "quality.tasks=[]", "quality.answer_tokens=24")
    small = ("scale.prompts=2", "scale.repeats=1", "scale.warmup=0", "stages=[bench,quality]")
    asked = made(*small, *quality, f"output_dir={tmp_path / 'out'}")
    job.check(asked)
    monkeypatch.setattr(factory, "make", lambda plan: engine)  # the same, and already started
    (tmp_path / "job").mkdir()
    result = job.run(asked, tmp_path / "job")
    found = result["measurements"]
    assert (result["status"], result["lossless"]) == ("finished", "yes") and result["label"] == "ngram K=4 by vllm"
    assert result["provenance"]["extra"]["vllm"] and result["acceptance_by_position"]
    assert {"bench/speedup", "bench/acceptance", "bench/ttft_ms", "bench/acceptance_length"} <= set(found)
    assert found["quality/reference_delta_ppl"] == pytest.approx(0, abs=1e-3 * found["quality/plain_reference_ppl"])
    assert found["quality/identical_texts"] == 1


def test_the_next_job_of_a_sweep(engine: VLLMEngine, requests: list[Request], plain: list[Completion]) -> None:
    """It has the same plain vLLM, and can start another that drafts although n-grams were drafted before."""
    other: Any = factory.make(made("K=2"))
    assert other._plain_core is engine._plain_core and other._core is not engine._core  # type: ignore[attr-defined]
    (one,) = other.generate(requests[:1])
    assert one.tokens == plain[0].tokens and max(cycle.k_asked for cycle in one.cycles) == 2


def test_the_next_job_has_threads_of_its_own(engine: VLLMEngine) -> None:
    assert engine._plain_core  # vLLM has been started
    threads = torch.get_num_threads()
    try:
        assert factory.make(made(f"hardware.threads={threads + 1}")).describe()["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_the_next_job_learns_anew(requests: list[Request]) -> None:
    """It may ask for the same vLLM, and so has the same proposer."""
    asked = made(*EARLY)
    one: Any = factory.make(asked)
    drafter = one._core.model_executor.driver_worker.worker.model_runner.drafter
    one.generate([replace(requests[0], max_new_tokens=8)])
    gate, other = drafter.gate, factory.make(asked)
    assert drafter.record.totals["proposed"] > 0
    assert other._core is one._core and not drafter.record.totals and drafter.gate is not gate  # type: ignore[attr-defined]
