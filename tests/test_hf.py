"""hf: other architectures by their own layers decode what transformers does, however they are drafted and batched."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from zoo import BOTH, HEADS, IDS, MODERN, OLD, OPT, SCOUT, SIZES, VOCAB, WINDOW, build

from selfspec.axes import DRAFT
from selfspec.engine.torch.session import Scheduler
from selfspec.errors import AssetError, ConfigError
from selfspec.model import hf
from selfspec.model.base import Layers, Model
from selfspec.model.cache import KVCache
from selfspec.model.hf import HFModel
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Request

pytestmark = pytest.mark.usefixtures("inference")

CPU, NEW, EXIT = torch.device("cpu"), 20, 2
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS},
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", OPT),
    "GPT-2": ("GPT2LMHeadModel", OLD),
    "Llama 4": ("Llama4ForCausalLM", SCOUT),
    "Qwen2": ("Qwen2ForCausalLM", MODERN | {"tie_word_embeddings": True}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", SIZES | IDS | {"max_position_embeddings": 128}),
    "Mistral": ("MistralForCausalLM", MODERN | {"sliding_window": 100}),
    "Gemma 3": ("Gemma3ForCausalLM", MODERN | HEADS | WINDOW | BOTH | {"query_pre_attn_scalar": 8}),
}


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(2, VOCAB, (n,), generator=random).tolist()) for n in lengths]


PROMPTS = prompts(3, 17, 9, 1, 30)


class Oracle(Draft):
    """Trees in which a wrong token stands before every right one, and leads on to a token that would be right."""

    def __init__(self, model: Model, answers: Sequence[tuple[int, ...]]) -> None:
        super().__init__(model)
        self.answers = answers

    def nodes(self, k: int) -> int:
        return 3 * k + 1

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        trees = []
        for row, k in zip(rows, ks, strict=True):
            (answer,) = (a for a in self.answers if a[: len(row.tokens)] == tuple(row.tokens))
            tree, parent = Tree.chain(row.tokens[-1:]), 0
            for depth, token in enumerate(answer[len(row.tokens) :][:k]):
                wrong = tree.add(parent, (token + 1) % VOCAB)
                if (len(row.tokens) + depth) % 5 == 4:
                    break
                parent = tree.add(parent, token)
                tree.add(wrong, token)
            trees.append(tree)
        return Proposal(trees)


def decode(model: Model, draft: Draft, rows: int, k: int, new: int = NEW) -> list[Completion]:
    """All prompts, ``rows`` at once; then every layer must hold all it should."""
    target = Target(model, model.shape.layers, model.norm)
    cache = model.new_cache(max(map(len, PROMPTS)) + new + draft.nodes(k), rows=rows)
    requests = [Request(prompt, new, ignore_eos=True) for prompt in PROMPTS]
    return Scheduler(Speculation(target, draft, Gate(), Controller(k), LongestPrefix()), cache).run(requests)


def tokens(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def check_drafts(model: Model, wanted: list[tuple[int, ...]]) -> None:
    """Plain, early exit and trees, alone and three at once, all give the wanted tokens."""
    early = DRAFT.new("layerskip", exit_layer=EXIT).make(model, None)
    oracle = Oracle(model, [prompt + answer for prompt, answer in zip(PROMPTS, wanted, strict=True)])
    for draft, k in ((Draft(model), 0), (early, 3), (oracle, 4)):
        for rows in (1, 3):
            done = decode(model, draft, rows, k)
            assert tokens(done) == wanted, (type(draft).__name__, rows)
            cycles = [cycle for completion in done for cycle in completion.cycles]
            accepted, proposed = sum(c.accepted for c in cycles), sum(c.proposed for c in cycles)
            assert k == 0 or 0 < accepted < proposed, "else nothing is proven"
            assert k == 0 or any(c.accepted > 1 for c in cycles) or draft is early


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_generate(name: str, tmp_path: Path) -> None:
    theirs = build(*ARCHITECTURES[name], tmp_path)
    theirs.generation_config.eos_token_id = None
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        wanted.append(tuple(out[0, len(prompt) :].tolist()))
    assert len({token for answer in wanted for token in answer}) > 10, "else a mistake could hide"
    model = HFModel.load(tmp_path, CPU, torch.float32)
    assert model.folder == tmp_path and model.shape.eos == {1}
    assert (model.lm_head is model.embedding) == bool(theirs.config.tie_word_embeddings)
    check_drafts(model, wanted)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> tuple[Llama, HFModel]:
    return Llama.load(tiny_folder, CPU, torch.float32), HFModel.load(tiny_folder, CPU, torch.float32)


def test_a_llama_decodes_as_by_our_own_layers(pair: tuple[Llama, HFModel]) -> None:
    ours, theirs = pair
    assert theirs.shape == ours.shape
    check_drafts(theirs, tokens(decode(ours, Draft(ours), 1, 0)))


def test_logits_of_a_ragged_batch_of_trees(pair: tuple[Llama, HFModel]) -> None:
    trees = [Tree([3, 4, 5, 6, 7], [-1, 0, 0, 2, 1]), Tree.chain([8]), Tree([9, 10, 11], [-1, 0, 0])]
    logits = []
    for model in pair:
        cache, last = model.new_cache(50, rows=3), model.shape.layers
        for prompt in PROMPTS[:3]:
            row = cache.admit()
            at = cache.place([Tree.chain(prompt)], row=row)
            model.run(model.embed(prompt, at), cache, at, 0, last)
            cache.commit(row, range(len(prompt)))
        at = cache.place(trees)
        hidden = model.embed([token for tree in trees for token in tree.tokens], at)
        states = model.norm(model.run(model.run(hidden, cache, at, 0, EXIT), cache, at, EXIT, last))
        logits.append(model.logits(states))
    assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert logits[0].std() > 0.5


def test_another_dtype_is_a_copy(pair: tuple[Llama, HFModel]) -> None:
    single, double = pair[1], pair[1].to(torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert (double.folder, double.shape) == (single.folder, single.shape)
    assert double.lm_head is double.embedding and double.difference() < 1e-6
    assert tokens(decode(double, Draft(double), 3, 0)) == tokens(decode(single, Draft(single), 3, 0))


@pytest.mark.parametrize(
    ("difference", "dtype", "taken"),
    [
        (1e-4, torch.float32, True),
        (0.02, torch.float32, False),
        (0.02, torch.bfloat16, True),
        (0.2, torch.bfloat16, False),
        (float("nan"), torch.bfloat16, True),  # weights that are broken: said where they are run
    ],
)
def test_the_proof_allows_for_rounding(
    difference: float, dtype: torch.dtype, taken: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFModel, "difference", lambda model, trees=True: difference)
    if taken:
        assert HFModel.load(tiny_folder, CPU, dtype).dtype is dtype
    else:
        with pytest.raises(ConfigError, match="its logits then differ by"):
            HFModel.load(tiny_folder, CPU, dtype)


def test_scout_is_read_from_its_multimodal_folder(tmp_path: Path) -> None:
    import transformers

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_output_dim": 16}
    config = transformers.Llama4Config(text_config=SCOUT, vision_config=vision | {"projector_input_dim": 16})
    theirs = transformers.Llama4ForConditionalGeneration(config)
    transformers.logging.disable_progress_bar()
    theirs.save_pretrained(tmp_path)
    model = HFModel.load(tmp_path, CPU, torch.float32)
    assert type(model.lm).__name__ == "Llama4ForCausalLM"
    wanted = theirs.language_model(torch.tensor([PROMPTS[1]])).logits[0]
    at = (cache := model.new_cache(17)).place([Tree.chain(PROMPTS[1])], row=cache.admit())
    assert_close(model.logits(model.norm(model.run(model.embed(PROMPTS[1], at), cache, at, 0, 4))), wanted)


class TestLoad:
    """Ours where they know the architecture."""

    @pytest.mark.parametrize(("layers", "kind"), [("auto", Llama), ("fast", Llama), ("hf", HFModel)])
    def test_of_a_llama(self, tiny_folder: Path, layers: str, kind: type) -> None:
        assert type(hf.load(tiny_folder, CPU, torch.float32, Layers[layers])) is kind

    def test_of_another(self, tmp_path: Path) -> None:
        build(*ARCHITECTURES["GPT-2"], tmp_path)
        for layers in (Layers.auto, Layers.hf):
            assert type(hf.load(tmp_path, CPU, torch.float32, layers)) is HFModel
        with pytest.raises(ConfigError, match="architecture 'gpt2' is not of the family"):
            hf.load(tmp_path, CPU, torch.float32, Layers.fast)


class TestLimits:
    """As many positions as its rules are the same for in every pass; windows and chunks are masks."""

    @pytest.mark.parametrize(
        ("kind", "settings", "limit"),
        [
            ("OPTForCausalLM", ARCHITECTURES["OPT"][1], 128),
            ("GPT2LMHeadModel", ARCHITECTURES["GPT-2"][1], 128),
            ("MistralForCausalLM", MODERN | {"sliding_window": 24}, 128),
            ("MistralForCausalLM", MODERN | {"sliding_window": None}, 128),
            ("Qwen2ForCausalLM", MODERN | {"sliding_window": 24, "use_sliding_window": False}, 128),
            ("Phi3ForCausalLM", MODERN | LONGROPE, 64),
            ("Llama4ForCausalLM", SCOUT | {"attention_chunk_size": 24}, 79),
            ("Llama4ForCausalLM", SCOUT, 79),
            ("Llama4ForCausalLM", SCOUT | {"attn_temperature_tuning": False}, 10485760),
            ("Llama4ForCausalLM", SCOUT | {"attention_chunk_size": 8192, "floor_scale": 8192}, 8191),
        ],
    )
    def test_are(self, kind: str, settings: dict[str, Any], limit: int, tmp_path: Path) -> None:
        theirs = build(kind, settings, tmp_path)
        assert HFModel(theirs).shape.max_positions == limit

    def test_up_to_the_limit_all_is_as_in_the_model(self, tmp_path: Path) -> None:
        """So that a chunk, a window or a temperature which begins one position earlier would be seen."""
        for name, (kind, settings) in {k: ARCHITECTURES[k] for k in ("Llama 4", "Mistral", "OPT")}.items():
            theirs = build(kind, settings, tmp_path / name)
            model = HFModel.load(tmp_path / name, CPU, torch.float32)
            (text,) = prompts(model.shape.max_positions)
            at = (cache := model.new_cache(len(text))).place([Tree.chain(text)], row=cache.admit())
            logits = model.logits(model.norm(model.run(model.embed(text, at), cache, at, 0, 4)))
            assert_close(logits, theirs(torch.tensor([text])).logits[0], atol=1e-4, rtol=1e-4)


def test_stop_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    build("Qwen2ForCausalLM", MODERN, tmp_path)
    assert HFModel.load(tmp_path, CPU, torch.float32).shape.eos == {1}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert HFModel.load(tmp_path, CPU, torch.float32).shape.eos == {5, 6}


class TestRefusals:
    """One clear line for what cannot be run in ranges of layers, and for what is no model."""

    @pytest.mark.parametrize(
        ("kind", "settings", "message"),
        [
            ("OPTForCausalLM", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, "states of another size"),
            ("MambaForCausalLM", {}, "has linear_attention layers"),
            ("RwkvForCausalLM", {}, "takes no cache of keys and values"),
            ("Qwen3NextForCausalLM", {"num_experts": 4, "moe_intermediate_size": 16}, "has linear_attention layers"),
        ],
    )
    def test_an_architecture(self, kind: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
        base = ARCHITECTURES["OPT"][1] if kind.startswith("OPT") else MODERN
        build(kind, base | settings, tmp_path)
        with pytest.raises(ConfigError, match=message) as refusal:
            HFModel.load(tmp_path, CPU, torch.float32)
        assert str(refusal.value).startswith("model: ") and "\n" not in str(refusal.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "t5"}, "architecture 't5' has an encoder; only decoders are run"),
            ({"model_type": "vit"}, "architecture 'vit' is not a causal language model"),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
        ],
    )
    def test_a_config(self, tiny_folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        config = json.loads((tiny_folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            HFModel.load(tmp_path, CPU, torch.float32)

    @pytest.fixture
    def copy(self, tiny_folder: Path, tmp_path: Path) -> Path:
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
        return tmp_path

    def test_an_unknown_architecture(self, copy: Path) -> None:
        (copy / "config.json").write_text('{"model_type": "unheard_of"}')
        with pytest.raises(AssetError, match=r"config\.json cannot be read"):
            HFModel.load(copy, CPU, torch.float32)

    def test_a_pickle(self, copy: Path) -> None:
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
        with pytest.raises(AssetError, match="cannot be read as a model"):
            HFModel.load(copy, CPU, torch.float32)

    def test_a_missing_tensor(self, copy: Path) -> None:
        weights = load_file(copy / "model.safetensors")
        for layer in (1, 2):
            del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(AssetError, match=r"the weights lack model.layers.1.mlp.up_proj.weight and 1 more$"):
            HFModel.load(copy, CPU, torch.float32)

    def test_a_torn_file(self, copy: Path) -> None:
        whole = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(AssetError, match="cannot be read as a model"):
            HFModel.load(copy, CPU, torch.float32)


def test_packed_experts_are_read_as_the_weights_they_stand_for(tmp_path: Path) -> None:
    """GPT-OSS as it is published, in MXFP4 (OCP's Microscaling Formats 1.0): 32 numbers of 4 bits share an exponent."""
    sizes = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    build("GptOssForCausalLM", MODERN | HEADS | WINDOW | sizes, tmp_path / "plain")
    weights, random = load_file(tmp_path / "plain" / "model.safetensors"), torch.Generator().manual_seed(0)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers, packed = torch.cat([numbers, -numbers]), dict(weights)
    for name in [name for name in weights if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outputs = weights[name].shape
        digits = torch.randint(16, (experts, outputs, inputs), generator=random)
        exponents = torch.randint(124, 128, (experts, outputs, inputs // 32), generator=random)
        weights[name] = (numbers[digits] * (exponents - 127.0).exp2().repeat_interleave(32, -1)).mT.contiguous()
        del packed[name]
        pairs = digits.view(experts, outputs, inputs // 32, 16, 2)
        packed |= {f"{name}_blocks": (pairs[..., 0] | pairs[..., 1] << 4).byte(), f"{name}_scales": exponents.byte()}
    assert len(packed) == len(weights) + 2 * 4
    save_file(weights, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    (tmp_path / "packed").mkdir()
    save_file(packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | quantised))
    plain, made = (hf.load(tmp_path / name, CPU, torch.float32, Layers.auto) for name in ("plain", "packed"))
    assert isinstance(plain, HFModel) and isinstance(made, HFModel)
    wanted, found = plain.lm.state_dict(), made.lm.state_dict()
    assert wanted.keys() == found.keys() and all(found[name].equal(weight) for name, weight in wanted.items())
    assert made.to(torch.bfloat16).dtype is torch.bfloat16, "a copy to look at ties with"
