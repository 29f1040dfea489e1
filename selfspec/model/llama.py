"""Our own lean decoder for the Llama family: Llama, SmolLM2, Mistral, Qwen2, Qwen3.

The model is a stack of layers that can be run from ``first`` to ``last``, so that a draft which exits
early and the verification that follows share one pass: what the draft ran is not run again. Projections
are fused (one matrix for q, k, v; one for gate and up) and packed (``linear.py``), keys and values are
preallocated, and residual additions ride on the matrix products. Decoding one token is bound by reading the
weights; everything else here only has to stay out of the way.

Shapes: R rows, N new tokens of all rows together (see :class:`~selfspec.model.cache.AttentionMetadata`), D hidden size,
H query heads, G key-value heads, d head size.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from selfspec.errors import AssetError, ConfigError, one_line
from selfspec.model import blocks, checkpoint
from selfspec.model.attention import AttentionMetadata, attend
from selfspec.model.base import Shape
from selfspec.model.cache import KVCache
from selfspec.model.graphs import Graphs, Layers
from selfspec.model.kernels.native import Stack
from selfspec.model.linear import add_linear, linear, packed, packed_int8, plain
from selfspec.model.transfer import to_device
from selfspec.model.weights import Layer, Weight

_ALIGNED = 64
"""Slots of a cache that graphs read come to a multiple of this."""
_LARGEST = 1 << 24
"""Of a model's sizes, positions included: more is a mistake, and its tables fill any memory."""
_MATRICES = ("qkv", "out", "gate_up", "down")
FAMILY = ("llama", "mistral", "qwen2", "qwen3")


class Llama:
    """A frozen decoder whose layers run in ranges."""

    folder: Path | None = None
    native = graphs = fused = False
    plain_head = True
    int8 = False
    _stack: Stack | None = None

    def __init__(
        self,
        config: dict[str, Any],
        weights: Mapping[str, Tensor],
        packed_weights: Mapping[str, Tensor] = MappingProxyType({}),
        native: bool = False,
    ) -> None:
        """Fuses ``weights`` (Hugging Face names) as described by ``config`` (a parsed ``config.json``).

        All are laid out for the CPU's kernels, our own or torch's, where those have a layout of their own.

        Args:
            packed_weights: tiles of those that stay packed (``blocks.py``).
            native: our own kernels, which are loaded, run the model.
        """
        self.shape = _shape(config)
        self.native = native
        self.embedding = weights["model.embed_tokens.weight"]
        self.lm_head = _head(weights, bool(config.get("tie_word_embeddings")))
        self._window, self._windowed = _window(config)
        self.final_norm = weights["model.norm.weight"]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.layers = []
        chosen: Mapping[str, Tensor] = ChainMap({}, packed_weights, weights)  # type: ignore[arg-type]
        for index in range(self.shape.layers):
            layer = _layer(chosen, f"model.layers.{index}.")
            for name in _MATRICES:  # at once: what it was fused from need not stay
                setattr(layer, name, packed(getattr(layer, name), native))
            self.layers.append(layer)
        name = "model.embed_tokens.weight" if self.lm_head is self.embedding else "lm_head.weight"
        head = packed(packed_weights.get(name, self.lm_head), native)
        # The packed one: the embedding, which may be the same, stays as it is.
        self._head: Weight | None = head if head is not self.lm_head else None
        self._graphs: WeakKeyDictionary[KVCache, Graphs] = WeakKeyDictionary()
        self._rotary = _rotary(config, self.shape)
        self._cos, self._sin = (table.to(self.device, self.dtype) for table in self._rotary)
        self._stack = self._make_stack()

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype, native: bool = False, keep_packed: bool = False
    ) -> "Llama":
        """Reads a model folder in the Hugging Face layout (safetensors only).

        Args:
            native: run on our own kernels; they are loaded.
            keep_packed: matrices that their GGUF file packs stay packed, in bf16 on our own kernels.

        Raises:
            AssetError: a file is missing or corrupt, or a tensor has another shape than the config says.
            ConfigError: the architecture is not of this family.
        """
        config = checkpoint.config(folder)
        weights = checkpoint.tensors(folder, device)
        try:
            checkpoint.check_shapes(folder, _shapes(_shape(config), config["intermediate_size"]), weights)
            kept = checkpoint.Stored(folder / blocks.FILE) if keep_packed else {}
            model = cls(config, {name: tensor.to(dtype) for name, tensor in weights.items()}, kept, native)
        except KeyError as error:
            raise AssetError(f"{folder}: lacks the tensor or setting {error}") from error
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # config.json's: of another kind
            raise AssetError(f"{folder}: cannot be run as a model: {one_line(error)}") from error
        model.folder = folder
        return model

    def quantise(self) -> None:
        """Rounds the weights of all layers, and of the head, to int8."""
        self.int8 = True
        for layer in self.layers:
            for name in _MATRICES:
                setattr(layer, name, packed_int8(getattr(layer, name), self.native))
        self._head = packed_int8(self.lm_head, self.native)
        self._stack = self._make_stack()

    def _make_stack(self) -> Stack | None:
        s, head = self.shape, self.lm_head if self._head is None else self._head
        whole = all(isinstance(getattr(layer, name), Tensor) for layer in self.layers for name in _MATRICES)
        if not (self.native and whole and Stack.takes(self.layers, s.hidden, s.head_dim, self.dtype)):
            return None
        if not isinstance(head, Tensor):
            return None
        return Stack(self.layers, self.embedding, self.final_norm, head, s.heads, s.norm_eps, self._cos, self._sin)

    def to(self, dtype: torch.dtype) -> "Llama":
        """The same model in another dtype (a copy; used to look at a tie in float32)."""
        # Neither packed nor handed to the kernels: a copy to look at ties with, whose speed does not matter.
        other = object.__new__(Llama)
        other.shape, other.folder, other.device, other.dtype = self.shape, self.folder, self.device, dtype
        other.embedding = self.embedding.to(dtype)
        other.lm_head = other.embedding if self.lm_head is self.embedding else self.lm_head.to(dtype)
        other.final_norm = self.final_norm.to(dtype)
        other.layers = [
            Layer(*(None if w is None else plain(w).to(dtype) for w in (getattr(layer, f) for f in Layer.__slots__)))  # type: ignore[arg-type]
            for layer in self.layers
        ]
        # Weights rounded to int8 stay rounded: a tie is looked at in the model that ran, not in a better one.
        other._window, other._windowed = self._window, self._windowed
        other._head = plain(self._head).to(dtype) if self.int8 and self._head is not None else None
        other._rotary, other._graphs = self._rotary, WeakKeyDictionary()
        other._cos, other._sin = (table.to(self.device, dtype) for table in self._rotary)
        return other

    def new_cache(self, capacity: int, rows: int = 1, extra_layers: int = 0, lasts: bool = False) -> KVCache:
        """See :meth:`Model.new_cache <selfspec.model.base.Model.new_cache>`."""
        s, static = self.shape, lasts and self.graphs
        size = (s.layers + extra_layers, rows, s.kv_heads, capacity, s.head_dim)
        # Attention's kernels want masks whose rows begin at multiples of 16 bytes; the last slot is for padding.
        spare = _ALIGNED - capacity % _ALIGNED if static else 0
        cache = KVCache(*size, self.dtype, self.device, s.max_positions, spare)
        if static:
            self._graphs[cache] = Graphs(self._static_run(), s.hidden, self.dtype, capture=self.device.type == "cuda")
        return cache

    def _static_run(self) -> Layers:
        """What runs a pass of a fixed shape: our own kernels where they are wanted and know these layers."""
        if self.fused:
            from selfspec.model.kernels.fused import Fused  # Triton is there

            if Fused.take(self.layers, self.shape.head_dim):
                s, tables = self.shape, (self._cos, self._sin)
                return Fused(self.layers, s.heads, s.norm_eps, *tables, otherwise=self._run).run
        return self._run

    def embed(self, tokens: Sequence[int], at: AttentionMetadata | None = None) -> Tensor:
        """Token ids, N of them -> ``[N, D]``; positions come in with every layer, so ``at`` is not looked at."""
        return self.embedding[to_device(tokens, self.device)]

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """Runs layers ``first`` to ``last - 1`` on the residual stream ``[N, D]``; writes their keys and values."""
        if self._window is not None and at.stop > self._window:
            return self._run(hidden, cache, at, first, last)  # neither kernels nor graphs have windows
        graphs = self._graphs.get(cache)
        if graphs is not None and graphs.take(at):
            return graphs.run(hidden, cache, at, first, last)
        stack = self.stack(cache, at)
        return (self._run if stack is None else stack.run)(hidden, cache, at, first, last)

    def stack(self, cache: KVCache, at: AttentionMetadata) -> Stack | None:
        """See :meth:`Model.stack <selfspec.model.base.Model.stack>`."""
        windowed = self._window is not None and at.stop > self._window
        # A long prompt is better off with torch's attention.
        return None if windowed or at.causal or cache in self._graphs else self._stack

    def _run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """:meth:`run` by torch's operators."""
        rotation = self.rotation(at)
        windowed = rotation if self._window is None or at.stop <= self._window else self.rotation(at, self._window)
        for index in range(first, last):
            shared = windowed if index in self._windowed else rotation
            hidden = self.block(self.layers[index], hidden, cache, index, at, shared)
        return hidden

    def rotation(self, at: AttentionMetadata, window: int | None = None) -> "Rotation":
        """What every layer of a pass shares: angles of the positions, and the mask for folded heads.

        Args:
            window: how many positions a token sees, its own included; ``None``: all.
        """
        mask, seen = None, at.mask
        if window is not None:
            near = at.query_positions[:, None, :, None] - at.key_positions[:, None, None, :] < window
            seen = at.visible & near
        if seen is not None:  # as numbers to add: each layer would turn truth values into them again
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
            if not at.causal:
                mask = mask.repeat(1, 1, self.shape.heads // self.shape.kv_heads, 1)
        return Rotation(self._cos[at.positions][:, None], self._sin[at.positions][:, None], mask)

    def block(
        self, w: Layer, hidden: Tensor, cache: KVCache, index: int, at: AttentionMetadata, rotation: "Rotation"
    ) -> Tensor:
        """One layer on ``[N, D]``, its keys and values at layer ``index`` of the cache."""
        s, eps = self.shape, self.shape.norm_eps
        # Queries and keys stand together in `qkv`, and so are rotated by one operator in the place of two.
        roped = s.heads + s.kv_heads
        x = F.rms_norm(hidden, (s.hidden,), w.attention_norm, eps)
        qkv = linear(x, w.qkv, w.qkv_bias).view(-1, roped + s.kv_heads, s.head_dim)
        qk = qkv[:, :roped]
        if w.q_norm is not None and w.k_norm is not None:
            q, k = qk[:, : s.heads], qk[:, s.heads :]
            q = F.rms_norm(q, (s.head_dim,), w.q_norm, eps)
            k = F.rms_norm(k, (s.head_dim,), w.k_norm, eps)
            qk = torch.cat((q, k), 1)
        qk = torch.addcmul(qk * rotation.cos, qk.roll(s.head_dim // 2, -1), rotation.sin)
        keys, values = cache.append(index, qk[:, s.heads :], qkv[:, roped:], at)
        mixed = attend(qk[:, : s.heads], keys, values, at, rotation.mask)
        # The residual is added within the product: rounded once, and not read again to be added.
        hidden = add_linear(hidden, mixed, w.out)
        x = F.rms_norm(hidden, (s.hidden,), w.mlp_norm, eps)
        gate, up = linear(x, w.gate_up).chunk(2, -1)
        return add_linear(hidden, F.silu(gate) * up, w.down)

    def norm(self, hidden: Tensor) -> Tensor:
        """The model's own final norm: ``[N, D]`` -> ``[N, D]``, what the language-model head reads."""
        if self._stack is not None:
            return self._stack.norm(hidden)
        return F.rms_norm(hidden, (self.shape.hidden,), self.final_norm, self.shape.norm_eps)

    def logits(self, state: Tensor) -> Tensor:
        """Normed states ``[N, D]`` -> logits ``[N, vocab]`` through the frozen language-model head."""
        if self.fused:
            from selfspec.model.kernels import fused  # Triton is there

            if len(state) <= fused.TOKENS:
                return fused.linear(state, self.lm_head)
        return linear(state, self.lm_head if self._head is None else self._head)


class Rotation(NamedTuple):
    """What all layers of a pass share.

    Attributes:
        cos: ``[N, 1, d]``, and
        sin: ``[N, 1, d]``, signed: rotary angles of the positions.
        mask: the place's mask, repeated for every head of a group, 0 or -inf in the model's dtype; ``None`` as there.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


def _shape(config: dict[str, Any]) -> Shape:
    kind = config.get("model_type")
    if kind not in FAMILY:
        raise ConfigError(f"model: architecture {kind!r} is not of the family engine=torch runs ({', '.join(FAMILY)})")
    if config.get("quantization_config"):
        raise ConfigError("model: engine=torch runs plain weights, and these are quantised")
    if config.get("hidden_act", "silu") != "silu" or config.get("mlp_bias"):
        raise ConfigError("model: engine=torch runs SwiGLU layers without biases only")
    heads = config["num_attention_heads"]
    eos = config.get("eos_token_id")
    shape = Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        eos=frozenset([eos] if isinstance(eos, int) else eos or []),
    )
    sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "max_positions")
    if senseless := [f"{size}={getattr(shape, size)}" for size in sizes if not 1 <= getattr(shape, size) <= _LARGEST]:
        raise ValueError(f"by config.json, {', '.join(senseless)}")
    return shape


def _window(config: dict[str, Any]) -> tuple[int | None, frozenset[int]]:
    """How many positions are seen through a window, and the layers that have one."""
    layers, window = range(config["num_hidden_layers"]), config.get("sliding_window")
    if not window or not config.get("use_sliding_window", config.get("model_type") == "mistral"):
        return None, frozenset()
    kinds = config.get("layer_types") or ["sliding_attention" for _ in layers]
    return window, frozenset(layer for layer in layers if kinds[layer] == "sliding_attention")


def _head(weights: Mapping[str, Tensor], tied: bool) -> Tensor:
    """``[vocab, D]``: a head that differs from the embedding is kept, as in transformers, whatever the config says."""
    embedding = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight") if tied else weights["lm_head.weight"]
    return embedding if head is None or (tied and torch.equal(head, embedding)) else head


def _shapes(s: Shape, intermediate: int) -> dict[str, tuple[int, ...]]:
    """What every tensor must be, by what its name ends with."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return {
        "embed_tokens.weight": (s.vocab, s.hidden),
        "lm_head.weight": (s.vocab, s.hidden),
        "q_proj.weight": (queries, s.hidden),
        "k_proj.weight": (keys, s.hidden),
        "v_proj.weight": (keys, s.hidden),
        "o_proj.weight": (s.hidden, queries),
        "gate_proj.weight": (intermediate, s.hidden),
        "up_proj.weight": (intermediate, s.hidden),
        "down_proj.weight": (s.hidden, intermediate),
        "q_norm.weight": (s.head_dim,),
        "k_norm.weight": (s.head_dim,),
        "norm.weight": (s.hidden,),  # the last, and with it those of layers
    }


def _layer(weights: Mapping[str, Tensor], prefix: str) -> Layer:
    def fused(names: tuple[str, ...]) -> Tensor:
        parts = [weights[prefix + name] for name in names]
        alike = len({(part.dtype, part.shape[1:]) for part in parts}) == 1
        return torch.cat(parts if alike else [plain(part) for part in parts])

    if prefix + "self_attn.o_proj.bias" in weights:
        raise ConfigError("model: engine=torch runs attention without an output bias only")
    projections = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
    biased = prefix + "self_attn.q_proj.bias" in weights
    return Layer(
        attention_norm=weights[prefix + "input_layernorm.weight"],
        qkv=fused(tuple(p + "weight" for p in projections)),
        qkv_bias=fused(tuple(p + "bias" for p in projections)) if biased else None,
        q_norm=weights.get(prefix + "self_attn.q_norm.weight"),
        k_norm=weights.get(prefix + "self_attn.k_norm.weight"),
        out=weights[prefix + "self_attn.o_proj.weight"],
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        gate_up=fused(("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        down=weights[prefix + "mlp.down_proj.weight"],
    )


def _rotary(config: dict[str, Any], shape: Shape) -> tuple[Tensor, Tensor]:
    """Tables ``[positions, d]``, float32, for rotary embedding (Su et al., 2104.09864) in the half-split layout.

    The sine carries the sign of the rotated half, so that applying it is ``x * cos + roll(x) * sin``.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    frequencies = 1.0 / theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    if kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif kind == "linear":
        frequencies = frequencies / rope["factor"]
    elif kind != "default":
        raise ConfigError(f"model: rope scaling {kind!r} is not supported by engine=torch (default, linear, llama3)")
    angles = torch.outer(torch.arange(shape.max_positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _llama3(frequencies: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by ``factor``, with a smooth passage between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    share: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    stretched: Tensor = frequencies / rope["factor"]
    return (1 - share) * stretched + share * frequencies
