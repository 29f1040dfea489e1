"""torch_engine: what a plan asks for is what runs; batches answer as single prompts do; refusals say why."""

import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY

from selfspec import heads
from selfspec.engine.base import Tie
from selfspec.engine.torch import ties, weights
from selfspec.engine.torch.engine import TorchEngine
from selfspec.errors import AssetError, ConfigError, HeadError
from selfspec.model.base import Model
from selfspec.model.kernels import native
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation.head import features, linear
from selfspec.types import Completion, Request

Maker = Callable[..., TorchEngine]


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """As many after these tests as before them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_prompts(*lengths: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(5, 80, (n,), generator=random).tolist()) for n in lengths]


def fitted(engine: TorchEngine, path: Path) -> TorchEngine:
    prompts = random_prompts(*[6] * 20)
    answers = engine.generate([Request(prompt, 16) for prompt in prompts], plain=True, max_batch=20)
    pairs = [(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    engine.fit(pairs, path, {"model": "tiny", "exit_layer": engine.plan.draft.exit_layer})
    engine.use_head(path)
    return engine


def single(engine: TorchEngine, request: Request, plain: bool = False) -> Completion:
    return engine.generate([request], plain=plain)[0]


def stream(model: Model, tokens: Sequence[int], depth: int) -> torch.Tensor:
    """The residual stream ``[n, D]`` after ``depth`` layers, without anything cached before."""
    cache = model.new_cache(len(tokens))
    at = cache.place([Tree.chain(tokens)], row=cache.admit())
    return model.run(model.embed(tokens, at), cache, at, 0, depth)


class TestGenerate:
    PROMPTS = random_prompts(3, 9, 20)

    @pytest.mark.parametrize(
        "more",
        [
            ("draft=none",),
            ("draft=layerskip", "gate=maxp", "K=3"),
            ("draft=lsq",),
            ("draft=lsq", "draft.previous=true", "gate=varH", "tau_v=1", "K=8"),
            ("draft=lsq_lowrank", "draft.rank=8", "gate=entropy", "exit_layer=1"),
        ],
        ids=" ".join,
    )
    def test_an_exact_plan_gives_plain_tokens(self, engine: Maker, tmp_path: Path, more: tuple[str, ...]) -> None:
        made = engine(*more)
        if made.plan.draft.fitted:
            fitted(made, tmp_path / "head")
        requests = [Request(prompt, 16, ignore_eos=True) for prompt in self.PROMPTS]
        plain = made.generate(requests, plain=True)
        assert all(len(c.tokens) == 16 and [cycle.k_asked for cycle in c.cycles] == [0] * 15 for c in plain)
        for batch in (1, 2):
            got = made.generate(requests, max_batch=batch)
            assert [completion.tokens for completion in got] == [completion.tokens for completion in plain]
            assert {cycle.batch for completion in got for cycle in completion.cycles} >= {batch}
            drafted = sum(cycle.proposed for completion in got for cycle in completion.cycles)
            assert (drafted > 0) == (made.plan.draft.name != "none")

    def test_with_another_k_than_the_plans(self, engine: Maker) -> None:
        made, requests = engine("draft=layerskip", "K=2"), [Request(self.PROMPTS[1], 16, ignore_eos=True)]
        for k, most in ((None, 2), (0, 0), (5, 5), (None, 2)):
            (got,) = made.generate(requests, k=k)
            assert max(cycle.k_asked for cycle in got.cycles) == most
            assert got.tokens == made.generate(requests, plain=True)[0].tokens

    @pytest.mark.parametrize("plain", [False, True])
    def test_as_many_at_once_as_the_plan_says(self, engine: Maker, plain: bool) -> None:
        made = engine("draft=layerskip", "engine.max_batch=2")
        requests = [Request(prompt, 6, ignore_eos=True) for prompt in (*self.PROMPTS, *self.PROMPTS)]
        for asked, most in ((None, 2), (1, 1), (4, 4)):
            got = made.generate(requests, plain=plain, max_batch=asked)
            assert max(cycle.batch for completion in got for cycle in completion.cycles) == most

    def test_what_gate_and_controller_learned_is_carried_over(self, engine: Maker) -> None:
        made, other = (engine("draft=layerskip", "gate=bandit", "controller=adaptive") for _ in range(2))
        before = made.state()
        made.generate([Request(self.PROMPTS[1], 16, ignore_eos=True)])
        learned = json.loads(json.dumps(made.state()))
        assert set(learned) == {"gate", "controller"} and learned != json.loads(json.dumps(before))
        other.restore(learned)
        assert json.loads(json.dumps(other.state())) == learned

    @pytest.mark.parametrize("draft", ["layerskip", "lsq"])
    def test_an_unverified_plan_runs_only_its_first_layers(
        self, engine: Maker, tmp_path: Path, draft: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = engine(f"draft={draft}", "policy.verify=false", "exit_layer=2")
        if draft == "lsq":
            fitted(made, tmp_path / "head")
        request = Request(self.PROMPTS[1], 16, ignore_eos=True)
        plain = single(made, request, plain=True)
        raw, tokens = made.model, list(request.tokens)
        with torch.inference_mode():
            for _ in range(16):
                hidden = stream(raw, tokens, 2)[-1:]
                state = raw.norm(hidden)
                if made._head is not None:
                    state = linear(made._head.tensors, features(hidden))
                tokens.append(int(raw.logits(state).argmax()))
        real, ranges = Llama.run, set[tuple[int, int]]()

        def watching(self: Llama, *args: Any) -> torch.Tensor:
            ranges.add((args[-2], args[-1]))
            return real(self, *args)

        monkeypatch.setattr(Llama, "run", watching)
        got = single(made, request)
        assert ranges == {(0, 2)} and [*request.tokens, *got.tokens] == tokens
        assert all((cycle.proposed, cycle.new_tokens) == (0, 1) for cycle in got.cycles)
        assert single(made, request, plain=True).tokens == plain.tokens

    def test_as_many_positions_as_the_model_has(self, engine: Maker) -> None:
        made = engine("draft=layerskip")
        long, longer = random_prompts(504, 505)
        assert len(single(made, Request(long, 8, ignore_eos=True)).tokens) == 8
        message = r"^workload: prompt and new tokens come to 513 positions; the model has 512$"
        for plain in (True, False):
            with pytest.raises(ConfigError, match=message):
                made.generate([Request(long, 8), Request(longer, 8)], plain=plain)

    def test_an_exit_beyond_the_model_is_found_when_its_layers_are_known(self, engine: Maker) -> None:
        made = engine("draft=layerskip", "exit_layer=3")
        made.plan.draft.exit_layer = 6  # as where neither the config nor the source declares the layers
        with pytest.raises(ConfigError, match="exit_layer=6: tiny has 6 layers; must be from 1 to 5"):
            made.generate([Request((5, 6), 4)])


class TestBatch:
    @pytest.mark.parametrize("new", [1, 2, 16])
    def test_a_batch_answers_as_each_prompt_alone(self, engine: Maker, new: int) -> None:
        made = engine("draft=none")
        prompts = random_prompts(2, 17, 5, 5, 9, 1, 30, 12)
        said = [single(made, Request(prompt, 16, ignore_eos=True), plain=True).tokens for prompt in prompts]
        ends = {said[1][3], said[4][0], said[6][7]}  # rows leave early, at different times, one at once
        made.model.shape = replace(made.model.shape, eos=frozenset(ends))
        requests = [Request(prompt, new) for prompt in prompts]
        alone = [single(made, request, plain=True) for request in requests]
        for batch in (3, 8, 32):
            together = made.generate(requests, plain=True, max_batch=batch)
            assert [(c.tokens, c.finish) for c in together] == [(c.tokens, c.finish) for c in alone]
        if new == 16:
            assert len({len(completion.tokens) for completion in alone}) >= 3
            assert {completion.finish for completion in alone} == {"stop", "length"}

    def test_a_cache_serves_many_requests_and_is_not_kept_for_ever(self, engine: Maker) -> None:
        made, prompts = engine("draft=none"), random_prompts(3, 40, 7)
        said = [single(engine("draft=none"), Request(prompt, 9, ignore_eos=True)).tokens for prompt in prompts]
        caches = list[object]()
        for prompt in prompts:
            caches += made._caches.values()
            assert single(made, Request(prompt, 9, ignore_eos=True)).tokens == said[prompts.index(prompt)]
        assert len({id(cache) for cache in caches}) == 1, "roomy enough for all of them"
        single(made, Request(random_prompts(400)[0], 9))
        assert caches[0] not in made._caches.values(), "a longer one has taken its place"
        for rows in (2, 3):
            made.generate([Request(prompt, 2) for prompt in prompts], max_batch=rows)
        assert [rows for rows, _ in made._caches] == [2, 3]


class TestEncode:
    @pytest.fixture
    def folder(self, tiny_folder: Path, tmp_path: Path) -> Path:
        """The tiny model, its tokenizer one that begins every plain text with <pad>."""
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
        first = {"SpecialToken": {"id": "<pad>", "type_id": 0}}
        self.edit(
            folder / "tokenizer.json",
            post_processor={
                **{"type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}]},
                **{"pair": [], "special_tokens": {"<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}}},
            },
        )
        return folder

    def edit(self, path: Path, **change: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    def said(self, engine: TorchEngine, chat: bool) -> str:
        tokens = engine.tokenizer.encode("a model drafts nonsense", chat)
        assert type(tokens) is list and {type(token) for token in tokens} == {int}
        return " ".join(VOCABULARY[token] for token in tokens)

    def test_text_begins_as_the_tokenizer_has_it(self, engine: Maker, folder: Path) -> None:
        assert self.said(engine(f"model.source=file:{folder}"), chat=False) == "<pad> a model drafts <unk>"

    def test_chat_is_a_users_turn_and_the_beginning_of_the_models(self, engine: Maker, folder: Path) -> None:
        template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
        self.edit(
            folder / "tokenizer_config.json",
            chat_template=template + "{% if add_generation_prompt %}<model>{% else %}<eos>{% endif %}",
        )
        assert self.said(engine(f"model.source=file:{folder}"), chat=True) == "<user> a model drafts <unk> <model>"

    @pytest.mark.parametrize("template", ["{{ raise_exception('no such turn') }}", "{{ 1 / 0 }}", "{% nonsense %}"])
    def test_a_chat_template_that_raises_is_one_line(self, engine: Maker, folder: Path, template: str) -> None:
        self.edit(folder / "tokenizer_config.json", chat_template=template)
        with pytest.raises(ConfigError, match=r"^workload\.chat=true: the chat template of tiny refuses a prompt: "):
            engine(f"model.source=file:{folder}").tokenizer.encode("x", chat=True)

    def test_a_tokenizer_without_a_chat_template_is_refused(self, engine: Maker, folder: Path) -> None:
        self.edit(folder / "tokenizer_config.json", chat_template=None)
        with pytest.raises(ConfigError, match="chat"):
            engine(f"model.source=file:{folder}").tokenizer.encode("a model", chat=True)


class TestHead:
    def test_facts(self, engine: Maker, tmp_path: Path) -> None:
        path = tmp_path / "head"
        fitted(engine("draft=lsq"), path)
        facts = heads.facts(path)
        assert (facts["model"], facts["exit_layer"], facts["hidden"], facts["previous"]) == ("tiny", 3, 32, False)
        assert 0 <= facts["raw_agreement"] <= 1 and 0 < facts["agreement"] <= 1

    def test_the_same_data_gives_the_same_head(self, engine: Maker, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        for path in (one, two):
            fitted(engine("draft=lsq", "draft.sgd_epochs=1"), path)
        assert heads.facts(one) | {"solve_s": 0} == heads.facts(two) | {"solve_s": 0}

    def test_of_a_model_of_another_size(self, engine: Maker, tmp_path: Path) -> None:
        path = tmp_path / "head"
        fitted(engine("draft=lsq"), path)
        made = engine("draft=lsq")
        made.model.shape = replace(made.model.shape, hidden=64)
        with pytest.raises(HeadError, match="fitted for hidden=32, but hidden=64 is asked for"):
            made.use_head(path)

    def test_a_head_used_later_is_the_one_that_drafts(self, engine: Maker, tmp_path: Path) -> None:
        """Also where a draft, or an unverified exit, was already made with another."""
        request = Request(random_prompts(9)[0], 16, ignore_eos=True)
        one, two = tmp_path / "one", tmp_path / "two"
        fitted(engine("draft=lsq"), one)
        fitted(engine("draft=lsq", "draft.ridge=1000"), two)
        for verify in ("true", "false"):
            changing, fresh = (engine("draft=lsq", f"policy.verify={verify}") for _ in range(2))
            changing.use_head(one)
            single(changing, request)
            for made in (changing, fresh):
                made.use_head(two)
            got, wanted = single(changing, request), single(fresh, request)
            assert got.tokens == wanted.tokens
            assert [cycle.accepted for cycle in got.cycles] == [cycle.accepted for cycle in wanted.cycles]


class TestCompare:
    def test_the_gap_is_that_of_float32_logits(self, engine: Maker) -> None:
        made, context = engine("draft=none"), random_prompts(9)[0]
        model = made.model
        with torch.inference_mode():
            logits = model.logits(model.norm(stream(model, context, 6)[-1:]))[0]
        best, second = logits.topk(2).indices.tolist()
        tie = made.ties.compare(context, best, second)
        assert tie.gap == pytest.approx(float(logits[best] - logits[second]), abs=1e-4)
        assert tie == made.ties.compare(context, second, best)
        assert tie.rounding == 0 and not tie.explains  # in float32, equal means equal
        assert made.ties.compare(context, best, best).explains

    def test_half_width_rounds_coarsely_and_is_compared_in_float32(self, engine: Maker) -> None:
        full, half = engine("draft=none"), engine("draft=none", "hardware.dtype=bf16")
        context = random_prompts(9)[0]
        token = single(full, Request(context, 1), plain=True).tokens[0]
        other = half.ties.compare(context, token, 7)
        assert half.model.dtype == torch.bfloat16
        exact = half.model.to(torch.float32)
        with torch.inference_mode():
            logits, rounded = (
                m.logits(m.norm(stream(m, context, 6)[-1:]))[0, [token, 7]].float() for m in (exact, half.model)
            )
        assert other.gap == pytest.approx(float(logits.diff().abs()), abs=1e-5)
        least = 2 * 2**-7 * float(logits.abs().max())
        assert other.rounding >= max(least, 2 * float((rounded - logits).abs().max())) * 0.9999

    def test_rounding_is_the_largest_of_all_ways_to_read(self, engine: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        half, contexts = engine("draft=none", "hardware.dtype=bf16"), random_prompts(40, 33, 50, 61)
        every = [half.ties.compare(context, 5, 7) for context in contexts]
        seen = []
        for alone in ties._ALONE:
            with monkeypatch.context() as patch:
                patch.setattr(ties, "_ALONE", (alone,))
                seen.append([half.ties.compare(context, 5, 7) for context in contexts])
        assert [[tie.gap for tie in way] for way in seen] == [[tie.gap for tie in every]] * len(seen)
        assert [tie.rounding for tie in every] == [
            max(tie.rounding for tie in ways) for ways in zip(*seen, strict=True)
        ]
        assert any(way != seen[0] for way in seen), "it does not go without saying"

    def test_the_copy_is_gone_when_a_gpus_mark_is_reset(self, engine: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        made = engine("draft=none", "hardware.dtype=bf16")
        kind: Any = type(made.model)  # which loads it where it is, before it is said to be elsewhere
        copy, copies, seen = kind.to, list[Any](), list[Any]()

        def copied(self: Any, dtype: torch.dtype) -> Any:
            model = copy(self, dtype)
            copies.append(weakref.ref(model))
            return model

        monkeypatch.setattr(kind, "to", copied)
        monkeypatch.setattr(made.weights, "device", SimpleNamespace(type="cuda"))
        monkeypatch.setattr(made.weights, "usage", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.append(copies[-1]()))
        made.ties.compare(random_prompts(9)[0], 5, 7)
        assert seen == [None] and len(copies) == 1

    @pytest.mark.parametrize(("gap", "explains"), [(0.0, True), (0.5, True), (0.50001, False)])
    def test_a_tie_is_a_gap_within_rounding(self, gap: float, explains: bool) -> None:
        assert Tie(gap, 0.5).explains is explains


class TestPlace:
    @pytest.mark.parametrize(
        ("dtype", "wanted"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
    )
    def test_the_dtype_asked_for(self, engine: Maker, dtype: str, wanted: torch.dtype) -> None:
        made = engine("draft=none", f"hardware.dtype={dtype}")
        assert made.weights.dtype == made.model.dtype == made.model.new_cache(1).kv.dtype == wanted
        about = made.describe()
        assert (about["engine"], about["device"], about["threads"]) == ("torch", "cpu", 1)
        assert about["dtype"] == str(wanted).removeprefix("torch.")

    @pytest.mark.parametrize("computes", [True, False])
    def test_auto_takes_half_width_where_it_is_computed_in(
        self, engine: Maker, computes: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(weights, "_cpu_computes_bf16", lambda: computes)
        wanted = torch.bfloat16 if computes else torch.float32
        assert engine("hardware.device=cpu", "hardware.dtype=auto").weights.dtype == wanted

    @pytest.mark.parametrize(
        ("there", "wanted"), [((), "cpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda"), (("cuda",), "cuda")]
    )
    def test_auto_takes_the_fastest_device(
        self, engine: Maker, there: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
        made = engine("hardware=auto")
        assert made.weights.device == torch.device(wanted)
        assert made.weights.dtype == {"cuda": torch.bfloat16, "mps": torch.float16}.get(wanted, made.weights.dtype)

    def test_a_device_that_is_not_there_is_refused(self, engine: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        for device in ("cuda", "mps"):
            message = rf"^hardware\.device={device}: not available on this machine; it has cpu$"
            with pytest.raises(ConfigError, match=message):
                engine(f"hardware.device={device}")

    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("engine.kernels=triton", "they are not for cpu; allowed here are auto, torch"),
            ("engine.graphs=on", "only our own layers (engine.layers=fast) have them, on a GPU"),
        ],
    )
    def test_what_only_a_gpu_has_is_refused_elsewhere(self, engine: Maker, override: str, says: str) -> None:
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{override}: {says}')}$"):
            _ = engine(override).model

    def test_threads(self, engine: Maker) -> None:
        before = torch.get_num_threads()
        try:
            assert engine("hardware.threads=2").describe()["threads"] == torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    def test_memory_and_utilisation(self, engine: Maker) -> None:
        made = engine()
        assert 50 < made.usage().peak_memory_mb < 1e6 and made.usage().device_utilisation is None

    def test_torchs_kernels_need_no_compiler(self, engine: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "problem", lambda: pytest.fail("nothing is to be built"))
        assert engine("engine.kernels=torch").describe()["kernels"] == "torch"

    def test_nothing_is_loaded_before_it_is_asked_for(self, engine: Maker, tmp_path: Path) -> None:
        made = engine(f"model.source=file:{tmp_path / 'none'}")
        assert made.describe()["device"] == "cpu"


class TestNonsense:
    """What would make every number nonsense ends the job with one line."""

    @pytest.mark.parametrize(
        ("name", "where"),
        [
            ("model.embed_tokens.weight", "in the embedding"),
            ("model.layers.2.mlp.down_proj.weight", "after layer 3 of 6"),
            ("model.norm.weight", "in the final norm"),
            ("lm_head.weight", "in the head"),
        ],
    )
    @pytest.mark.parametrize("layers", ["fast", "hf"])
    def test_logits_that_are_not_finite(
        self, engine: Maker, tiny_folder: Path, tmp_path: Path, name: str, where: str, layers: str
    ) -> None:
        folder = shutil.copytree(tiny_folder, tmp_path / "broken")
        weights = load_file(folder / "model.safetensors")
        if name in ("model.norm.weight", "lm_head.weight"):
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if name == "lm_head.weight":
            weights[name][40] = float("nan")  # of one token alone
        else:
            weights[name][..., 3] = float("nan")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        made = engine(f"model.source=file:{folder}", f"engine.layers={layers}")
        with pytest.raises(AssetError, match=rf"^model: its logits are not finite in float32: first {where}$"):
            made.generate([Request((5, 6, 7), 4)], plain=True)

    def test_token_ids_that_the_model_lacks(self, engine: Maker) -> None:
        with pytest.raises(ConfigError, match=r"^model: its tokenizer gives token 80; the model has 80, from 0 to 79$"):
            engine().generate([Request((5, 80), 4)], plain=True)
        with pytest.raises(ConfigError, match="its tokenizer gives token 99"):
            engine().score((5, 6), [(99,)], plain=True)
