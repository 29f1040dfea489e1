"""Lossless sampling, driven through the real loop: whatever drafts, the tokens' joint distribution is the target's.

Thousands of seeds on a model of four words; chi-squared against the distribution that the model's own
probabilities multiply to; and planted faults, each of which the same check finds.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from selfspec.engine import policy
from selfspec.engine.cache import KVCache
from selfspec.engine.controller import Fixed
from selfspec.engine.decode import Speculation, Target
from selfspec.engine.draft.base import Draft, Proposal, Row
from selfspec.engine.gate import Gate
from selfspec.engine.llama import Llama
from selfspec.engine.policy import Choice, LongestPrefix, Policy, Rejection, Verdict
from selfspec.engine.sampling import Purpose, distribution, draw, uniform
from selfspec.engine.scheduler import Scheduler
from selfspec.engine.tree import Tree
from selfspec.types import Completion, Request, Sampling

pytestmark = pytest.mark.usefixtures("inference")

VOCAB, NEW, K, SEEDS = 4, 5, 3, 3000
PROMPT = (2, 0, 3)
SAMPLINGS = {"all": Sampling(0.8), "top-k and top-p": Sampling(1.2, top_k=3, top_p=0.9)}


def tiny() -> Llama:
    """Two layers and a head with opinions, in float64: what a pass over several tokens rounds otherwise is no matter."""
    random = torch.Generator().manual_seed(11)

    def matrix(rows: int, columns: int, scale: float = 2) -> Tensor:
        return scale * torch.randn(rows, columns, generator=random, dtype=torch.float64) / columns**0.5

    weights = {"model.embed_tokens.weight": matrix(VOCAB, 8), "lm_head.weight": matrix(VOCAB, 8, 1.3)}
    weights["model.norm.weight"] = torch.ones(8, dtype=torch.float64)
    for prefix in ("model.layers.0.", "model.layers.1."):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = matrix(8, 8)
        for name, rows, columns in (("gate_proj", 16, 8), ("up_proj", 16, 8), ("down_proj", 8, 16)):
            weights[f"{prefix}mlp.{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.ones(8, dtype=torch.float64)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    return Llama({"model_type": "llama", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, **shape}, weights)


class Bigram(Draft):
    """Drafts by the last token alone: ``[VOCAB, VOCAB]`` logits, near the truth or not."""

    def __init__(self, model: Llama) -> None:
        super().__init__(model)
        self.table = 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(12))

    def propose(self, rows: Sequence[Row], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        return Proposal([self.tree(row, k) for row, k in zip(rows, ks, strict=True)])

    def tree(self, row: Row, k: int) -> Tree:
        """The row's tree."""
        raise NotImplementedError


class Chain(Bigram):
    """The likeliest token, and the likeliest after that."""

    def tree(self, row: Row, k: int) -> Tree:
        tokens = row.tokens[-1:]
        for _ in range(k):
            tokens.append(int(self.table[tokens[-1]].argmax()))
        return Tree.chain(tokens)


class Branches(Bigram):
    """The two likeliest tokens after every node."""

    def nodes(self, k: int) -> int:
        return 2 ** (k + 1) - 1

    def tree(self, row: Row, k: int) -> Tree:
        tree = Tree.chain(row.tokens[-1:])
        for node in range(2**k - 1):
            for token in self.table[tree.tokens[node]].topk(2).indices.tolist():
                tree.add(node, token)
        return tree


class Sampled(Bigram):
    """A chain drawn from the bigrams' distribution q."""

    def tree(self, row: Row, k: int) -> Tree:
        tree, sampling, drawn_from = Tree.chain(row.tokens[-1:]), row.request.sampling, list[Tensor]()
        for ahead in range(k):
            q = distribution(self.table[tree.tokens[-1]], sampling)
            u = uniform(sampling.seed, len(row.tokens) + ahead, Purpose.draft, ahead)
            tree.add(ahead, draw(q, u))
            drawn_from.append(q)
        tree.drawn_from = torch.stack(drawn_from) if drawn_from else None
        return tree


DRAFTS: dict[str, type[Draft]] = {"none": Draft, "chain": Chain, "tree": Branches, "sampled chain": Sampled}


@dataclass(frozen=True)
class Bench:
    """The tiny model, and every way to decode with it."""

    model: Llama

    def decode(
        self, draft: str, requests: Sequence[Request], rows: int = 50, k: int = K, judge: Policy | None = None
    ) -> list[Completion]:
        drafting = DRAFTS[draft](self.model)
        target = Target(self.model, self.model.shape.layers, self.model.norm)
        speculation = Speculation(target, drafting, Gate(), Fixed(k), judge or Rejection())
        kv = self.model.new_cache(max(len(r.tokens) for r in requests) + NEW + drafting.nodes(k), rows)
        return Scheduler(speculation, kv).run(requests)

    def truth(self, sampling: Sampling) -> dict[tuple[int, ...], float]:
        """The joint distribution of NEW tokens, each from one plain pass over all that comes before it."""
        joint = {(): 1.0}
        for _ in range(NEW):
            joint = {
                (*said, token): probability * p
                for said, probability in joint.items()
                for token, p in enumerate(distribution(self.logits((*PROMPT, *said)), sampling).tolist())
            }
        return joint

    def logits(self, context: tuple[int, ...]) -> Tensor:
        """Of the next token, ``[VOCAB]``."""
        kv = self.model.new_cache(len(context))
        at = kv.place([Tree.chain(context)], row=kv.admit())
        hidden = self.model.run(self.model.embed(context, at), kv, at, 0, self.model.shape.layers)
        return self.model.logits(self.model.norm(hidden[-1:]))[0]

    def p_value(self, draft: str, sampling: Sampling, judge: Policy | None = None) -> float:
        """How likely counts as far from the truth as these are, of an exact policy."""
        requests = [request(replace(sampling, seed=seed)) for seed in range(SEEDS)]
        counts = Counter(done.tokens for done in self.decode(draft, requests, judge=judge))
        return chi_squared(counts, self.truth(sampling))


def request(sampling: Sampling) -> Request:
    return Request(PROMPT, NEW, ignore_eos=True, sampling=sampling)


def chi_squared(counts: Counter[tuple[int, ...]], truth: dict[tuple[int, ...], float]) -> float:
    """Pearson's p-value; outcomes expected less than five times are counted as one."""
    total = counts.total()
    if any(truth[outcome] == 0 for outcome in counts):
        return 0.0
    cells = [(counts[outcome], total * p) for outcome, p in truth.items()]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5] + [(sum(n for n, _ in rare), sum(e for _, e in rare))]
    cells = [cell for cell in cells if cell[1] > 0]
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    half = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(tiny())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_have_the_targets_joint_distribution(bench: Bench, draft: str, sampling: str) -> None:
    assert bench.p_value(draft, SAMPLINGS[sampling]) > 1e-4
