"""Lookups: what they find is what a plain search finds; trees keep to their limits; what is shared is bounded."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caches
import pytest
import torch

from selfspec.axes import DRAFT
from selfspec.engine.torch.session import Scheduler
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft import suffix
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.draft.ngram import Latest, copied
from selfspec.speculation.draft.suffix import Counts, Suffix
from selfspec.speculation.fit import split, trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Cycle, Request

pytestmark = pytest.mark.usefixtures("inference")

NGRAM = DRAFT.new("ngram", max_match=4, min_match=1)
SUFFIX = DRAFT.new("suffix", max_match=5, min_match=1, width=3, budget=9)
UNUSED: Any = None
"""Lookups look at neither model, gate, states nor cache."""


def texts(count: int, alphabet: int = 4, max_match: int = 40) -> list[list[int]]:
    """Random texts that repeat themselves a lot."""
    rng = random.Random(count)
    return [rng.choices(range(alphabet), k=rng.randint(2, max_match)) for _ in range(count)]


def row_of(draft: Draft, prompt: Sequence[int], *steps: Sequence[int]) -> Seq:
    """A row as the loop makes it: a prompt and its first token observed together, then what each cycle gave."""
    row = Seq(Request(tuple(prompt[:-1]), 99))
    row.tokens.append(prompt[-1])
    draft.observe(row, 0, row.tokens[1:], UNUSED, UNUSED)
    for new in steps:
        row.tokens += new
        draft.observe(row, 0, new, UNUSED, UNUSED)
    return row


def tree_of(draft: Draft, row: Seq, k: int) -> Tree:
    (tree,), hidden, depth = draft.propose([row], [k], UNUSED, UNUSED)
    assert hidden is None and depth == 0
    return tree


def in_steps(text: Sequence[int]) -> list[Sequence[int]]:
    """A text in pieces: its first two tokens, then one, two, three, ... at a time."""
    pieces, at = [text[:2]], 2
    while at < len(text):
        pieces.append(text[at : at + len(pieces)])
        at += len(pieces[-1])
    return pieces


class TestPromptLookup:
    @staticmethod
    def searched(text: Sequence[int], max_match: int, min_match: int) -> int | None:
        """By looking everywhere."""
        for length in range(max_match, min_match - 1, -1):
            for start in range(len(text) - length - 1, -1, -1):
                if list(text[start : start + length]) == list(text[-length:]):
                    return start + length
        return None

    @pytest.mark.parametrize(("max_match", "min_match"), [(1, 1), (3, 1), (4, 2), (6, 6)])
    def test_it_finds_the_latest_of_the_longest_matches(self, max_match: int, min_match: int) -> None:
        found = []
        for text in texts(200):
            index, known = Latest(max_match, min_match), 0
            for end in range(2, len(text) + 1):
                index.learn(text[:end], known)
                known = end
            found.append(index.find(text))
            assert found[-1] == self.searched(text, max_match, min_match)
        assert any(place is None for place in found) and any(place is not None for place in found)

    def test_a_copy_that_reaches_the_end_repeats_itself(self) -> None:
        assert copied([7, 1, 2, 3], 1, 2) == [1, 2]
        assert copied([7, 1, 2, 3], 1, 7) == [1, 2, 3, 1, 2, 3, 1]
        assert copied([5, 5], 1, 3) == [5, 5, 5]
        assert copied([7, 1, 2, 3], 1, 0) == []

    @pytest.mark.parametrize("k", [0, 1, 3, 8])
    def test_it_proposes_a_chain_of_k_or_nothing(self, k: int) -> None:
        draft = NGRAM.make(UNUSED, None)
        for text in texts(50, alphabet=8):
            tree = tree_of(draft, row_of(draft, *in_steps(text)), k)
            start = self.searched(text, 4, 1)
            assert tree.is_chain and tree.tokens == [text[-1], *([] if start is None else copied(text, start, k))]

    def test_each_row_looks_into_its_own_text(self) -> None:
        draft = NGRAM.make(UNUSED, None)
        rows = [row_of(draft, [1, 2, 3, 1]), row_of(draft, [1, 5, 1]), row_of(draft, [9, 8])]
        trees, _, _ = draft.propose(rows, [2, 1, 4], UNUSED, UNUSED)
        assert [tree.tokens for tree in trees] == [[1, 2, 3], [1, 5], [8]]


def followers(text: Sequence[int], max_match: int) -> dict[tuple[int, ...], Counter[int]]:
    """What follows every context, by looking everywhere."""
    found: dict[tuple[int, ...], Counter[int]] = {}
    for place in range(1, len(text)):
        for start in range(max(place - max_match, 0), place):
            found.setdefault(tuple(text[start:place]), Counter())[text[place]] += 1
    return found


class TestCounts:
    @pytest.mark.parametrize("max_match", [1, 3, 6])
    def test_they_are_those_of_a_count_from_scratch(self, max_match: int) -> None:
        for text in texts(50):
            counts, known = Counts(max_match, 1.0), 0
            for piece in in_steps(text):
                counts.learn(text[: known + len(piece)], known)
                known += len(piece)
            wanted = followers(text, max_match)
            assert counts.followers == wanted
            assert counts.totals == {context: after.total() for context, after in wanted.items()}

    def test_with_room_for_n_tokens_they_are_those_of_the_last_n(self) -> None:
        bounded = Counts(3, 1.0, room=20)
        last: list[tuple[list[int], int]] = []
        for text in texts(60):
            bounded.learn(text, 1)
            last = [*last, *((text, place) for place in range(1, len(text)))][-20:]
            fresh = Counts(3, 1.0)
            for text, place in last:
                fresh.learn(text[: place + 1], place)
            assert (bounded.followers, bounded.totals) == (fresh.followers, fresh.totals)

    def test_pruned_they_keep_the_most_frequent_and_the_totals(self) -> None:
        counts = Counts(1, 1.0)
        counts.learn([0, 1, 0, 2, 0, 2, 0, 3, 0, 3, 0, 3], 1)
        counts.prune(2)
        assert counts.followers[(0,)] == {3: 3, 2: 2} and counts.totals[(0,)] == 6


def probability(draft: Suffix, own: Counts, context: tuple[int, ...], token: int) -> float:
    """The formula at the head of the module, from the shortest context up."""
    p = 0.0
    for length in range(draft.min_match, min(draft.max_match, len(context)) + 1):
        for counts in reversed([own, *draft.others]):
            after = counts.followers.get(context[-length:], {})
            if after:
                total = counts.totals[context[-length:]]
                p = (after.get(token, 0) + counts.doubt * p) / (total + counts.doubt)
    return p


@pytest.fixture(scope="module")
def draft() -> Suffix:
    return Suffix(UNUSED, SUFFIX, suffix.counted([torch.tensor(text) for text in texts(30, alphabet=6)]))


class TestSuffix:
    def test_probabilities_are_those_of_the_formula(self, draft: Suffix) -> None:
        for text in texts(50, alphabet=6):
            own, context = Counts(5, 2.0), tuple(text[-5:])
            own.learn(text, 1)
            found = draft.likely(own, context, 0.0)
            wanted = sorted((probability(draft, own, context, token) for token in range(6)), reverse=True)[:3]
            assert [p for p, _ in found] == pytest.approx([p for p in wanted if p > 0])
            assert all(p == pytest.approx(probability(draft, own, context, token)) for p, token in found)
            assert sum(wanted) <= 1 + 1e-9
            for p, token in draft.likely(own, context, 0.2):  # what could matter less than that is not read
                assert 0.2 <= p <= probability(draft, own, context, token) + 1e-9 < p + 0.2

    @pytest.mark.parametrize("k", [0, 1, 2, 5, 30])
    @pytest.mark.parametrize(("width", "budget"), [(1, None), (1, 4), (2, 7), (4, 1), (8, 30)])
    def test_trees_keep_to_width_budget_and_depth(
        self, draft: Suffix, width: int, budget: int | None, k: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(suffix, "WORTH", 0.04)  # so that the limits are reached
        limited = Suffix(
            UNUSED, DRAFT.new("suffix", max_match=5, min_match=1, width=width, budget=budget), draft.others[0]
        )
        sizes, widths = set(), set()
        for text in texts(30, alphabet=6):
            tree = tree_of(limited, row_of(limited, *in_steps(text)), k)
            children = Counter(tree.parents[1:])
            assert max(tree.depths()) <= k and len(tree) <= limited.nodes(k) == 1 + (budget or k)
            assert max(children.values(), default=0) <= width
            assert len({*zip(tree.parents, tree.tokens, strict=True)}) == len(tree), "siblings differ"
            sizes.add(len(tree))
            widths.add(max(children.values(), default=0))
        assert sizes == {1} if k == 0 else max(sizes) > 1
        if k == 2 and width <= 2:
            full = 1 + sum(width**depth for depth in range(1, k + 1))
            assert max(sizes) == min(full, limited.nodes(k)) and max(widths) == width, "the limits are reached"

    def test_the_more_share_a_pass_the_likelier_a_token_must_be(self, draft: Suffix) -> None:
        rows = [row_of(draft, text) for text in texts(8, alphabet=6)]
        alone = [tree_of(draft, row, 30) for row in rows]
        together = draft.propose(rows, [30] * 8, UNUSED, UNUSED).trees
        assert all(len(some) <= len(more) for some, more in zip(together, alone, strict=True))
        assert sum(map(len, together)) < sum(map(len, alone))

    def test_the_likeliest_paths_are_in_the_tree(self, draft: Suffix) -> None:
        """None that is left out is likelier than one that is in, unless it had no place below its parent."""
        for text in texts(30, alphabet=6):
            row = row_of(draft, text)
            tree, own = tree_of(draft, row, 30), row.memory
            paths, scores, left_out = [tuple(row.tokens)], [1.0], []
            for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
                shares = {token: p for p, token in draft.likely(own, paths[parent][-5:], suffix.WORTH / scores[parent])}
                scores.append(scores[parent] * shares[token])
                paths.append((*paths[parent], token))
            assert scores == pytest.approx(sorted(scores, reverse=True)) and min(scores) >= suffix.WORTH
            for node, (path, score) in enumerate(zip(paths, scores, strict=True)):
                likely = draft.likely(own, path[-5:], suffix.WORTH / score)
                left_out += [score * p for p, token in likely if tree.child(node, token) is None]
            assert max(left_out, default=0.0) <= scores[-1] + 1e-9
            assert len(tree) == draft.nodes(30) or not left_out

    def test_a_match_that_is_too_short_is_not_believed(self) -> None:
        believing, doubting = (Suffix(UNUSED, DRAFT.new("suffix", max_match=4, min_match=n)) for n in (1, 2))
        text = [1, 2, 3, 1]
        assert tree_of(believing, row_of(believing, text), 2).tokens[:2] == [1, 2]
        assert tree_of(doubting, row_of(doubting, text), 2).tokens == [1]

    def test_what_requests_said_is_shared_with_those_after_them_and_with_no_other_engine(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(suffix, "SHARED_TOKENS", 50)
        config = DRAFT.new("suffix", max_match=4, min_match=1, cross_request=True)
        first, second = Suffix(UNUSED, config), Suffix(UNUSED, config)
        row_of(first, [40, 41, 50], [51, 52])
        assert tree_of(first, row_of(first, [9, 50]), 2).tokens == [50, 51]  # a third is too unlikely: 1/9 of 1/9
        assert tree_of(first, row_of(first, [9, 40]), 2).tokens == [40], "a prompt is not shared"
        assert tree_of(second, row_of(second, [9, 50]), 2).tokens == [50]
        for start in range(100, 1000, 10):
            row_of(first, [start, start], range(start, start + 9))
        assert first.cross_request is not None and sum(first.cross_request.totals.values()) <= 4 * 50
        assert tree_of(first, row_of(first, [9, 50]), 2).tokens == [50], "forgotten"


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Llama:
    """Late layers matter more than in the file, and no token ends a text."""
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    for layer in model.layers[3:]:
        layer.out *= 8
        layer.down *= 8
    return model


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(6)
    return [Request(tuple(rng.choices(range(80), k=n)), 40, ignore_eos=True) for n in (3, 12, 30, 7)]


def decoded(draft: Draft, requests: Sequence[Request], k: int, rows: int) -> list[Completion]:
    """Through the real loop, after which every layer must hold every verified token."""
    model = draft.model
    target = Target(model, model.shape.layers, model.norm)
    cache = Checked(model.new_cache(42 + 30 + draft.nodes(k), rows, draft.layers), model.shape.layers)
    speculation = Speculation(target, draft, Gate(), Controller(k), LongestPrefix())
    return Scheduler(speculation, cache.cache).run(requests)


class Checked:
    """A cache whose integrity is looked at whenever a row leaves."""

    def __init__(self, cache: KVCache, layers: int) -> None:
        self.cache, evict = cache, cache.evict

        def checked(row: int) -> None:
            caches.check(cache, layers)
            evict(row)

        cache.evict = checked  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def plain(model: Llama, requests: list[Request]) -> list[Completion]:
    return decoded(Draft(model), requests, 0, 1)


def corpus(model: Llama, requests: Sequence[Request], plain: Sequence[Completion]) -> Head:
    """As the fit stage makes it, by way of its bytes."""
    traces = [
        trace(model, request.tokens, answer.tokens, None) for request, answer in zip(requests, plain, strict=True)
    ]
    return DRAFT.new("suffix", max_match=5, min_match=1, corpus=True).fit(model, *split(traces * 5), 0)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("name", ["suffix", "suffix corpus", "suffix chain"])
def test_tokens_are_those_of_plain_decoding(
    model: Llama, requests: list[Request], plain: list[Completion], name: str, k: int, rows: int
) -> None:
    draft: Draft
    match name:
        case "suffix":
            draft = SUFFIX.make(model, None)
        case "suffix corpus":
            config = DRAFT.new("suffix", max_match=5, min_match=1, width=3, budget=9, corpus=True)
            draft = config.make(model, corpus(model, requests[:2], plain[:2]))
        case _:
            draft = DRAFT.new("suffix", max_match=5, min_match=1).make(model, None)
    got = decoded(draft, requests, k, rows)
    assert [c.tokens for c in got] == [c.tokens for c in plain]
    cycles: list[Cycle] = [cycle for completion in got for cycle in completion.cycles]
    assert 0 < sum(c.accepted for c in cycles) < sum(c.proposed for c in cycles), "else nothing is proven"
    assert max(c.batch for c in cycles) == rows
    assert all(c.depth <= c.k_asked <= k and c.proposed < draft.nodes(k) for c in cycles)


def test_a_corpus_foretells_its_own_answers(model: Llama, requests: list[Request], plain: list[Completion]) -> None:
    head = corpus(model, requests, plain)
    assert head.facts["agreement"] > 0.9 and len(head.facts["agreement_by_position"]) == 5
    tokens = [token for answer in plain for token in answer.tokens]
    lengths = head.tensors["corpus_lengths"].tolist()
    assert lengths == [1 + len(answer.tokens) for answer in plain] * 5 and len(head.tensors["corpus"]) == sum(lengths)
    assert set(head.tensors["corpus"].tolist()) >= set(tokens)
    draft = DRAFT.new("suffix", max_match=5, min_match=1, width=2, budget=9, corpus=True).make(model, head)
    knowing = sum(len(c.cycles) for c in decoded(draft, requests, 9, 1))
    blank = DRAFT.new("suffix", max_match=5, min_match=1, width=2, budget=9).make(model, None)
    assert knowing < 0.7 * sum(len(c.cycles) for c in decoded(blank, requests, 9, 1))
