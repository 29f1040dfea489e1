"""Weights as GGUF files pack them, 4 to 8 bits each, laid out for our own CPU kernel (``kernels/product.cpp``).

A block of inputs of one output has a scale d and, in 4 bits, a minimum m: a weight is d q + m, in bf16. The kernel
makes that very number in a register, so that a product is bit by bit the one with the unpacked weights, for a third of
the bytes.

Laid out in tiles of 16 outputs, uint8: ``[out / 16, in / 32, bytes]``, or ``[out / 16, in / 32, 2, bytes]`` where
blocks have 16 inputs. A tile's block is d and m of every output, then q: of outputs 0 to 7, two inputs each, all lines
that a vector of 64 bytes holds; the same of outputs 8 to 15; and on to the next lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfspec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FILE = "model.blocks"
"""Beside a converted model's own weights: those of its matrices that can stay packed, under the same names.

In safetensors' format, but not called so: vLLM takes every ``*.safetensors`` of a model's folder for its weights.
"""
_OUTPUTS = 16
_TURN = (0, 3, 4, 1, 2, 6, 5)
"""tile, half of the outputs, output, block, lines, line, input; to tile, block, lines, half, output, input, line."""


def laid_out(rows: Tensor, kind: str) -> Tensor | None:
    """A GGUF file's tensor, uint8 ``[out, bytes of its blocks]``, in tiles; ``None`` where there are none for it.

    Args:
        kind: how it is packed, as GGUF calls it.
    """
    if kind not in KINDS or len(rows) % _OUTPUTS:
        return None
    size, read = KINDS[kind]
    q, d, m = read(rows.contiguous().view(len(rows), -1, size))
    count, inputs = len(rows) // _OUTPUTS, q.shape[1] // d.shape[1]
    q = q.reshape(count, 2, 8, d.shape[1], -1, 4 if m is None else 8, 2).permute(_TURN).contiguous()
    if m is not None:
        q = q[..., ::2] | q[..., 1::2] << 4
    scales = torch.stack([d] if m is None else [d, m], -1)
    ends = scales.view(count, _OUTPUTS, *scales.shape[1:]).permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    tiles = torch.cat([part.reshape(count, d.shape[1], -1) for part in (ends, q)], -1)
    return tiles if inputs == 32 else tiles.view(count, -1, 2, tiles.shape[-1])


def values(tiles: Tensor) -> Tensor:
    """The way back: bf16 ``[out, in]``."""
    inputs, count, size = 32 if tiles.dim() == 3 else 16, len(tiles), tiles.shape[-1]
    tiles = tiles.reshape(count, -1, size)
    # What is left beside q tells the scales: of 8-bit ones d, of 4-bit ones d and m, in float16 or in float32.
    four = inputs == 32 and size < 32 * _OUTPUTS
    ends = size - inputs * _OUTPUTS // (2 if four else 1)
    many = 2 if four else 1
    dtype = torch.float16 if ends == 2 * many * _OUTPUTS else torch.float32
    scales = tiles[..., :ends].contiguous().view(dtype).view(count, -1, many, _OUTPUTS)
    d, *m = scales.permute(2, 0, 3, 1).float().unsqueeze(-1)
    q = tiles[..., ends:]
    if four:
        q = torch.stack((q & 15, q >> 4), -1)
    q = q.reshape(count, len(d[0, 0]), -1, 2, 8, 2, 8 if four else 4).permute(_TURN)
    q = q.reshape(count, _OUTPUTS, -1, inputs)
    exact: Tensor = d * q + m[0] if m else d * (q.float() - 128)
    return exact.bfloat16().reshape(count * _OUTPUTS, -1)


# How a GGUF file's blocks [out, blocks, bytes] are read: q [out, in], of 8 bits moved up by 128; d and m [out, blocks].


def _halves(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _nibbles(q: Tensor) -> Tensor:
    return torch.cat((q & 15, q >> 4), -1).flatten(1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _halves(blocks, 0)
    return _nibbles(blocks[..., 2:]), d, -8 * d


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, None]:
    return (blocks[..., 2:] ^ 128).flatten(1), _halves(blocks, 0), None


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, mid, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    d = torch.cat((low & 63, high & 15 | low >> 6 << 4), -1) * _halves(blocks, 0)[..., None].float()
    m = torch.cat((mid & 63, high >> 4 | mid >> 6 << 4), -1) * -_halves(blocks, 2)[..., None].float()
    return _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)), d.flatten(1), m.flatten(1)


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, None]:
    shape = (*blocks.shape[:2], 2, -1, 32)
    low, high = blocks[..., :128].reshape(shape), blocks[..., 128:192].reshape(shape)
    upper = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -2)
    q = torch.cat((low & 15, low >> 4), -2) | upper << 4
    d = blocks[..., 192:208].view(torch.int8) * _halves(blocks, 208)[..., None].float()
    return (q + 96).flatten(1), d.flatten(1), None  # q - 32, moved up by 128


KINDS = {"Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q8_0": (34, _q8_0), "Q4_K": (144, _q4_k), "Q6_K": (210, _q6_k)}
"""What GGUF calls the ways of packing that have tiles here: the bytes of a block in the file, and how it is read."""
