"""C++ kernels for the CPU, built on the machine that runs them, for that machine, once.

``selfspec::product``: x W' of few rows at the speed at which memory gives the weights. ``selfspec::layers``: a
range of a Llama's layers over new tokens in one call; ``selfspec::exit``: and an early exit's map and readout of their
states. ``selfspec::argmax``, ``candidates``, ``statistics``: of every row of logits. They do what ``linear.py``,
``llama.py``, ``sampling.py``, drafts and gates do with torch's operators wherever there is no C++ compiler.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from selfspec.data import folders
from selfspec.errors import one_line
from selfspec.files import open_regular, own_folder
from selfspec.lazy import torch
from selfspec.model.attention import AttentionMetadata
from selfspec.model.cache import KVCache
from selfspec.model.weights import Layer

if TYPE_CHECKING:
    from torch import Tensor

SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp")
_HEADS = (32, 64, 128)
_LANES = 16
INT8_GROUP = 32
"""Inputs with a scale of their own, where activations are rounded to int8."""
_loaded = False


@cache
def problem() -> str | None:
    """Why the kernels cannot be used here; ``None`` where they can, and then they are loaded."""
    if sys.platform != "linux":
        return f"they are built on Linux only, not on {sys.platform}"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler"
    global _loaded
    try:
        torch.ops.load_library(str(_library(compiler)))  # type: ignore[no-untyped-call]
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.strip().splitlines()[-1] if error.stderr.strip() else error}"
    except OSError as error:
        return one_line(error)
    _loaded = True
    return None


def _library(compiler: str) -> Path:
    """The built library, made where it is not in the cache; another machine, torch or source has one of its own.

    Raises:
        OSError: the cache is no place to load code from, or cannot be written.
    """
    sources = sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))
    machine = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
    ]
    parts = [compiler, torch.__version__, *_FLAGS, *machine[:1], *(path.read_text() for path in sources)]
    library = folders.cache_dir() / "kernels" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    own_folder(library.parent)
    if library.parent.stat().st_uid != os.geteuid():
        raise OSError(f"{library.parent} belongs to another user: set SELFSPEC_CACHE to a folder of your own")
    library.parent.chmod(0o700)  # what is loaded from it runs as us
    # Jobs of a sweep start together: one compiles, the others wait for it.
    with FileLock(library.with_suffix(".lock")):
        if not _as_built(library):
            unfinished, digest = library.with_suffix(".part"), library.with_suffix(".sha256")
            unfinished.unlink(missing_ok=True)
            digest.unlink(missing_ok=True)
            subprocess.run(_command(compiler, unfinished), check=True, capture_output=True, text=True)
            # Renamed when whole: a compiler that was killed leaves nothing under the name that is loaded.
            unfinished.replace(library)
            digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    return library


def _as_built(library: Path) -> bool:
    """Whether a library is there as we have built it: no link, not another's, and byte for byte."""
    try:
        with os.fdopen(open_regular(library, os.O_RDONLY), "rb") as file:
            ours = os.fstat(file.fileno()).st_uid == os.geteuid()
            found = hashlib.sha256(file.read()).hexdigest()
        return ours and found == library.with_suffix(".sha256").read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _command(compiler: str, target: Path) -> list[str]:
    home = Path(torch.__file__).parent
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    return [compiler, *_FLAGS, *includes, *sources, "-o", str(target), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16, and int8 too, so that weights are worth laying out in tiles."""
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def tiled(weight: Tensor) -> Tensor | None:
    """A bf16 weight ``[out, in]`` in tiles ``[out / 16, in / 2, 16, 2]``; ``None`` where it does not divide so."""
    rows, columns = weight.shape
    # An even number of tiles: the kernel takes two at a time, and has no code for one that is left over.
    if not multiplies_bf16() or rows % (2 * _LANES) or columns % 2:
        return None
    return in_huge_pages(weight.view(rows // _LANES, _LANES, columns // 2, 2).transpose(1, 2))


def tiled_int8(values: Tensor, scale: Tensor) -> Tensor | None:
    """Int8 ``[out, in]`` and a scale ``[out]`` for each output in tiles ``[out / 16, in / 4 + 1, 64]`` of int8.

    Weights are moved up by 128, since the kernel's are unsigned; after a tile's lie its scales. ``None`` where it does
    not divide so.
    """
    rows, columns = values.shape
    if not multiplies_bf16() or rows % (2 * _LANES) or columns % INT8_GROUP:
        return None
    lines = values.view(rows // _LANES, _LANES, columns // 4, 4).transpose(1, 2).reshape(rows // _LANES, -1, 64)
    ends = scale.float().contiguous().view(torch.int8).view(rows // _LANES, 1, 64)
    return in_huge_pages(torch.cat((lines ^ -128, ends), 1))


_CHUNK = 64 * 2**20
_LINE = 64  # bytes of the cache's
_taking = Lock()
_chunk: Tensor | None = None
_used = 0


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy, beside the others in huge pages where the system gives them.

    Weights are read once a token, and finding pages of 4 KiB takes a fifth of the time that does. torch's allocator
    can ask for huge pages, but only for a tensor that fills some by itself.
    """
    global _chunk, _used
    size = tensor.numel() * tensor.element_size()
    with _taking:
        if _chunk is None or _used + size > len(_chunk):
            # What the last chunk has left stays unused. `frombuffer` keeps a chunk for as long as a weight lies in it.
            memory = mmap.mmap(-1, max(size, _CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages refuses; small ones do
                memory.madvise(mmap.MADV_HUGEPAGE)
            _chunk, _used = torch.frombuffer(memory, dtype=torch.uint8), 0
        place = _chunk[_used : _used + size]
        # Every weight begins with a line of the cache: the kernel reads whole lines, and would touch two for each.
        _used += -(-size // _LINE) * _LINE
    # Outside the lock: the place is nobody else's by now, and copying is what takes the time.
    return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def untiled(weight: Tensor) -> Tensor:
    """The way back: ``[out, in]``, of int8 in float32."""
    tiles = weight.shape[0]
    if weight.dtype is not torch.int8:
        return weight.transpose(1, 2).reshape(tiles * _LANES, weight.shape[1] * 2)
    values = (weight[:, :-1] ^ -128).reshape(tiles, -1, _LANES, 4).transpose(1, 2).reshape(tiles * _LANES, -1)
    return values * weight[:, -1].reshape(-1).view(torch.float32)[:, None]


def takes_rows(logits: Tensor) -> bool:
    """Whether the kernels look through such logits: twice as fast as NumPy and more in bf16, or as torch by far."""
    plain = logits.device.type == "cpu" and logits.dim() == 2 and logits.is_contiguous()
    return _loaded and plain and whole(logits.shape[1]) and _knows(logits.dtype)


def whole(width: int) -> bool:
    """Whether logits over so many tokens are whole lanes, as the kernels that look through them want it."""
    return width % _LANES == 0


class Statistics(NamedTuple):
    """Of the distribution in each of N rows of logits, float32 ``[N]``; in nats, and nats squared."""

    max_prob: Tensor
    entropy: Tensor
    var_entropy: Tensor


def statistics(logits: Tensor) -> Statistics:
    """Of logits that :func:`takes_rows` says yes to."""
    return Statistics(*torch.ops.selfspec.statistics(logits))


class Read(NamedTuple):
    """N tokens run as far as an early exit, and read out there.

    Attributes:
        hidden: the residual stream, and
        states: the head's estimates of the normed final states, both ``[N, D]``.
        logits: ``[N, V]``.
        tokens: the likeliest of each, best first, and
        log_p: their log-probabilities.
        max_prob, entropy, var_entropy: as of :class:`Statistics`.
    """

    hidden: Tensor
    states: Tensor
    logits: Tensor
    tokens: list[list[int]]
    log_p: list[list[float]]
    max_prob: list[float]
    entropy: list[float]
    var_entropy: list[float]


class Stack:
    """A Llama's layers, handed to the kernel in ranges."""

    def __init__(
        self,
        layers: Sequence[Layer],
        embedding: Tensor,
        final_norm: Tensor,
        head: Tensor,
        heads: int,
        norm_eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """``head``: what reads final states, in any layout. ``cos``, ``sin``: ``[positions, d]``, the sine signed."""
        self._embedding, self._final_norm, self._head = embedding, final_norm, head
        self._heads, self._norm_eps, self._cos, self._sin = heads, norm_eps, cos, sin
        names = ("attention_norm", "qkv", "qkv_bias", "out", "mlp_norm", "gate_up", "down")
        self._weights = [[getattr(layer, name) for layer in layers] for name in names]

    @staticmethod
    def takes(layers: Sequence[Layer], hidden: int, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether the kernel runs layers of these sizes: no norms of queries and keys, and whole lanes."""
        plain = all(layer.q_norm is None for layer in layers)
        widths = [hidden, *(layer.mlp_norm.shape[0] for layer in layers)]
        whole = head_dim in _HEADS and all(width % _LANES == 0 for width in widths)
        return plain and whole and _knows(dtype)

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """Layers ``first`` to ``last - 1`` on ``[N, D]``."""
        result: Tensor = torch.ops.selfspec.layers(hidden, *self._arguments(cache, at, first, last))
        return result

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm: ``[N, D]`` -> ``[N, D]``."""
        normed: Tensor = torch.ops.selfspec.norm(hidden, self._final_norm, self._norm_eps)
        return normed

    def exit(
        self,
        tokens: Sequence[int],
        previous: Tensor | None,
        cache: KVCache,
        at: AttentionMetadata,
        last: int,
        head: Sequence[Tensor],
        readout: Tensor | None,
        ids: Tensor | None,
        width: int,
        temperature: float,
    ) -> Read:
        """All of a step of an early exit's draft: N tokens through the first ``last`` layers, a head, and its readout.

        Args:
            previous: what the head also reads, ``[N, D]``, if anything.
            head: weight and bias, or scale, down, up and bias; matrices in any layout. None: the model's norm.
            readout: the rows of the language-model head that are read; ``None``: all.
            ids: int64 ``[V]``, the tokens of those rows.
            width: how many of the likeliest tokens are asked for.
            temperature: what logits are divided by for their probabilities; statistics are those at 1.
        """
        read = (head or [self._final_norm], self._head if readout is None else readout, ids, width, temperature)
        hidden, states, logits, best, log_p, *of = torch.ops.selfspec.exit(
            self._embedding, tokens, *self._arguments(cache, at, 0, last), previous, *read
        )
        each = len(best) // len(tokens)
        places = range(0, len(best), each)
        likely = [best[i : i + each] for i in places], [log_p[i : i + each] for i in places]
        return Read(hidden, states, logits, *likely, *of)

    def _arguments(self, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> tuple[Any, ...]:
        # As numbers, not as the tensors that torch's attention is told by: while weights pass through a CPU's caches,
        # nothing else stays there, and each small operator costs ten times what it seems to.
        sizes, parents = [len(tree) for tree in at.trees], [parent for tree in at.trees for parent in tree.parents]
        place = (at.bases, sizes, parents, at.first, at.rows.start)
        chosen = [weights[first:last] for weights in self._weights]
        return (cache.kv, self._cos, self._sin, *place, self._heads, self._norm_eps, first, *chosen)


def _knows(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16)
