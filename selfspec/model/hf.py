"""Any other Hugging Face causal language model, as layers that run in ranges on our own cache.

The model's own forward does the work, whatever it does before, between and after its layers: scale an embedding, pick a
rotary table or a mask for each kind of layer, multiply or cap its logits. A pass over layers ``first`` to ``last - 1``
is that forward with every layer's ``forward`` behind a gate (:meth:`HFModel._gate`): layers before are passed by, the
first is handed our residual stream, and after the last the forward is left. In the place of a cache it is given a
:class:`Slots`, which writes where our :class:`~selfspec.model.attention.AttentionMetadata` says; and its masks are made
by its own rules from the *positions* of our slots (``masks.py``). What it is made of, one pass shows (``seen.py``).

Every model that is loaded first proves, on a few tokens, that it comes to its own logits so.

Shapes: R rows, T tokens of the widest row, N new tokens of all rows, S slots, D hidden size, G key-value heads,
d head size.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfspec.errors import ConfigError, one_line
from selfspec.model import checkpoint, masks
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Layers, Model, Shape
from selfspec.model.cache import KVCache
from selfspec.model.gguf import silence
from selfspec.model.llama import Llama
from selfspec.model.seen import Seen, epsilon_of, kind, max_positions, stack_of
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree

_CACHES = ("cache", "past_key_values")  # 5.24 renamed the second
_KEEP_NOTHING = {"linear_attention", "mamba", "mamba2", "recurrent", "conv"}
"""Kinds of layers, as configs name them, that carry a state along: what a rejected draft did to it cannot be undone."""


def load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    layers: Layers,
    native: bool = False,
    graphs: bool = False,
    fused: bool = False,
    keep_packed: bool = False,
) -> Model:
    """A model folder by our own layers (``fast``), by Hugging Face's (``hf``), or by ours where they can (``auto``).

    Args:
        native: our own layers run on our own kernels.
        graphs: passes over our own layers are captured as CUDA graphs, and
        fused: consist of our own kernels there.
        keep_packed: what a GGUF file packs stays packed in our own layers.

    Raises:
        AssetError: a file is missing or corrupt.
        ConfigError: the architecture cannot be run so.
    """
    if layers is not Layers.hf:
        try:
            model = Llama.load(folder, device, dtype, native, keep_packed)
            model.graphs, model.fused = graphs, fused
            return model
        except ConfigError:
            if layers is Layers.fast:
                raise
    return HFModel.load(folder, device, dtype)


class Pass(NamedTuple):
    """What is to be run: layers ``first`` to ``last - 1`` on ``hidden`` ``[R, T, D]``; ``None``: on the embedding."""

    first: int
    last: int
    hidden: Tensor | None
    at: AttentionMetadata


class _Reached(BaseException):
    """The range of layers is over: the forward is left with the residual stream ``[R, T, D]``."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class HFModel:
    """A frozen ``transformers`` model whose layers run in ranges; see :class:`~selfspec.model.base.Model`."""

    folder: Path | None = None
    native = graphs = fused = False
    trees = True
    """Whether trees can be verified. ALiBi, as transformers computes it, tells distances by slots: chains only."""
    batches = True
    """Whether several rows can be run at once: not where layers have masks of their own, by slots (GPT-Neo)."""

    def __init__(self, lm: Any) -> None:
        """``lm``: a ``PreTrainedModel`` with a language-model head, its weights loaded.

        Raises:
            ConfigError: it is not a stack of layers that keep keys and values.
        """
        self.lm = lm.eval().requires_grad_(False)
        config = lm.config.get_text_config(decoder=True)
        kept = next((kind for kind in getattr(config, "layer_types", None) or () if kind in _KEEP_NOTHING), None)
        if kept:
            raise ConfigError(f"model: {kind(lm)} has {kept} layers, which keep no keys and values to go back to")
        self._stack, self.layers = stack_of(lm, config.num_hidden_layers)
        taken = inspect.signature(self._stack.forward).parameters
        cache_name = next((name for name in _CACHES if name in taken), None)
        if cache_name is None:
            raise ConfigError(f"model: {kind(lm)} takes no cache of keys and values")
        self._cache_name, self._takes_positions = cache_name, "position_ids" in taken
        masks.install()
        self._gates = [partial(self._gate, index, layer.forward) for index, layer in enumerate(self.layers)]
        self.embedding: Tensor = lm.get_input_embeddings().weight
        self.lm_head: Tensor = lm.get_output_embeddings().weight
        if self.lm_head.shape[1] != config.hidden_size:
            raise ConfigError(f"model: {kind(lm)} reads out states of another size than its layers'")
        self.dtype, self.device = self.lm_head.dtype, self.lm_head.device
        seen = Seen(lm, cache_name, self._stack, self.layers)
        self._tuples, self._after = seen.tuples, seen.after
        self.shape = Shape(
            layers=len(self.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=seen.kv_heads,
            head_dim=seen.head_dim,
            vocab=len(self.lm_head),
            max_positions=max_positions(config),
            norm_eps=epsilon_of(self._after),
            eos=checkpoint.stop_tokens(lm),
        )
        self.plain_head = self._reads_plainly()
        own = (buffer for buffer in self.layers.buffers() if buffer.dtype is torch.bool and buffer.dim() == 4)
        self.batches = next(own, None) is None

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> "HFModel":
        """Reads a model folder in the Hugging Face layout (safetensors only).

        Raises:
            AssetError: a file is missing or corrupt.
            ConfigError: the architecture is unknown, or its layers cannot be run in ranges.
        """
        lm = checkpoint.model(folder, device, dtype)
        most = 1e-3 if dtype is torch.float32 else 0.1
        try:
            with silence(), torch.inference_mode():
                model = cls(lm)
                error = model.difference()
                if not error < most:
                    model.trees, error = False, model.difference(trees=False)
        except ConfigError:
            raise
        except Exception as refusal:  # a layer of another kind fails in as many ways as there are kinds
            raise ConfigError(f"model: {kind(lm)} cannot be run layer by layer: {one_line(refusal)}") from refusal
        # A NaN is no difference: such weights are found, and told of, where they are run.
        if error >= most:
            raise ConfigError(f"model: {kind(lm)} cannot be run layer by layer: its logits then differ by {error:.0%}")
        model.folder = folder
        return model

    def to(self, dtype: torch.dtype) -> "HFModel":
        """The same model in another dtype (a copy; used to look at a tie in float32)."""
        lm = copy.deepcopy(self.lm)
        for weight in lm.parameters():  # not buffers: rotary frequencies are float32 in every model
            weight.data = weight.data.to(dtype)
        lm.config.dtype = dtype
        other = HFModel(lm)
        other.folder, other.shape, other.trees, other.batches = self.folder, self.shape, self.trees, self.batches
        return other

    def new_cache(self, capacity: int, rows: int = 1, extra_layers: int = 0, lasts: bool = False) -> KVCache:
        """See :meth:`Model.new_cache <selfspec.model.base.Model.new_cache>`; none of its passes are captured."""
        s = self.shape
        size = (s.layers + extra_layers, rows, s.kv_heads, capacity, s.head_dim)
        return KVCache(*size, self.dtype, self.device, s.max_positions)

    def embed(self, tokens: Sequence[int], at: AttentionMetadata) -> Tensor:
        """Token ids, N of them -> ``[N, D]``, as the first layer is handed it: scaled, normed, with positions."""
        ids = _rows(to_device(tokens, self.device), at)
        return self._pass(Pass(0, 0, None, at), None, input_ids=ids)

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """Runs layers ``first`` to ``last - 1`` on the residual stream ``[N, D]``; writes their keys and values.

        Raises:
            ConfigError: a tree or a batch, by a model whose layers tell places by slots.
        """
        if first == last:
            return hidden
        by_slots = f"{kind(self.lm)} tells places by slots"
        if not (self.trees or all(tree.is_chain for tree in at.trees)):
            raise ConfigError(f"draft: {by_slots} (ALiBi, or masks of its own), so that chains are verified, not trees")
        if not self.batches and at.count > 1:
            raise ConfigError(f"engine.max_batch: {by_slots}, in masks of its own; must be 1")
        laid = _rows(hidden, at)
        return self._pass(Pass(first, last, laid, at), Slots(cache, at), inputs_embeds=laid)

    def stack(self, cache: KVCache, at: AttentionMetadata) -> None:
        """None: the layers are Hugging Face's."""

    def norm(self, hidden: Tensor) -> Tensor:
        """What the model does after its last layer: ``[N, D]`` -> ``[N, D]``, what the language-model head reads."""
        for module in self._after:
            hidden = module(hidden)
        return hidden

    def logits(self, state: Tensor) -> Tensor:
        """Normed states ``[N, D]`` -> logits ``[N, vocab]``: biased, scaled and capped as in the model."""
        return F.linear(state, self.lm_head) if self.plain_head else self._head(state)

    def _head(self, state: Tensor) -> Tensor:
        """:meth:`logits` by the model's own forward, whose stack of layers is passed by."""
        said = _Said(state[None])
        with _instead([self._stack], [lambda *_, **__: said]):
            logits: Tensor = self.lm(inputs_embeds=state[None], use_cache=False).logits[0]
        return logits

    def _reads_plainly(self) -> bool:
        """Whether logits are one product with the head, which a draft may then take some rows of."""
        state = torch.linspace(-3, 3, 3 * self.shape.hidden, device=self.device, dtype=self.dtype).view(3, -1)
        ours, theirs = F.linear(state, self.lm_head).float(), self._head(state).float()
        return float((ours - theirs).norm()) <= (1e-5 if self.dtype is torch.float32 else 1e-2) * float(theirs.norm())

    def _pass(self, what: Pass, cache: "Slots | None", **given: Tensor) -> Tensor:
        """Layers of the model's own forward: the residual stream ``[N, D]`` after them."""
        at = what.at
        if self._takes_positions:
            positions = at.positions
            if isinstance(positions, slice):
                positions = torch.arange(positions.start, positions.stop, device=self.device)
            given["position_ids"] = _rows(positions, at)
        given |= {self._cache_name: cache or Slots(None, at), "use_cache": True}  # type: ignore[dict-item]
        self._what, token = what, masks.RUNNING.set(at)
        try:
            with _instead(self.layers, self._gates):
                self._stack(**given)
        except _Reached as reached:
            hidden = reached.hidden.flatten(0, 1)
            return hidden if at.unpad is None else hidden[at.unpad]
        finally:
            masks.RUNNING.reset(token)
        raise RuntimeError(f"{kind(self.lm)} did not run its layers in order")

    def _gate(self, index: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **more: Any) -> Any:
        """A layer's ``forward`` within a pass."""
        what = self._what
        if index == what.last:
            raise _Reached(hidden)
        if index < what.first:
            return (hidden, None) if self._tuples else hidden
        if index == what.first and what.hidden is not None:
            hidden = what.hidden
        out = forward(hidden, *args, **more)
        if index + 1 == what.last:
            raise _Reached(out[0] if self._tuples else out)
        return out

    @torch.inference_mode()
    def difference(self, trees: bool = True) -> float:
        """How far logits by layers are from the model's own forward, relative to their size: a proof on a few tokens.

        A prompt of three, then a tree in which the next three stand beside a token that they must not see.

        Args:
            trees: without, the next three are a chain.
        """
        tokens = [(11 + 7919 * i) % self.shape.vocab for i in range(7)]
        prompt, path, other = tokens[:3], tokens[3:6], tokens[6]
        cache = self.new_cache(len(tokens))
        row, half = cache.admit(), self.shape.layers // 2
        states = []
        tree = Tree([path[0], other, *path[1:]], [-1, 0, 0, 2]) if trees else Tree.chain(path)
        for each in (Tree.chain(prompt), tree):
            at = cache.place([each], row=row)
            hidden = self.run(self.embed(each.tokens, at), cache, at, 0, half)
            states.append(self.norm(self.run(hidden, cache, at, half, self.shape.layers)))
            cache.commit(row, range(len(each)) if each.is_chain else [0, 2, 3])
        ours = self.logits(torch.cat(states)[[0, 1, 2, 3, 5, 6] if trees else slice(None)]).float()
        theirs = self.lm(torch.tensor([prompt + path], device=self.device), use_cache=False).logits[0].float()
        return float((ours - theirs).norm() / theirs.norm())


class _Said:
    """What a stack of layers gives its model: final states ``[1, N, D]``, and nothing else it may be asked for."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class Slots:
    """What a decoder layer is given as its cache: it writes at our place, and reads what is to be seen from there."""

    is_compileable = False

    def __init__(self, cache: KVCache | None, at: AttentionMetadata) -> None:
        self.cache, self.at = cache, at

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values ``[R, G, T, d]`` -> all that attention reads, ``[R, G, stop, d]``."""
        assert self.cache is not None, "no layer is run where none is given"
        sizes, slot = (keys.shape[-1], values.shape[-1]), self.cache.kv.shape[-1]
        new = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
        new = (x if self.at.unpad is None else x[self.at.unpad] for x in new)
        # Latent attention's keys are wider than its values: the cache is as wide as the wider of both.
        keys, values = (F.pad(x, (0, slot - x.shape[-1])) for x in new)
        keys, values = self.cache.append(layer, keys, values, self.at)
        return keys[..., : sizes[0]], values[..., : sizes[1]]

    def get_seq_length(self, layer: int = 0) -> int:
        """Slots before the new tokens'; rows differ in it, and are told apart by positions and masks."""
        return self.at.stop - self.at.width

    get_query_offset = get_seq_length

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Slots that attention reads, and the first of them."""
        return self.at.stop, 0


@contextmanager
def _instead(modules: Iterable[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Other ``forward`` methods for some modules, for a while."""
    for module, forward in zip(modules, forwards, strict=True):
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _rows(tokens: Tensor, at: AttentionMetadata) -> Tensor:
    """``[N, ...]`` -> ``[R, T, ...]``; shorter rows repeat their last token."""
    tokens = tokens if at.pad is None else tokens[at.pad]
    return tokens.view(at.count, at.width, *tokens.shape[1:])
