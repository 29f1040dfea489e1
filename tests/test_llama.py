"""llama: the same logits as transformers, however the layers, tokens and rows are cut up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from selfspec.engine.llama import Llama
from selfspec.errors import AssetError, ConfigError

pytestmark = pytest.mark.usefixtures("inference")

LAYERS, VOCAB, CPU = 3, 50, torch.device("cpu")
BASE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": VOCAB},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"tie_word_embeddings": False}),
    "llama MHA": ("Llama", {"num_key_value_heads": 4}),
    "llama MQA": ("Llama", {"num_key_value_heads": 1}),
    "llama biased": ("Llama", {"attention_bias": True}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
TOKENS = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(1))


def build(name: str, folder: Path) -> tuple[Any, Path]:
    """Transformers' model of random weights, and the folder it is saved in."""
    kind, settings = FAMILY[name]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**BASE | settings))
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # norms and biases too: each must have its effect
        spread = 0.3 if weight.dim() == 1 else 2 / weight.shape[1] ** 0.5
        weight.copy_((weight == 1) + spread * torch.randn(weight.shape, generator=random))
    if kind == "Llama" and settings.get("attention_bias"):
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias = None
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model.eval(), folder


def load(folder: Path) -> Llama:
    return Llama.load(folder, CPU, torch.float32)


def logits(model: Llama, tokens: Tensor, *cuts: int) -> Tensor:
    """Of all tokens, run in pieces that end at ``cuts``."""
    cache, out = model.new_cache(len(tokens)), []
    for start, stop in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
        out.append(model.norm(model.run(model.embed(tokens[start:stop]), cache, start, 0, LAYERS)))
    cache.advance(len(tokens))
    cache.check_integrity(LAYERS)
    return model.logits(torch.cat(out))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(build("qwen3", tmp_path_factory.mktemp("qwen3"))[1])


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    theirs, folder = build(name, tmp_path)
    wanted = theirs(TOKENS[None]).logits[0]
    assert wanted.std() > 0.5, "else the tolerance would hide a mistake"
    ours = load(folder)
    for cuts in [(), (1,), (9, 10, 15), tuple(range(1, 24))]:
        assert_close(logits(ours, TOKENS, *cuts), wanted, atol=1e-4, rtol=0)
    assert ours.shape.eos == {2} and (ours.lm_head is ours.embedding) == (theirs.config.tie_word_embeddings or False)
    assert ours.shape.max_positions == (24 if name == "mistral window" else 64)


def test_settings_as_older_transformers_wrote_them(tmp_path: Path) -> None:
    theirs, folder = build("llama3 rope", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for key in ("head_dim", "tie_word_embeddings"):
        del config[key]
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "eos_token_id": [2, 7]}
    (folder / "config.json").write_text(json.dumps(config))
    ours = load(folder)
    assert_close(logits(ours, TOKENS), theirs(TOKENS[None]).logits[0], atol=1e-4, rtol=0)
    assert ours.shape.eos == {2, 7}


@pytest.mark.parametrize(("used", "positions"), [(False, 64), (True, 8)])
def test_a_window_counts_where_it_is_used(tmp_path: Path, used: bool, positions: int) -> None:
    """Qwen's files name one, and say that it is not."""
    _, folder = build("qwen2", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 8, "use_sliding_window": used}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).shape.max_positions == positions


def test_another_dtype_is_the_same_model(qwen: Llama) -> None:
    double = qwen.to(torch.float64)
    assert double.dtype == double.new_cache(1).keys[0].dtype == torch.float64
    assert_close(logits(double, TOKENS).float(), logits(qwen, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("exit_layer", [0, 1, 2, 3])
def test_layers_run_in_two_ranges(qwen: Llama, exit_layer: int) -> None:
    whole, cut = qwen.new_cache(24), qwen.new_cache(24)
    wanted = qwen.run(qwen.embed(TOKENS), whole, 0, 0, LAYERS)
    early = qwen.run(qwen.embed(TOKENS), cut, 0, 0, exit_layer)
    assert torch.equal(qwen.run(early, cut, 0, exit_layer, LAYERS), wanted)
    for one, other in zip(whole.keys + whole.values, cut.keys + cut.values, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 3])
def test_ragged_rows_are_each_as_if_alone(qwen: Llama, count: int) -> None:
    lengths = [4, 11, 1, 7]
    rows = [TOKENS[i : i + n + count] for i, n in enumerate(lengths)]
    cache = qwen.new_cache(11 + count, rows=len(rows))
    padded = torch.stack([torch.cat((row[:n], TOKENS[: 11 - n])) for row, n in zip(rows, lengths, strict=True)])
    qwen.run(qwen.embed(padded.flatten()), cache, 0, 0, LAYERS)
    new = torch.stack([row[-count:] for row in rows])

    def ragged(new: Tensor, starts: list[int]) -> Tensor:
        hidden = qwen.run(qwen.embed(new.flatten()), cache, torch.tensor(starts), 0, LAYERS)
        return qwen.logits(qwen.norm(hidden)).view(len(new), count, VOCAB)

    alone = torch.stack([logits(qwen, row)[-count:] for row in rows])
    assert_close(ragged(new, lengths), alone, atol=1e-4, rtol=0)
    kept = torch.tensor([3, 0])
    cache.keep_rows(kept)
    assert_close(ragged(new[kept], [7, 4]), alone[kept], atol=1e-4, rtol=0)


def test_rows_of_one_length_need_no_positions_of_their_own(qwen: Llama) -> None:
    rows = torch.stack([TOKENS[:9], TOKENS[9:18]])
    cache = qwen.new_cache(9, rows=2)
    qwen.run(qwen.embed(rows[:, :6].flatten()), cache, 0, 0, LAYERS)
    together = qwen.logits(qwen.norm(qwen.run(qwen.embed(rows[:, 6:].flatten()), cache, 6, 0, LAYERS)))
    assert_close(together, torch.cat([logits(qwen, row)[6:] for row in rows]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not of the family"),
        ({"model_type": None}, "architecture None"),
        ({"hidden_act": "gelu"}, "SwiGLU"),
        ({"mlp_bias": True}, "SwiGLU"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_what_it_cannot_run_is_refused(tiny_folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny_folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_an_output_bias_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**BASE, attention_bias=True)
    transformers.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="output bias"):
        load(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    """As where one file of several is missing: the embedding would do, and say nonsense."""
    _, folder = build("llama untied", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(AssetError, match="lm_head"):
        load(folder)


@pytest.mark.parametrize("damage", ["no folder", "no config", "no weights", "cut off", "garbage", "no layer", "no key"])
def test_a_damaged_folder_is_an_asset_error(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    weights = (tiny_folder / "model.safetensors").read_bytes()
    config = json.loads((tiny_folder / "config.json").read_text())
    match damage:
        case "cut off":
            weights = weights[:-7]
        case "garbage":
            weights = b"\xff" * 4096
        case "no layer":
            config["num_hidden_layers"] += 1
        case "no key":
            del config["rms_norm_eps"]
    (tmp_path / "config.json").write_text("{" if damage == "no config" else json.dumps(config))
    if damage != "no weights":
        (tmp_path / "model.safetensors").write_bytes(weights)
    folder = tmp_path / "none" if damage == "no folder" else tmp_path
    with pytest.raises(AssetError, match=str(folder)) as error:
        load(folder)
    assert "\n" not in str(error.value)
