"""Weights that stay as their GGUF file packs them: bit by bit the products, logits and tokens of bf16."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import tiny
import torch
from plans import planned
from safetensors.torch import load_file, save_file
from test_native import BUSHY, CHAIN, CPU, PROMPT, bf16, kernels, states  # noqa: F401
from torch import Tensor

from selfspec.engine.torch.engine import TorchEngine
from selfspec.errors import AssetError, ConfigError
from selfspec.model import blocks
from selfspec.model.base import Model
from selfspec.model.kernels import native
from selfspec.model.linear import add_linear, linear, packed, plain
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.types import Request

pytestmark = pytest.mark.usefixtures("inference")
REQUESTS = [Request((5, 9, 12, 7, 20 + i), 24, ignore_eos=True) for i in range(5)]


def quantised(weight: Tensor, kind: str) -> Tensor:
    """A GGUF file's rows, by the library that writes such files; of kinds that it only reads, any with small scales."""
    try:
        return torch.from_numpy(gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind]))
    except NotImplementedError:
        size, _ = blocks.KINDS[kind]
        random = torch.Generator().manual_seed(weight.shape[1])
        rows = torch.randint(256, (len(weight), weight.shape[1] // 256, size), generator=random, dtype=torch.uint8)
        for at in {"Q4_K": (1, 3), "Q6_K": (209,)}[kind]:
            rows[..., at] = rows[..., at] & 0x8F | 0x10  # the exponent of a scale in float16
        return rows.flatten(1)


def tiled(weight: Tensor, kind: str) -> Tensor:
    tiles = blocks.laid_out(quantised(weight, kind), kind)
    assert tiles is not None
    return tiles


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_values_are_those_of_the_library(kind: str) -> None:
    weight = (
        drawn(48, 256 if kind.endswith("K") else 96).float() * torch.logspace(-9, 3, 48)[:, None]
    )  # the smallest scales have no bits to spare
    weight[3] = 0
    rows = quantised(weight, kind)
    exact = torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind])).bfloat16()
    tiles = blocks.laid_out(rows, kind)
    assert tiles is not None and plain(tiles).equal(exact)
    assert blocks.laid_out(rows[:40], kind) is None, "no whole tiles"


def test_what_has_no_tiles() -> None:
    assert blocks.laid_out(quantised(drawn(32, 64), "Q5_1"), "Q5_1") is None


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("kind", blocks.KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 12, 13, 16, 17, 25, 60])
def test_products_are_those_of_bf16(rows: int, kind: str) -> None:
    for out, inputs in ((32, 256), (64, 1536)) if kind.endswith("K") else ((32, 32), (96, 64), (64, 1536)):
        x, bias, residual = drawn(rows, inputs), drawn(out, seed=1), drawn(rows, out, seed=2)
        tiles = packed(
            tiled(drawn(out, inputs, seed=3) * torch.logspace(-7, 2, out).bfloat16()[:, None], kind), own=True
        )
        same = packed(plain(tiles), own=True)
        assert tiles.dtype is torch.uint8 and same.dtype is torch.bfloat16 and same.dim() == 4
        assert linear(x, tiles).equal(linear(x, same))
        assert linear(x, tiles, bias).equal(linear(x, same, bias))
        assert add_linear(residual, x, tiles).equal(add_linear(residual, x, same))


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
def test_a_planted_fault_is_seen() -> None:
    tiles = packed(tiled(drawn(32, 64), "Q4_1"), own=True)
    x, right = drawn(1, 64), linear(drawn(1, 64), tiles)
    tiles[1, 1, -1] ^= 1
    assert not linear(x, tiles).equal(right)


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="do not fit"):
        linear(drawn(2, 32), packed(tiled(drawn(32, 64), "Q4_1"), own=True))


def pack(folder: Path, kinds: dict[str, str]) -> Path:
    """A model's folder as it is converted from a GGUF file: ``kinds`` by what a weight's name ends with."""
    weights, kept = load_file(folder / "model.safetensors"), {}
    for name, weight in weights.items():
        kind = next((kind for end, kind in kinds.items() if name.endswith(f"{end}.weight")), "Q4_1")
        if weight.dim() == 2 and (tiles := blocks.laid_out(quantised(weight, kind), kind)) is not None:
            weights[name], kept[name] = blocks.values(tiles), tiles
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors")
    save_file(kept, folder / blocks.FILE)
    return folder


KINDS = {"embed_tokens": "Q8_0", "v_proj": "Q4_0", "up_proj": "Q8_0"}
"""As in real files: the head in eight bits; and layers of which a fused matrix's parts are packed in several ways."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that our kernels run, of the smallest sizes that have blocks."""
    import transformers

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=128))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)
    path = tmp_path_factory.mktemp("packed")
    transformers.logging.disable_progress_bar()
    model.save_pretrained(path)
    return pack(path, KINDS)


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(
    ("rows", "trees"),
    [
        ([PROMPT], [Tree.chain([4])]),
        ([PROMPT], [BUSHY]),
        ([PROMPT, PROMPT[:4], PROMPT[2:9]], [BUSHY, Tree.chain([4]), CHAIN]),
        ([PROMPT[:1], PROMPT * 3], [Tree.chain(PROMPT * 3), Tree.chain(PROMPT * 2)]),
    ],
    ids=["one token", "tree", "ragged batch", "long"],
)
def test_logits_are_those_of_bf16(folder: Path, rows: list[list[int]], trees: list[Tree]) -> None:
    kept, full = (Llama.load(folder, CPU, torch.bfloat16, True, keep) for keep in (True, False))
    dtypes = {name: getattr(kept.layers[0], name).dtype for name in ("qkv", "out", "gate_up", "down")}
    assert dtypes.pop("gate_up") is torch.bfloat16, "its parts are not packed alike"
    assert set(dtypes.values()) == {torch.uint8} and kept._head is not None
    assert kept._stack is not None and full._stack is not None
    found, right = (model.logits(states(model, rows, trees)) for model in (kept, full))
    assert found.equal(right)


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
def test_ties_are_looked_at_in_the_same_float32(folder: Path) -> None:
    kept, full = (Llama.load(folder, CPU, torch.bfloat16, True, keep).to(torch.float32) for keep in (True, False))
    found, right = (model.logits(states(model, [PROMPT], [CHAIN])) for model in (kept, full))
    assert found.dtype is torch.float32 and found.equal(right)


@pytest.fixture
def made(engine: Callable[..., TorchEngine], tmp_path: Path) -> Callable[..., TorchEngine]:
    """The engine of a tiny model that comes from such a file, in bf16."""
    tiny.model(tmp_path)
    pack(tmp_path, {})
    return lambda *more: engine(f"model.source=file:{tmp_path}", "hardware.dtype=bf16", *more)


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("draft", [["layerskip"], ["ngram"], ["suffix", "draft.corpus=false"]])
def test_speculation_says_what_it_says_in_bf16(made: Callable[..., TorchEngine], draft: list[str]) -> None:
    chosen = (f"draft={draft[0]}", *draft[1:], "engine.max_batch=3")
    engines = [made(*chosen, f"engine.weights={width}") for width in ("packed", "bf16")]
    for plain_ in (True, False):
        kept, full = ([each.tokens for each in e.generate(REQUESTS, plain=plain_)] for e in engines)
        assert kept == full
    assert engines[0].model.layers[0].qkv.dtype is torch.uint8  # type: ignore[attr-defined]
    assert engines[0].plan.label != engines[1].plan.label


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
def test_what_runs_is_told(made: Callable[..., TorchEngine]) -> None:
    assert made("draft=none").describe()["weights"] == "packed"
    assert "weights" not in made("draft=none", "engine.weights=bf16").describe()
    assert "weights" not in made("draft=none", "hardware.dtype=fp32").describe()
    assert made("draft=lsq").plan.answers_id == made("draft=lsq", "engine.weights=packed").plan.answers_id


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("engine.kernels=torch", "only our own kernels"),
        ("hardware.dtype=fp32", r"hardware\.dtype=bf16"),
        ("model.source=file:{tiny}", "does not come from a GGUF file of Q4_0"),
    ],
)
def test_where_they_cannot_be_had(
    made: Callable[..., TorchEngine], override: str, why: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "problem", lambda: None)
    monkeypatch.setattr(native, "multiplies_bf16", lambda: True)
    engine = made("draft=none", "engine.weights=packed", override.format(tiny=tiny_folder))
    with pytest.raises(ConfigError, match=rf"^engine\.weights=packed: .*{why}.*; allowed here are auto, bf16, int8$"):
        assert engine.model


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
def test_a_corrupt_file_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / blocks.FILE).write_bytes(b"torn")
    with pytest.raises(AssetError, match=r"model\.blocks: cannot be read as weights"):
        Llama.load(tmp_path, CPU, torch.bfloat16, True, True)


@pytest.mark.real
@pytest.mark.usefixtures("bf16")
def test_the_real_model() -> None:
    kept, full = (TorchEngine(planned("draft=none", f"engine.weights={width}")) for width in ("packed", "bf16"))
    matrices = [getattr(layer, name) for layer in kept.model.layers for name in ("qkv", "out", "gate_up", "down")]  # type: ignore[attr-defined]
    assert all(matrix.dtype is torch.uint8 for matrix in (*matrices, kept.model._head))  # type: ignore[attr-defined]
    named = kept.weights.folder.glob("*.safetensors")
    assert [file.name for file in named] == ["model.safetensors"], "vLLM reads all that are called so"
    prompts = [full.tokenizer.encode(text, True) for text in ("What is the capital of France?", "Why? " * 200)]
    trees = (Tree.chain([504]), Tree([504, 657, 281, 28, 30], [-1, 0, 0, 1, 1]), Tree.chain(range(20, 40)))
    for prompt in prompts:
        found, right = (read(engine.model, [Tree.chain(prompt), *trees]) for engine in (kept, full))
        assert all(a.equal(b) for a, b in zip(found, right, strict=True))


def read(model: Model, trees: list[Tree]) -> list[Tensor]:
    """Logits of trees, one after the other; of each its root, or all of a chain, is kept."""
    cache = model.new_cache(1024)
    row, found = cache.admit(), []
    for tree in trees:
        at = cache.place([tree])
        hidden = model.run(model.embed(tree.tokens, at), cache, at, 0, model.shape.layers)
        found.append(model.logits(model.norm(hidden)))
        cache.commit(row, range(len(tree)) if tree.is_chain else [0])
    return found
