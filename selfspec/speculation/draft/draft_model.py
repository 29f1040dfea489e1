"""A smaller model drafts: speculative decoding as first proposed (2211.17192, 2302.01318).

It shares nothing with the target but the meaning of token ids. Its cache follows the target's: what it
drafted and the target kept is in place already, what the target said in its stead is caught up on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from omegaconf import MISSING

from selfspec.axes import DraftOptions
from selfspec.config import Model as ModelConfig
from selfspec.errors import AssetError, ConfigError
from selfspec.files import from_json
from selfspec.lazy import F, torch
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Layers, Model
from selfspec.model.cache import KVCache
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.readout import Readout
from selfspec.speculation.sampling import likeliest
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor

_NEVER = -1e4
"""A logit of no probability, and yet a number: gates multiply the two."""


@dataclass
class Options(DraftOptions):
    """Which model."""

    name: str = "draft_model"
    source: str = MISSING
    """The smaller model; its tokens mean what the target's do."""
    sha256: str | None = None
    """Of the source's file."""
    sample: bool = False
    """Under ``policy=rejection``: draw draft tokens from the draft's distribution, not its likeliest."""

    role: ClassVar[Literal["lookup", "learned"] | None] = "learned"
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {"hf": ("source", "sha256"), "vllm": ("source", "sha256")}

    def make(self, model: Model, head: Head | None) -> DraftModel:
        """On the target's device and in its dtype.

        Raises:
            AssetError: the model cannot be had.
            ConfigError: its token ids mean something else than the target's.
        """
        from selfspec.model import gguf, hf  # not sooner: they load what reads weights, which options do without

        folder = gguf.model_folder(ModelConfig(name="draft", source=self.source, sha256=self.sha256))
        assert model.folder is not None, "a target that was loaded"
        if vocabulary(folder) != vocabulary(model.folder):
            raise ConfigError(f"draft.source={self.source}: its tokenizer's vocabulary is not the target's")
        small = hf.load(folder, model.device, model.dtype, Layers.auto, graphs=model.graphs, fused=model.fused)
        return DraftModel(model, small, self.sample)

    def vllm(self, folder: Path | None) -> dict[str, Any]:
        """The model in that folder."""
        return {"method": "draft_model", "model": str(folder)}


class DraftModel(Draft):
    """Drafts chains with another model, on a cache of its own.

    ``Seq.memory`` is the tokens run beyond the cache's length: drafts, of which the first may come true.
    """

    def __init__(self, model: Model, small: Model, sample: bool = False) -> None:
        super().__init__(model)
        self.small, self.sample, self._readout = small, sample, Readout(model)
        self._target: KVCache | None = None
        self._cache = small.new_cache(0)
        self._rows: list[Seq] = []

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """Drafts until every row has its k tokens or the gate doubts one; rows that are done ride along."""
        self._follow(rows, cache)
        trees = {id(row): Tree.chain(row.tokens[-1:]) for row in rows}
        most = {id(row): k for row, k in zip(rows, ks, strict=True)}
        going = [most[id(row)] > 0 for row in self._rows]
        logits = self._catch_up() if any(going) else None
        while logits is not None:
            signals = gate.signal(logits).tolist()
            tokens = likeliest(logits)
            for r, row in enumerate(self._rows):
                tree, ahead = trees[id(row)], len(trees[id(row)]) - 1
                if going[r] and gate.reads:
                    tree.signals.append(signals[r])
                    going[r] = not gate.stops(signals[r])
                if going[r] and self.sample and row.request.sampling.temperature > 0:
                    tokens[r], q = self._readout.draw(logits[r], row.request.sampling, len(row.tokens) + ahead, ahead)
                    tree.drawn_from = q[None] if tree.drawn_from is None else torch.cat((tree.drawn_from, q[None]))
                if going[r]:
                    tree.add(ahead, tokens[r])
                    going[r] = len(tree) <= most[id(row)]
            logits = self._extend(tokens) if any(going) else None
        return Proposal(list(trees.values()))

    def _follow(self, rows: Sequence[Seq], cache: KVCache) -> None:
        """Keeps what came true, takes its own rows from those that left the batch, gives them to those that joined."""
        if cache is not self._target:
            self._target, self._rows = cache, []
            self._cache = self.small.new_cache(cache.capacity, cache.rows, lasts=True)
        for index, row in enumerate(self._rows):  # before any moves: what lies beyond the length is left behind
            said = row.tokens[self._cache.lengths[index] :]
            right = len(list(takewhile(bool, map(eq, row.memory, said[:-1]))))  # the last one's logits are wanted
            if right:
                self._cache.commit(index, range(right))
            row.memory = []
        here = {id(row) for row in rows}
        for index in reversed(range(len(self._rows))):
            if id(self._rows[index]) not in here:
                self._cache.evict(index)
                self._rows[index] = self._rows[-1]
                self._rows.pop()
        known = {id(row) for row in self._rows}
        for row in rows:
            if id(row) not in known:
                self._check_room(row)
                index, prompt = self._cache.admit(), Tree.chain(row.tokens[:-1])
                self._run(prompt.tokens, self._cache.place([prompt], row=index))
                self._cache.commit(index, range(len(prompt)))
                self._rows.append(row)
                row.memory = []

    def _check_room(self, row: Seq) -> None:
        """What is asked for must fit; slots beyond it, where drafts of the last positions lie, need no position."""
        limit, needed = self.small.shape.max_positions, len(row.request.tokens) + row.request.max_new_tokens
        if needed > limit:
            raise ConfigError(f"draft.source: has {limit} positions; {needed} are needed")

    def _catch_up(self) -> Tensor:
        """Runs what it has not seen of every row's tokens: the logits ``[R, vocab]`` after their last ones."""
        unseen = [Tree.chain(row.tokens[known:]) for row, known in zip(self._rows, self._cache.lengths, strict=True)]
        hidden = self._run([token for tree in unseen for token in tree.tokens], self._cache.place(unseen))
        for index, tree in enumerate(unseen):
            self._cache.commit(index, range(len(tree)))
        last = [end - 1 for end in accumulate(map(len, unseen))]
        return self._logits(hidden[to_device(last, hidden.device)])

    def _extend(self, tokens: Sequence[int]) -> Tensor:
        """Runs one more drafted token of every row: the logits ``[R, vocab]`` after it."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.memory.append(token)
        drafted = [Tree.chain(row.memory) for row in self._rows]
        return self._logits(self._run(tokens, self._cache.place(drafted, first=len(drafted[0]) - 1)))

    def _run(self, tokens: Sequence[int], at: AttentionMetadata) -> Tensor:
        """All layers of the small model on N tokens: ``[N, D]``."""
        small, known = self.small, self.small.shape.vocab - 1
        embedded = small.embed([min(token, known) for token in tokens], at)  # paddings of embeddings may differ
        return small.run(embedded, self._cache, at, 0, small.shape.layers)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Over the target's vocabulary ``[R, vocab]``, whichever of the two embeddings is padded further."""
        logits = self.small.logits(self.small.norm(hidden))
        return F.pad(logits, (0, self.model.shape.vocab - logits.shape[-1]), value=_NEVER)


def vocabulary(folder: Path) -> dict[int, str]:
    """What every token id means, by a model folder's ``tokenizer.json``.

    Raises:
        AssetError: there is none, or it cannot be read.
    """
    try:
        file = from_json((folder / "tokenizer.json").read_bytes())
        entries = file["model"]["vocab"]  # a mapping, or, of unigram models, a list of (token, score)
        listed = entries.items() if isinstance(entries, dict) else ((entry[0], i) for i, entry in enumerate(entries))
        meanings = {i: token for token, i in listed}
        return meanings | {token["id"]: token["content"] for token in file.get("added_tokens", [])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AssetError(f"{folder}: has no tokenizer.json that can be read") from error
