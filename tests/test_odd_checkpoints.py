"""Any checkpoint is run, or refused in one line: whatever stands in its files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from selfspec.config import Model
from selfspec.engine.tokenizer import ModelTokenizer
from selfspec.errors import ConfigError, UserError
from selfspec.model import hf
from selfspec.model.base import Layers
from selfspec.model.tree import Tree

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inference")]

KEYS = [
    *(*tiny.CONFIG, "rope_parameters", "rope_scaling", "sliding_window", "layer_types", "quantization_config", "dtype"),
    *("attention_bias", "mlp_bias", "auto_map", "text_config", "is_encoder_decoder", "attn_implementation"),
    *("partial_rotary_factor", "output_hidden_states", "id2label", "num_labels", "use_sliding_window"),
]
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 7, 32, 1.5, float("nan"), float("inf"), 2**70, "", "x", "silu", "auto"),
        *([], [1], ["full_attention"] * 6, {}, {"a": 1}, {"rope_type": "linear"}, {"rope_type": "yarn", "factor": 2}),
        *("llama", "mistral", "gpt2", "gemma3", "mamba", "bert", "t5", "float16", {"quant_method": "mxfp4"}),
    ]
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
FIXED = settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint that may be spoilt."""
    yield Path(shutil.copytree(whole, tmp_path / "model"))


def run(folder: Path, layers: Layers = Layers.auto) -> None:
    """Loads it and runs a prompt; only a user's mistake may come of it, in one line."""
    try:
        model = hf.load(folder, torch.device("cpu"), torch.float32, layers)
        cache = model.new_cache(3)
        at = cache.place([Tree.chain([5, 6, 7])], row=cache.admit())
        hidden = model.run(model.embed([5, 6, 7], at), cache, at, 0, model.shape.layers)
        assert model.logits(model.norm(hidden)).shape == (3, len(tiny.VOCABULARY))
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error


@settings(FIXED, max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3), st.sampled_from(KEYS))
@example({"rope_theta": "gelu"}, "use_cache")
@example({"rope_theta": 2**70}, "use_cache")
@example({"max_position_embeddings": 0}, "use_cache")
@example({"model_type": {"a": 1}}, "use_cache")
@example({"num_hidden_layers": 2**40}, "use_cache")
@example({"num_labels": 2**40}, "use_cache")
@example({"max_position_embeddings": 2**40}, "use_cache")
def test_any_settings(folder: Path, changed: dict[str, object], lost: str) -> None:
    settings = {key: value for key, value in tiny.CONFIG.items() if key != lost} | changed
    (folder / "config.json").write_text(json.dumps(settings))
    run(folder)


@settings(FIXED, max_examples=30)
@given(st.sampled_from(["config.json", "generation_config.json", "model.safetensors.index.json"]), ANY_JSON)
def test_any_json(folder: Path, whole: Path, name: str, content: object) -> None:
    weights = folder / "model.safetensors"
    if "index" in name and weights.exists():
        weights.rename(folder / "part.safetensors")
    elif not weights.exists():
        shutil.copy(whole / "model.safetensors", weights)
    (folder / name).write_text(json.dumps(content))
    run(folder)
    for spoilt in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (folder / spoilt).unlink(missing_ok=True)
    shutil.copy(whole / "config.json", folder)


@settings(FIXED, max_examples=40)
@given(
    st.sampled_from(["config.json", "model.safetensors", "generation_config.json"]),
    st.integers(0, 200_000),
    st.binary(max_size=9),
)
def test_any_bytes(folder: Path, whole: Path, name: str, at: int, content: bytes) -> None:
    """A file that is cut off somewhere, or was written over there."""
    data = (whole / name).read_bytes() if (whole / name).exists() else b""
    at %= len(data) + 1
    (folder / name).write_bytes(data[:at] + content + (data[at + len(content) :] if at % 2 else b""))
    run(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for spoilt in ("config.json", "model.safetensors"):
        shutil.copy(whole / spoilt, folder)


@settings(FIXED, max_examples=40)
@given(
    st.sampled_from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]),
    st.binary(max_size=9) | ANY_JSON.map(lambda node: json.dumps(node).encode()),
)
@example("chat_template.jinja", b"{% for %}")
@example("chat_template.jinja", b"{{ messages[9] }}")
@example("tokenizer_config.json", b'{"chat_template": 3}')
@example("tokenizer_config.json", b'{"model_max_length": "x"}')
def test_any_tokenizer(folder: Path, whole: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    tokenizer = ModelTokenizer(Model(name="odd", source=f"file:{folder}"), lambda: folder)
    try:
        assert tokenizer.decode(tokenizer.encode("a model drafts", chat=True)) is not None
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error
    for spoilt in (name, "tokenizer.json", "tokenizer_config.json"):
        (folder / spoilt).unlink(missing_ok=True)
    for spoilt in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / spoilt, folder)


def test_a_size_that_is_none_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | {"max_position_embeddings": 0}))
    with pytest.raises(UserError, match=r"cannot be run as a model: by config\.json, max_positions=0$"):
        hf.load(folder, torch.device("cpu"), torch.float32, Layers.auto)
    with pytest.raises(ConfigError, match="architecture 'mamba' is not of the family"):
        (folder / "config.json").write_text(json.dumps(tiny.CONFIG | {"model_type": "mamba"}))
        hf.load(folder, torch.device("cpu"), torch.float32, Layers.fast)
