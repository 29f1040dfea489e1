"""Lossless sampling, driven through the real loop: whatever drafts, the tokens' joint distribution is the target's.

Thousands of seeds on a model of four words; chi-squared against the distribution that the model's own
probabilities multiply to; and planted faults, each of which the same check finds.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import pytest
import torch
from torch import Tensor

from selfspec.engine.torch.session import Scheduler
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation import sampling as chance
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.policy import rejection
from selfspec.speculation.policy.base import Choice, Policy, Verdict
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.policy.rejection import Rejection
from selfspec.speculation.sampling import Purpose, distribution, draw, uniform
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Request, Sampling

pytestmark = pytest.mark.usefixtures("inference")

VOCAB, NEW, K, SEEDS = 4, 5, 3, 1200
PROMPT = (2, 0, 3)
SAMPLINGS = {"all": Sampling(0.8), "top-k and top-p": Sampling(1.2, top_k=3, top_p=0.9)}


def tiny() -> Llama:
    """Two layers and a head with opinions, in float64, so that it is no matter who shares a pass with whom."""
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


def next_logits(model: Llama, context: tuple[int, ...]) -> Tensor:
    """``[VOCAB]``, of the token after ``context``, from one plain pass."""
    kv = model.new_cache(len(context))
    at = kv.place([Tree.chain(context)], row=kv.admit())
    hidden = model.run(model.embed(context, at), kv, at, 0, model.shape.layers)
    return model.logits(model.norm(hidden[-1:]))[0]


class Bigram(Draft):
    """Drafts by the last token alone, as if nothing stood before it, and less surely than the target."""

    def __init__(self, model: Llama) -> None:
        super().__init__(model)
        self.table = 0.7 * torch.stack([next_logits(model, (token,)) for token in range(VOCAB)])

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        return Proposal([self.tree(row, k) for row, k in zip(rows, ks, strict=True)])

    def tree(self, row: Seq, k: int) -> Tree:
        """The row's tree."""
        raise NotImplementedError


class Chain(Bigram):
    """The likeliest token, and the likeliest after that."""

    def tree(self, row: Seq, k: int) -> Tree:
        tokens = row.tokens[-1:]
        for _ in range(k):
            tokens.append(int(self.table[tokens[-1]].argmax()))
        return Tree.chain(tokens)


class Branches(Bigram):
    """The two likeliest tokens after every node."""

    def nodes(self, k: int) -> int:
        return 2 ** (k + 1) - 1

    def tree(self, row: Seq, k: int) -> Tree:
        tree = Tree.chain(row.tokens[-1:])
        for node in range(2**k - 1):
            for token in self.table[tree.tokens[node]].topk(2).indices.tolist():
                tree.add(node, token)
        return tree


class Sampled(Bigram):
    """A chain drawn from the bigrams' distribution q."""

    def tree(self, row: Seq, k: int) -> Tree:
        tree, sampling, drawn_from = Tree.chain(row.tokens[-1:]), row.request.sampling, list[Tensor]()
        for ahead in range(k):
            q = distribution(self.table[tree.tokens[-1]], sampling)
            u = chance.uniform(sampling.seed, len(row.tokens) + ahead, Purpose.draft, ahead)
            tree.add(ahead, draw(q, u))
            drawn_from.append(q)
        tree.drawn_from = torch.stack(drawn_from) if drawn_from else None
        return tree


DRAFTS: dict[str, type[Draft]] = {
    "none": Draft,
    "chain": Chain,
    "tree": Branches,
    "sampled chain": Sampled,
}


@dataclass(frozen=True)
class Bench:
    """The tiny model, and every way to decode with it."""

    model: Llama

    def decode(
        self, draft: str, requests: Sequence[Request], rows: int = 50, k: int = K, judge: Policy | None = None
    ) -> list[Completion]:
        drafting = DRAFTS[draft](self.model)
        target = Target(self.model, self.model.shape.layers, self.model.norm)
        speculation = Speculation(target, drafting, Gate(), Controller(k), judge or Rejection())
        kv = self.model.new_cache(max(len(r.tokens) for r in requests) + NEW + drafting.nodes(k), rows)
        return Scheduler(speculation, kv).run(requests)

    def truth(self, sampling: Sampling) -> dict[tuple[int, ...], float]:
        """The joint distribution of NEW tokens, each from one plain pass over all that comes before it."""
        joint = {(): 1.0}
        for _ in range(NEW):
            joint = {
                (*said, token): probability * p
                for said, probability in joint.items()
                for token, p in enumerate(distribution(next_logits(self.model, (*PROMPT, *said)), sampling).tolist())
            }
        return joint

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


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_have_the_targets_joint_distribution(bench: Bench, draft: str, sampling: str) -> None:
    assert bench.p_value(draft, SAMPLINGS[sampling]) > 1e-4


def by_the_target_alone(patch: pytest.MonkeyPatch) -> Policy:
    """The wrong residual: after a rejection, the target's own distribution."""
    patch.setattr(rejection, "residual", lambda p, q: p)
    return Rejection()


def by_a_draft_times(factor: float) -> Callable[[pytest.MonkeyPatch], Policy]:
    """An unnormalised draft: its probabilities come to ``factor``."""

    def judge(trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        for tree in trees:
            if tree.drawn_from is not None:
                tree.drawn_from = tree.drawn_from * factor
        return Rejection()(trees, logits, choices)

    return lambda patch: judge


def by_the_node_before(patch: pytest.MonkeyPatch) -> Policy:
    """Off by one: the logits of node i - 1 judge what follows node i."""

    def judge(trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        shifted = [own[[0, *range(len(own) - 1)]] for own in logits.split([len(tree) for tree in trees])]
        return Rejection()(trees, torch.cat(shifted), choices)

    return judge


def by_the_number_before(patch: pytest.MonkeyPatch) -> Policy:
    """Off by one: two positions share a number."""
    patch.setattr(rejection, "uniform", lambda seed, position, purpose: uniform(seed, position // 2, purpose))
    return Rejection()


def by_the_number_that_drew_it(patch: pytest.MonkeyPatch) -> Policy:
    """One number draws the draft token and judges it."""
    patch.setattr(rejection, "uniform", lambda seed, position, purpose: uniform(seed, position, Purpose.draft))
    patch.setattr(chance, "uniform", lambda seed, position, purpose, ahead: uniform(seed, position, Purpose.draft))
    return Rejection()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "fault"),
    [
        ("sampled chain", by_the_target_alone),
        ("sampled chain", by_a_draft_times(1.3)),
        ("sampled chain", by_a_draft_times(0.7)),
        ("sampled chain", by_the_node_before),
        ("chain", by_the_node_before),
        ("tree", by_the_node_before),
        ("sampled chain", by_the_number_before),
        ("tree", by_the_number_before),
        ("sampled chain", by_the_number_that_drew_it),
    ],
)
def test_a_planted_fault_is_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, draft: str, fault: Callable[[pytest.MonkeyPatch], Policy]
) -> None:
    assert bench.p_value(draft, SAMPLINGS["all"], fault(monkeypatch)) < 1e-4


@pytest.fixture(scope="module")
def mixed() -> list[Request]:
    """Requests that differ in everything, some greedy: neighbours to each other."""
    kinds = (Sampling(0.8), Sampling(0.0), Sampling(1.2, top_k=3, top_p=0.9), Sampling(2.0, top_p=0.5))
    prompts = (PROMPT, (1,), (3, 3, 0, 2, 1, 0))
    samplings = [replace(kind, seed=seed) for seed in range(9) for kind in kinds]
    return [Request(prompts[i % 3], NEW + i % 4, True, sampling) for i, sampling in enumerate(samplings)]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_a_certain_draft_does_not_show_in_the_tokens(bench: Bench, mixed: list[Request], draft: str, k: int) -> None:
    """Tokens are a function of prompt and seed, whatever the draft, K, and neighbours: those of plain sampling."""
    plain = [bench.decode("none", [request], rows=1)[0].tokens for request in mixed]
    assert len(set(plain)) > len(mixed) / 2
    for rows in (1, 5, len(mixed)):
        together = bench.decode(draft, mixed, rows, k)
        assert [done.tokens for done in together] == plain
        assert any(c.accepted for done in together for c in done.cycles)
    assert [done.tokens for done in bench.decode(draft, mixed[::-1], 5, k)] == plain[::-1]


def test_a_sampled_draft_is_a_function_of_the_request_too(bench: Bench, mixed: list[Request]) -> None:
    alone = [bench.decode("sampled chain", [request], rows=1)[0].tokens for request in mixed]
    for rows in (5, len(mixed)):
        assert [done.tokens for done in bench.decode("sampled chain", mixed[::-1], rows)] == alone[::-1]


def test_another_seed_gives_other_tokens(bench: Bench) -> None:
    requests = [request(Sampling(1.5, seed=seed)) for seed in (*range(20), *range(20))]
    tokens = [done.tokens for done in bench.decode("sampled chain", requests)]
    assert tokens[:20] == tokens[20:]
    assert len(set(tokens)) > 15


@pytest.mark.parametrize("draft", DRAFTS)
def test_at_temperature_zero_it_is_the_longest_prefix(bench: Bench, draft: str) -> None:
    contexts = product(range(VOCAB), repeat=2)
    requests = [Request(context, NEW + 3, True, Sampling(0, 3, 0.9, seed)) for seed, context in enumerate(contexts)]
    got = bench.decode(draft, requests, 4)
    wanted = bench.decode(draft, requests, 4, judge=LongestPrefix())
    assert [done.tokens for done in got] == [done.tokens for done in wanted]
    assert [[c.accepted for c in done.cycles] for done in got] == [[c.accepted for c in d.cycles] for d in wanted]
    assert draft == "none" or any(c.accepted for done in got for c in done.cycles)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_temperature_near_zero_is_greedy(bench: Bench, draft: str) -> None:
    (greedy,) = bench.decode("none", [request(Sampling())])
    cold = bench.decode(draft, [request(Sampling(1e-3, seed=seed)) for seed in range(30)])
    assert {done.tokens for done in cold} == {greedy.tokens}


@pytest.mark.parametrize("draft", DRAFTS)
def test_no_token_is_outside_top_k_and_top_p(bench: Bench, draft: str) -> None:
    logits = cache(partial(next_logits, bench.model))
    requests = [request(Sampling(3.0, top_k=2, seed=seed)) for seed in range(60)]
    requests += [request(Sampling(1.5, top_p=0.4, seed=seed)) for seed in range(60)]
    chosen = set()
    for number, done in enumerate(bench.decode(draft, requests)):
        for i, token in enumerate(done.tokens):
            p = (logits((*PROMPT, *done.tokens[:i])) / requests[number].sampling.temperature).softmax(-1)
            likelier = p[p > p[token]]
            assert len(likelier) < 2 if number < 60 else float(likelier.sum()) < 0.4
            chosen.add((number < 60, len(likelier)))
    assert {(True, 0), (True, 1), (False, 0), (False, 1)} <= chosen, "else nothing is proven"
