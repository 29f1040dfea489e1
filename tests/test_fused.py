"""The Triton kernels of a decode pass, against torch's operators: interpreted on a CPU, compiled on a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE
from torch import Tensor

from selfspec.model.cache import KVCache
from selfspec.model.graphs import Graphs
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined
pytest.importorskip("triton", reason="needs Triton, which Linux has: pip install 'selfspec[dev]'")
from selfspec.model.kernels import fused

pytestmark = pytest.mark.usefixtures("inference")
DTYPES = [torch.float32, torch.float16 if DEVICE.type == "cpu" else torch.bfloat16]
"""Triton's interpreter takes products of bfloat16 for products of integers."""


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: Tensor, wanted: Tensor) -> bool:
    """Within what rounding to the dtype explains; a NaN never is."""
    limit = 1e-5 if got.dtype is torch.float32 else 2e-2
    return got.dtype == wanted.dtype and bool((got - wanted).float().norm() <= limit * wanted.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
class TestOps:
    @pytest.mark.parametrize(("tokens", "size"), [(1, 32), (3, 48), (17, 576)])
    def test_norm(self, tokens: int, size: int, dtype: torch.dtype) -> None:
        x, weight = random(tokens, size, dtype=dtype), random(size, dtype=dtype, seed=1)
        assert close(fused.norm(x, weight, 1e-5), F.rms_norm(x, (size,), weight, 1e-5))

    @pytest.mark.parametrize(("tokens", "size", "outs"), [(1, 32, 48), (16, 64, 16), (19, 200, 72)])
    def test_linear(self, tokens: int, size: int, outs: int, dtype: torch.dtype) -> None:
        x, weight = random(tokens, size, dtype=dtype), random(outs, size, dtype=dtype, seed=1)
        bias, residual = random(outs, dtype=dtype, seed=2), random(tokens, outs, dtype=dtype, seed=3)
        exact = x.float() @ weight.float().T
        assert close(fused.linear(x, weight), exact.to(dtype))
        assert close(fused.linear(x, weight, bias), (exact + bias.float()).to(dtype))
        assert close(fused.linear(x, weight, residual=residual), (exact + residual.float()).to(dtype))

    @pytest.mark.parametrize(("tokens", "size", "outs"), [(1, 32, 64), (18, 80, 40)])
    def test_gated(self, tokens: int, size: int, outs: int, dtype: torch.dtype) -> None:
        x, weight = random(tokens, size, dtype=dtype), random(2 * outs, size, dtype=dtype, seed=1)
        gate, up = F.linear(x, weight).chunk(2, -1)
        assert close(fused.gated(x, weight), F.silu(gate) * up)

    @pytest.mark.parametrize(("tokens", "size"), [(1, 80), (3, 70000)])
    def test_argmax(self, tokens: int, size: int, dtype: torch.dtype) -> None:
        logits = random(tokens, size, dtype=dtype)
        logits[-1, [7, 70]] = 9  # the first of equals
        assert fused.argmax(logits).tolist() == logits.float().cpu().numpy().argmax(-1).tolist()
        for value in (float("nan"), -float("inf"), float("inf")):
            logits[-1] = value
            assert fused.argmax(logits)[-1] == -1, "of no number, none is the largest"
        logits[-1] = 1
        logits[-1, size - 3] = float("nan")
        assert fused.argmax(logits)[-1] == -1, "no NaN is stepped over"

    def test_a_token_is_the_same_beside_others(self, dtype: torch.dtype) -> None:
        """Bit by bit: what is verified are the numbers that plain decoding would have seen."""
        x, weight = random(16, 200, dtype=dtype), random(96, 200, dtype=dtype, seed=1)
        for op in (fused.linear, fused.gated):
            together = op(x, weight)
            assert all(torch.equal(op(x[i : i + 1], weight), together[i : i + 1]) for i in range(16))


class Both:
    """Two layers of a tiny Llama, whose passes of a fixed shape are run by torch's operators, and by the kernels."""

    def __init__(self, folder: Path, dtype: torch.dtype, slots: int) -> None:
        self.model = Llama.load(folder, DEVICE, dtype)
        self.slots, s = slots, self.model.shape
        tables = self.model._cos, self.model._sin
        self.kernels = fused.Fused(self.model.layers, s.heads, s.norm_eps, *tables, otherwise=self.model._run)

    def run(self, kernels: bool, trees: list[Tree], bases: list[int], first: int = 0) -> tuple[Tensor, Tensor]:
        """The states of the trees' nodes from ``first`` on, and what the cache then holds."""
        s, model = self.model.shape, self.model
        cache = KVCache(s.layers, 3, s.kv_heads, self.slots - 1, s.head_dim, model.dtype, DEVICE, 512, 1)
        cache.kv.copy_(random(*cache.kv.shape, dtype=model.dtype, seed=4))
        cache.lengths = list(bases)
        graphs = Graphs(self.kernels.run if kernels else model._run, s.hidden, model.dtype, capture=False)
        at = cache.place(trees, first)
        assert graphs.take(at)
        hidden = random(sum(at.counts), s.hidden, dtype=model.dtype, seed=5)
        return graphs.run(hidden, cache, at, 1, 3), cache.kv[..., : self.slots - 1, :]


@pytest.fixture(params=DTYPES)
def both(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[Both]:
    yield Both(tiny_folder, request.param, 150)


BUSHY = Tree([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("trees", "bases"),
    [
        ([Tree.chain([5, 6])], [1]),
        ([BUSHY], [64]),
        ([BUSHY, Tree.chain([5, 6, 7]), Tree.chain([5, 9])], [100, 3, 64]),
    ],
)
def test_layers_are_those_of_torch(both: Both, trees: list[Tree], bases: list[int], first: int) -> None:
    wanted, got = both.run(False, trees, bases, first), both.run(True, trees, bases, first)
    assert close(got[0], wanted[0]) and close(got[1], wanted[1])


def test_a_long_cache_is_read_in_parts(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """More slots than one block for each part: parts go through several, the last of which is not whole."""
    monkeypatch.setattr(fused, "_PARTS", 2)
    wanted, got = both.run(False, [BUSHY], [140]), both.run(True, [BUSHY], [140])
    assert close(got[0], wanted[0])


def test_a_node_is_the_same_alone_and_in_a_tree(both: Both) -> None:
    """Bit by bit: the root of a tree, among other nodes and rows, is the token that plain decoding runs."""
    alone, _ = both.run(True, [Tree.chain([5])], [64])
    tree, _ = both.run(True, [BUSHY, Tree.chain([5, 6])], [64, 3])
    # `run` numbers hidden states from the first token on: the first row's root has the same in both.
    assert torch.equal(alone[0], tree[0])


@pytest.mark.slow
def test_compiled_for_hopper_nothing_spills(tmp_path: Path) -> None:
    """On any machine: every kernel for sm_90, at the shapes of 135M, 1B and 8B; weights are read ahead of their use."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("hopper.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert len(kernels) == 24
    assert [kernel for kernel in kernels if kernel["stack"] or kernel["local"]] == []
    assert all(kernel["staged"] and kernel["shared"] >= 2**15 for kernel in kernels if kernel["kernel"] == "_linear")
