"""Any other Hugging Face causal language model, as layers that run in ranges on our own cache.

The model's own modules do the work: each decoder layer is handed the residual stream, our mask, its rotary
angles and, in the place of a cache, a :class:`Slots` that writes where our
:class:`~selfspec.model.cache.AttentionMetadata` says.
What a model does *between* its layers (a scaled embedding, a second stream, a state carried along) would be
lost so; hence every model that is loaded first proves, on a few tokens, that it comes to its own logits.

Shapes: R rows, T tokens of the widest row, N new tokens of all rows, D hidden size, G key-value heads, d head size.
"""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from selfspec.errors import AssetError, ConfigError, one_line
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Layers, Model, Shape
from selfspec.model.cache import KVCache
from selfspec.model.gguf import silence
from selfspec.model.llama import Llama
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_LEARNED_POSITIONS = ("wpe", "embed_positions")
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_CACHES = (
    "cache",
    "past_key_values",
    "layer_past",
)  # what layers call it: 5.24 renamed the second, GPT-NeoX has the third
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    layers: Layers,
    native: bool = False,
    graphs: bool = False,
    fused: bool = False,
) -> Model:
    """A model folder by our own layers (``fast``), by Hugging Face's (``hf``), or by ours where they can (``auto``).

    Args:
        native: our own layers run on our own kernels.
        graphs: passes over our own layers are captured as CUDA graphs, and
        fused: consist of our own kernels there.

    Raises:
        AssetError: a file is missing or corrupt.
        ConfigError: the architecture cannot be run so.
    """
    if layers is not Layers.hf:
        try:
            model = Llama.load(folder, device, dtype, native)
            model.graphs, model.fused = graphs, fused
            return model
        except ConfigError:
            if layers is Layers.fast:
                raise
    return HFModel.load(folder, device, dtype)


class HFModel:
    """A frozen ``transformers`` model whose layers run in ranges; see :class:`~selfspec.model.base.Model`."""

    folder: Path | None = None
    native = graphs = fused = False

    def __init__(self, lm: Any) -> None:
        """``lm``: a ``PreTrainedModel`` with a language-model head, its weights loaded.

        Raises:
            ConfigError: it is not a stack of layers between an embedding and a final norm.
        """
        self.lm = lm.eval().requires_grad_(False)
        config = lm.config.get_text_config(decoder=True)
        stack = _stack(lm, config.num_hidden_layers)
        self.layers: nn.ModuleList = _member(stack, ("layers", "h"), "layers")
        self._cache_name = _cache_name(self.layers[0])
        self._norm: nn.Module = _member(stack, _FINAL_NORMS, "final norm")
        self._rotary: nn.Module | None = getattr(stack, "rotary_emb", None)
        self._learned = _learned_positions(stack)
        self._embed: nn.Module = lm.get_input_embeddings()
        head = lm.get_output_embeddings()
        if getattr(head, "bias", None) is not None or any(getattr(config, name, None) for name in _SOFT_CAPS):
            raise ConfigError(f"model: {_kind(lm)} biases or caps its logits, and drafts read them as one product")
        self.embedding: Tensor = self._embed.weight
        self.lm_head: Tensor = head.weight
        self.dtype, self.device = self.lm_head.dtype, self.lm_head.device
        heads = config.num_attention_heads
        self.shape = Shape(
            layers=len(self.layers),
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=len(self.lm_head),
            max_positions=_max_positions(config, self._learned),
            norm_eps=getattr(self._norm, "variance_epsilon", getattr(self._norm, "eps", 0.0)),
            eos=stop_tokens(lm),
        )

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> "HFModel":
        """Reads a model folder in the Hugging Face layout (safetensors only).

        Raises:
            AssetError: a file is missing or corrupt.
            ConfigError: the architecture is unknown, or its layers cannot be run in ranges.
        """
        lm = read(folder, device, dtype)
        try:
            model = cls(lm)
            with silence():
                error = model.difference()
        except ConfigError:
            raise
        except Exception as refusal:  # a layer of another kind fails in as many ways as there are kinds
            raise ConfigError(f"model: {_kind(lm)} cannot be run layer by layer: {one_line(refusal)}") from refusal
        if not error < (1e-3 if dtype is torch.float32 else 0.1):  # a NaN is none either
            raise ConfigError(f"model: {_kind(lm)} cannot be run layer by layer: its logits then differ by {error:.0%}")
        model.folder = folder
        return model

    def to(self, dtype: torch.dtype) -> "HFModel":
        """The same model in another dtype (a copy; used to look at a tie in float32)."""
        lm = copy.deepcopy(self.lm)
        for weight in lm.parameters():  # not buffers: rotary frequencies are float32 in every model
            weight.data = weight.data.to(dtype)
        other = HFModel(lm)
        other.folder, other.shape = self.folder, self.shape
        return other

    def new_cache(self, capacity: int, rows: int = 1, extra_layers: int = 0, lasts: bool = False) -> KVCache:
        """See :meth:`Model.new_cache <selfspec.model.base.Model.new_cache>`; none of its passes are captured."""
        s = self.shape
        size = (s.layers + extra_layers, rows, s.kv_heads, capacity, s.head_dim)
        return KVCache(*size, self.dtype, self.device, s.max_positions)

    def embed(self, tokens: Sequence[int], at: AttentionMetadata) -> Tensor:
        """Token ids, N of them -> ``[N, D]``, learned positions included where the model has them."""
        hidden: Tensor = self._embed(to_device(tokens, self.device))
        return hidden if self._learned is None else hidden + self._learned[at.positions]

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """Runs layers ``first`` to ``last - 1`` on the residual stream ``[N, D]``; writes their keys and values."""
        positions = at.positions
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=self.device)
        hidden, positions = _rows(hidden, at), _rows(positions, at)
        shared = {"attention_mask": at.mask, "position_ids": positions, self._cache_name: Slots(cache, at)}
        if self._rotary is not None:
            shared["position_embeddings"] = self._rotary(hidden, positions)
        for layer in self.layers[first:last]:
            hidden = layer(hidden, use_cache=True, **shared)
        hidden = hidden.flatten(0, 1)
        return hidden if at.unpad is None else hidden[at.unpad]

    def norm(self, hidden: Tensor) -> Tensor:
        """The model's own final norm: ``[N, D]`` -> ``[N, D]``, what the language-model head reads."""
        normed: Tensor = self._norm(hidden)
        return normed

    def logits(self, state: Tensor) -> Tensor:
        """Normed states ``[N, D]`` -> logits ``[N, vocab]`` through the frozen language-model head."""
        return F.linear(state, self.lm_head)

    @torch.inference_mode()
    def difference(self) -> float:
        """How far logits by layers are from the model's own forward, relative to their size: a proof on a few tokens.

        A prompt of three, then a tree in which the next three stand beside a token that they must not see.
        """
        tokens = [(11 + 7919 * i) % self.shape.vocab for i in range(7)]
        prompt, path, other = tokens[:3], tokens[3:6], tokens[6]
        cache = self.new_cache(len(tokens))
        row, half = cache.admit(), self.shape.layers // 2
        states = []
        for tree in (Tree.chain(prompt), Tree([path[0], other, *path[1:]], [-1, 0, 0, 2])):
            at = cache.place([tree], row=row)
            hidden = self.run(self.embed(tree.tokens, at), cache, at, 0, half)
            states.append(self.norm(self.run(hidden, cache, at, half, self.shape.layers)))
            cache.commit(row, range(len(tree)) if tree.is_chain else [0, 2, 3])
        ours = self.logits(torch.cat(states)[[0, 1, 2, 3, 5, 6]]).float()
        theirs = self.lm(torch.tensor([prompt + path], device=self.device), use_cache=False).logits[0].float()
        return float((ours - theirs).norm() / theirs.norm())


class Slots:
    """What a decoder layer is given as its cache: it writes at our place, and reads what is to be seen from there."""

    def __init__(self, cache: KVCache, at: AttentionMetadata) -> None:
        self.cache, self.at = cache, at

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values ``[R, G, T, d]`` -> all that attention reads, ``[R, G, stop, d]``."""
        new = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
        keys, values = (x if self.at.unpad is None else x[self.at.unpad] for x in new)
        return self.cache.append(layer, keys, values, self.at)

    def get_seq_length(self, layer: int = 0) -> int:
        """Rows differ in it, and nothing that is run here depends on it (see ``_max_positions``)."""
        return 0


def read(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A model folder as ``transformers`` reads it: safetensors only, no code but its own.

    Raises:
        AssetError: a file is missing or corrupt.
        ConfigError: the architecture is unknown, has an encoder, or is quantised.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with silence():
            config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise AssetError(f"{folder}: config.json cannot be read: {one_line(error)}") from error
    if config.is_encoder_decoder:
        raise ConfigError(f"model: architecture {config.model_type!r} has an encoder; only decoders are run")
    if getattr(config, "quantization_config", None):
        raise ConfigError("model: its weights are quantised; plain ones are run")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"model: architecture {config.model_type!r} is not a causal language model")
    try:
        with silence():
            lm, seen = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AssetError(f"{folder}: cannot be read as a model: {one_line(error)}") from error
    except ValueError as error:  # no SDPA attention
        raise ConfigError(f"model: architecture {config.model_type!r}: {one_line(error).split('. ')[0]}") from error
    lost = sorted(seen["missing_keys"])
    if lost:
        raise AssetError(f"{folder}: the weights lack {lost[0]}" + f" and {len(lost) - 1} more" * (len(lost) > 1))
    return lm.to(device)


def stop_tokens(lm: Any) -> frozenset[int]:
    """The end-of-sequence tokens of both configs; chat models name their end of turn in the generation config."""
    named = (config.eos_token_id for config in (lm.config, lm.generation_config))
    return frozenset(token for eos in named for token in ([eos] if isinstance(eos, int) else eos or []))


def _rows(tokens: Tensor, at: AttentionMetadata) -> Tensor:
    """``[N, ...]`` -> ``[R, T, ...]``; shorter rows repeat their last token."""
    tokens = tokens if at.pad is None else tokens[at.pad]
    return tokens.view(at.count, at.width, *tokens.shape[1:])


def _kind(lm: Any) -> str:
    return f"architecture {lm.config.model_type!r}"


def _stack(lm: nn.Module, layers: int) -> nn.Module:
    """The module that holds the decoder's layers as one list."""
    for module in lm.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                return module
    raise ConfigError(f"model: {_kind(lm)} has no list of its {layers} layers")


def _member(stack: nn.Module, names: Sequence[str], what: str) -> Any:
    found = next((getattr(stack, name) for name in names if getattr(stack, name, None) is not None), None)
    if found is None:
        raise ConfigError(f"model: {type(stack).__name__} has no {what} that can be run on its own")
    return found


def _cache_name(layer: nn.Module) -> str:
    """The name by which a decoder layer takes its cache: its signature knows, as versions of transformers differ."""
    taken = inspect.signature(layer.forward).parameters
    found = next((name for name in _CACHES if name in taken), None)
    if found is None:
        raise ConfigError(f"model: {type(layer).__name__} takes no cache of keys and values")
    return found


def _learned_positions(stack: nn.Module) -> Tensor | None:
    """``[positions, D]``; OPT keeps two unused rows before the first."""
    table = next((getattr(stack, name) for name in _LEARNED_POSITIONS if hasattr(stack, name)), None)
    return None if table is None else table.weight[getattr(table, "offset", 0) :]


def _max_positions(config: Any, learned: Tensor | None) -> int:
    """As many as full attention over all of them is what the model was made with."""
    kinds = getattr(config, "layer_types", None)
    for kind in kinds or ():
        if kind not in _ATTENTION:
            raise ConfigError(
                f"model: architecture {config.model_type!r} has {kind} layers, which keep no keys and values"
            )
    limits = [getattr(config, "max_position_embeddings", None) if learned is None else len(learned)]
    if getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds):
        limits.append(getattr(config, "sliding_window", None))
    if "chunked_attention" in (kinds or ()):
        limits.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4's grows from here on; before it is 1
        limits.append(config.floor_scale - 1)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # one set of frequencies up to here, another beyond
        limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=1 << 30)
