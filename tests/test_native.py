"""native: our own CPU kernels compute what torch's operators do, in float32 and in bf16."""

import math
import mmap
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import caches
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from selfspec.model.kernels import native
from selfspec.model.linear import add_linear, linear, packed, packed_int8, plain, rounded
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation.draft.layerskip import EarlyExit, Exit
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.gate.entropy import Entropy, entropy
from selfspec.speculation.gate.maxp import MaxProb, max_prob
from selfspec.speculation.gate.varH import VarEntropy, var_entropy
from selfspec.speculation.head import ExitHead, FittedExit, RawExit, laid_out
from selfspec.speculation.readout import Readout

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inference", "kernels")]
BF16 = pytest.mark.usefixtures("bf16")
CPU, LAYERS, VOCAB = torch.device("cpu"), 3, 64
PROMPT = [5, 9, 7, 3, 3, 60, 2, 8, 41, 12, 7]
BUSHY = Tree([9, 7, 8, 7, 8, 7], [-1, 0, 0, 1, 1, 2])
CHAIN = Tree.chain([9, 7, 8])


@pytest.fixture(scope="session")
def kernels() -> None:
    """Built here, not while tests are collected."""
    if (problem := native.problem()) is not None:
        pytest.skip(f"no native kernels: {problem}")


@pytest.fixture(scope="session")
def bf16(kernels: None) -> None:
    if not native.multiplies_bf16():
        pytest.skip("this CPU does not multiply bf16")


@pytest.fixture(scope="module", params=[32, 64, 128])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": request.param, "attention_bias": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=128))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias = None
            layer.input_layernorm.weight.add_(torch.linspace(-0.5, 0.5, 96))
            layer.self_attn.q_proj.bias.add_(0.3)
            layer.self_attn.v_proj.bias.add_(-0.2)
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)
    path = tmp_path_factory.mktemp(f"heads-of-{request.param}")
    transformers.logging.disable_progress_bar()
    model.save_pretrained(path)
    return path


def states(model: Llama, rows: list[list[int]], trees: list[Tree], layers: tuple[int, ...] = (0, LAYERS)) -> Tensor:
    """Final states of the trees' nodes, rows of different lengths before them; layers run in the ranges given."""
    cache = model.new_cache(64, rows=len(rows))
    for prompt in rows:
        at = cache.place([Tree.chain(prompt)], row=(row := cache.admit()))
        model.run(model.embed(prompt), cache, at, 0, LAYERS)
        cache.commit(row, range(len(prompt)))
    at = cache.place(trees)
    hidden = model.embed([token for tree in trees for token in tree.tokens])
    for first, last in pairwise(layers):
        hidden = model.run(hidden, cache, at, first, last)
    for row, tree in enumerate(trees):
        cache.commit(row, range(len(tree)))
    caches.check(cache, LAYERS)
    return model.norm(hidden)


@pytest.mark.parametrize(
    ("rows", "trees"),
    [
        ([PROMPT], [Tree.chain([4])]),
        ([PROMPT], [CHAIN]),
        ([PROMPT], [BUSHY]),
        ([PROMPT, PROMPT[:4], PROMPT[2:9]], [BUSHY, Tree.chain([4]), CHAIN]),
    ],
    ids=["one token", "chain", "tree", "ragged batch"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layers_are_those_of_torch(
    folder: Path, rows: list[list[int]], trees: list[Tree], dtype: torch.dtype
) -> None:
    ours, torchs = (states(Llama.load(folder, CPU, dtype, own), rows, trees) for own in (True, False))
    exact = states(Llama.load(folder, CPU, torch.float32), rows, trees)
    if dtype is torch.float32:
        assert_close(ours, torchs, atol=2e-5, rtol=2e-5)
    else:  # no further from the truth than torch's operators are
        assert (ours - exact).norm() <= 1.3 * (torchs - exact).norm() + 1e-3


@BF16
def test_int8_layers_are_those_of_torch(folder: Path) -> None:
    models = [Llama.load(folder, CPU, torch.float32, own) for own in (True, False)]
    for model in models:
        model.quantise()
    assert models[0]._stack is not None and models[1]._stack is None
    ours, torchs = (states(model, [PROMPT, PROMPT[:4]], [BUSHY, CHAIN]) for model in models)
    exact = states(Llama.load(folder, CPU, torch.float32), [PROMPT, PROMPT[:4]], [BUSHY, CHAIN])
    # Where float32 rounds the other way, an input falls a step of int8 elsewhere: as near to the truth, not the same.
    assert (ours - exact).norm() <= 1.3 * (torchs - exact).norm()
    assert (ours - torchs).norm() <= 0.5 * (torchs - exact).norm()


def test_ranges_of_layers_come_to_all_of_them(folder: Path) -> None:
    model = Llama.load(folder, CPU, torch.float32, native=True)
    whole, parts = (states(model, [PROMPT], [BUSHY], layers) for layers in ((0, LAYERS), (0, 1, LAYERS)))
    assert_close(whole, parts, atol=0, rtol=0)


@pytest.fixture(scope="module")
def models(folder: Path) -> Callable[[torch.dtype, bool], Llama]:
    """Loaded once: for what leaves a model as it was."""
    return cache(lambda dtype, own: Llama.load(folder, CPU, dtype, own))


class TestAnExit:
    """The layers, the head and the readout in one call, against one after the other by torch's operators."""

    @staticmethod
    def head(kind: str, model: Llama) -> ExitHead:
        if kind == "raw":
            return RawExit(model)
        width, rank = 96 * (1 + (kind == "both states")), 32
        draw = torch.Generator().manual_seed(3)
        names = {"weight": (96, width), "bias": (96,)}
        if kind == "low rank":
            names = {"scale": (96,), "down": (rank, width), "up": (96, rank), "bias": (96,)}
        tensors = {name: torch.randn(size, generator=draw) / size[-1] ** 0.5 for name, size in names.items()}
        tensors = {name: t.to(model.dtype) for name, t in tensors.items()}
        return FittedExit(laid_out(tensors, model.native), previous=kind == "both states")

    def read(self, model: Llama, kind: str, ids: Tensor | None, gate: Gate) -> Exit:
        """Of three rows, a token after what each has verified."""
        cache = model.new_cache(64, rows=3)
        for prompt in (PROMPT, PROMPT[:4], PROMPT[2:9]):
            at = cache.place([Tree.chain(prompt)], row=(row := cache.admit()))
            model.run(model.embed(prompt), cache, at, 0, LAYERS)
            cache.commit(row, range(len(prompt)))
        at = cache.place([Tree.chain([token]) for token in (4, 5, 6)])
        assert (model.stack(cache, at) is not None) == model.native
        draft = EarlyExit(model, 2, self.head(kind, model), Readout(model, ids), width=3)
        previous = torch.linspace(-2, 3, 3 * 96).view(3, 96).to(model.dtype)
        read = draft.exit([4, 5, 6], previous, cache, at, 2, gate)
        model.run(read.hidden, cache, at, 2, LAYERS)
        for row in range(3):
            cache.commit(row, range(1))
        caches.check(cache, LAYERS)
        return read

    @pytest.mark.parametrize(
        "ids", [None, torch.arange(32) * 2, torch.arange(30)], ids=["all tokens", "frequent ones", "no whole lanes"]
    )
    @pytest.mark.parametrize("kind", ["raw", "affine", "both states", "low rank"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_that_of_torch(
        self, models: Callable[[torch.dtype, bool], Llama], kind: str, ids: Tensor | None, dtype: torch.dtype
    ) -> None:
        gate = MaxProb(0)
        ours, torchs = (self.read(models(dtype, own), kind, ids, gate) for own in (True, False))
        exact = self.read(models(torch.float32, False), kind, ids, gate)
        for own, other, right in zip(ours[:3], torchs[:3], exact[:3], strict=True):
            assert own.shape == other.shape and own.dtype is other.dtype
            if dtype is torch.float32:
                assert_close(own, other, atol=1e-4, rtol=1e-4)
            else:  # no further from the truth than torch's operators are
                assert (own - right).norm() <= 1.3 * (other - right).norm() + 1e-3
        likely, log_p, _ = Readout(models(dtype, False), ids).candidates(ours.logits, 3, ours.logits[:0])
        assert ours.tokens == likely
        assert_close(ours.log_p, log_p)
        assert_close(ours.signals, [math.exp(row[0]) for row in log_p])

    def test_every_gate_sees_its_own_signal(self, folder: Path) -> None:
        model = Llama.load(folder, CPU, torch.float32, native=True)
        for gate in (MaxProb(0), Entropy(0), VarEntropy(0)):
            read = self.read(model, "raw", None, gate)
            assert_close(read.signals, gate.signal(read.logits).tolist())
        assert self.read(model, "raw", None, Gate()).signals == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "temperature"), [(0.0, 1.0), (0.1, 0.7), (3.0, 1.3), (30.0, 1.0)])
def test_statistics_and_candidates_are_those_of_torch(
    scale: float, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (torch.randn(5, 480, generator=torch.Generator().manual_seed(1)) * scale - 40).to(dtype)
    found = native.statistics(logits)
    readout = object.__new__(Readout)
    readout.ids, readout.temperature = None, temperature
    candidates = readout.candidates(logits, 7, found.entropy)
    monkeypatch.setattr(native, "_loaded", False)
    for own, by_torch in zip(found, (max_prob, entropy, var_entropy), strict=True):
        assert_close(own, by_torch(logits), atol=2e-4, rtol=1e-4)
    values = (logits.float() / temperature).log_softmax(-1)
    # The first of equals, as in `max`: a stable sort keeps their order.
    wanted = values.sort(descending=True, stable=True)
    assert candidates[0] == wanted.indices[:, :7].tolist()
    assert_close(torch.tensor(candidates[1]), wanted.values[:, :7], atol=1e-5, rtol=1e-5)
    assert [tokens[0] for tokens in candidates[0]] == logits.max(-1).indices.tolist()


def test_a_planted_fault_is_seen(folder: Path) -> None:
    """A node that sees its sibling."""
    model, torchs = (Llama.load(folder, CPU, torch.float32, own) for own in (True, False))
    seen, right = states(model, [PROMPT], [Tree.chain(BUSHY.tokens)]), states(torchs, [PROMPT], [BUSHY])
    with pytest.raises(AssertionError):
        assert_close(seen, right, atol=2e-5, rtol=2e-5)


@BF16
@pytest.mark.parametrize("rows", [1, 2, 3, 12, 13, 16, 17, 25, 60])
@pytest.mark.parametrize(("out", "inputs"), [(32, 32), (96, 64), (64, 1536)])
def test_products_are_rounded_once(rows: int, out: int, inputs: int) -> None:
    random = torch.Generator().manual_seed(rows)
    draw = lambda *size: torch.randn(size, generator=random).bfloat16()  # noqa: E731
    x, weight, bias, residual = draw(rows, inputs), draw(out, inputs), draw(out), draw(rows, out)
    tiles = packed(weight, own=True)
    assert tiles.dim() == 4
    exact = x.double() @ weight.double().T
    for ours, right in (
        (linear(x, tiles), exact),
        (linear(x, tiles, bias), exact + bias),
        (add_linear(residual, x, tiles), exact + residual),
    ):
        assert_close(ours, right.bfloat16(), atol=0.02, rtol=2**-7)


@BF16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 12, 16, 25, 60])
def test_int8_is_what_torch_makes_of_it(rows: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(rows)
    x, weight, bias, residual = (
        torch.randn(*size, generator=random).to(dtype) for size in ((rows, 64), (96, 64), (96,), (rows, 96))
    )
    x[0] = 0
    tiles, small = packed_int8(weight, own=True), rounded(weight)
    assert isinstance(tiles, Tensor) and tiles.shape == (6, 17, 64)
    near = {"atol": 1e-4, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.03, "rtol": 2**-6}
    assert_close(linear(x, tiles), linear(x, small), **near)
    assert_close(linear(x, tiles, bias), linear(x, small, bias), **near)
    assert_close(add_linear(residual, x, tiles), add_linear(residual, x, small), **near)
    assert torch.equal(torch.cat([linear(row, tiles) for row in x.split(1)]), linear(x, tiles))
    assert_close(plain(tiles), plain(small).float(), atol=1e-6, rtol=0)


@BF16
def test_tiles_are_undone() -> None:
    weight = torch.arange(64 * 6).view(64, 6).bfloat16()
    assert torch.equal(plain(packed(weight, own=True)), weight)


@BF16
def test_weights_that_are_laid_out_at_once_do_not_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of memory that hold a few, and one that is larger than a chunk."""
    monkeypatch.setattr(native, "_CHUNK", 20_000)
    weights = [torch.full((32, 96 if i else 1024), float(i)).bfloat16() for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        packs = list(pool.map(lambda weight: packed(weight, own=True), weights))
    assert all(torch.equal(plain(pack), weight) for pack, weight in zip(packs, weights, strict=True))
    assert all(pack.data_ptr() % 64 == 0 for pack in packs), "a line of the cache is read at once"


@BF16
def test_a_kernel_without_huge_pages_does_with_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(mmap.mmap):
        def madvise(self, *asked: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Small)
    monkeypatch.setattr(native, "_chunk", torch.empty(0, dtype=torch.uint8))
    monkeypatch.setattr(native, "_used", 0)
    weight = torch.randn(64, 32).bfloat16()
    tiles = native.tiled(weight)
    assert tiles is not None and native.untiled(tiles).equal(weight)


@pytest.mark.parametrize("size", [(48, 64), (64, 63)])
def test_a_weight_that_makes_no_whole_tiles_is_left_to_onednn(size: tuple[int, int]) -> None:
    assert packed(torch.zeros(size).bfloat16(), own=True).dim() == 2


@BF16
def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="do not fit"):
        linear(torch.zeros(2, 32).bfloat16(), packed(torch.zeros(32, 64).bfloat16(), own=True))


def test_a_failing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert native.problem.__wrapped__() == f"{broken} failed: no such flag"
    with pytest.raises(subprocess.CalledProcessError):
        native._library(str(broken))


def test_only_what_was_built_here_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    kernels, theirs = tmp_path / "cache" / "kernels", tmp_path / "theirs"
    kernels.mkdir(parents=True)
    kernels.chmod(0o777)
    library, built = native._library(str(compiler)), "built\n"
    assert (library.read_text(), kernels.stat().st_mode & 0o777) == (built, 0o700)
    theirs.write_text("theirs")
    for plant in (lambda: library.write_text("theirs"), lambda: (library.unlink(), library.symlink_to(theirs))):
        plant()
        assert native._library(str(compiler)).read_text() == built
        assert not library.is_symlink() and theirs.read_text() == "theirs"
    library.with_suffix(".sha256").unlink()
    library.write_text("of an earlier selfspec")
    assert native._library(str(compiler)).read_text() == built
    monkeypatch.setattr("os.geteuid", lambda: kernels.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to another user"):
        native._library(str(compiler))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equals_is_the_likeliest(dtype: torch.dtype) -> None:
    logits = torch.randn(40, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[7, 3] = logits[7, 90] = logits[8, 159] = logits[9, 0] = 9
    logits[10] = -float("inf")
    assert native.takes_rows(logits)
    assert torch.ops.selfspec.argmax(logits).tolist() == logits.float().numpy().argmax(-1).tolist()
    for at in (0, 1, 80, 159):
        logits[:, at] = float("nan")
        assert torch.ops.selfspec.argmax(logits).tolist() == [-1] * 40, "no NaN is stepped over"
        logits[:, at] = 0
