"""sampling: what tokens are drawn from, and by which numbers."""

from itertools import product

import pytest
import torch
from torch import Tensor

from selfspec.errors import StageError
from selfspec.speculation.sampling import Purpose, distribution, draw, likeliest, residual, uniform
from selfspec.types import Sampling


def by_the_book(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k, top-p in float64, by sorting everything, as transformers writes it."""
    x = logits.double() / sampling.temperature
    if sampling.top_k is not None:
        x[x < x.sort(descending=True).values[: sampling.top_k][-1]] = -torch.inf
    if sampling.top_p is not None:
        ascending = x.sort()
        dropped = ascending.values.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[-1] = False
        x[ascending.indices[dropped]] = -torch.inf
    return x.softmax(-1)


SAMPLINGS = [
    Sampling(temperature, top_k, top_p)
    for temperature, top_k, top_p in product((0.3, 1.5), (None, 1, 7, 1000), (None, 0.01, 0.5, 0.9, 0.999))
]


@pytest.mark.parametrize("vocab", [2, 40, 3000])
def test_temperature_top_k_and_top_p_are_those_of_the_book(vocab: int) -> None:
    random = torch.Generator().manual_seed(vocab)
    for spread, sampling in product((0.1, 1, 5), SAMPLINGS):
        logits = spread * torch.randn(vocab, generator=random)
        before = logits.clone()
        got, wanted = distribution(logits, sampling), by_the_book(logits, sampling)
        assert torch.equal(logits, before), "they are the caller's"
        assert got.dtype is torch.float32
        assert torch.equal(got > 1e-30, wanted > 1e-30), (spread, sampling)  # below, float32 runs out
        assert torch.allclose(got.double(), wanted, atol=1e-6)
        assert float(got.sum()) == pytest.approx(1, abs=1e-5)


def test_equals_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([1.0, 3, 2, 2, 0, 2]).bfloat16()
    assert (distribution(logits, Sampling(1, top_k=2)) > 0).tolist() == [False, True, True, True, False, True]
    assert (distribution(logits, Sampling(1, top_p=0.6)) > 0).tolist() == [False, True, True, True, False, True]
    assert (distribution(torch.zeros(9), Sampling(1, top_p=0.3)) > 0).all()


def test_all_of_the_probability_is_everything() -> None:
    logits = 9 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distribution(logits, Sampling(1, top_p=1.0)), distribution(logits, Sampling(1)))
    assert (distribution(torch.linspace(0, 1, 7), Sampling(1, top_p=1 - 1e-6)) > 0).all()


def test_a_token_that_is_ruled_out_stays_so() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0])
    assert distribution(logits, Sampling(0.7))[1] == 0
    assert distribution(logits, Sampling(0.7, top_k=3, top_p=0.999))[1] == 0


def test_a_low_temperature_goes_over_into_the_likeliest_token() -> None:
    logits = torch.tensor([1.0, 2.5, 2.0, 2.25]).bfloat16()
    largest = [float(distribution(logits, Sampling(t)).max()) for t in (1, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-30)]
    assert largest == sorted(largest)
    assert largest[-3:] == [1, 1, 1]
    assert distribution(logits, Sampling(1e-30)).tolist() == distribution(logits, Sampling(0)).tolist() == [0, 1, 0, 0]


def test_at_temperature_zero_the_first_of_equals_is_certain() -> None:
    assert distribution(torch.tensor([0.0, 5, 5, 1]), Sampling(0, top_k=3, top_p=0.5)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_is_the_first_of_equals(dtype: torch.dtype) -> None:
    logits = torch.randn(7, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)  # in bf16 ties abound
    wanted = [next(i for i, x in enumerate(row) if x == max(row)) for row in logits.tolist()]
    assert likeliest(logits) == wanted
    assert likeliest(logits[:0]) == []


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    assert [draw(p, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-52)] == [1, 1, 3, 3, 4, 4]
    assert [draw(0.001 * p, u) for u in (0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-52)] == [1, 1, 3, 3, 4, 4]
    assert draw(torch.ones(1), 0.5) == 0


def test_no_draw_leaves_the_support_however_large_the_vocabulary() -> None:
    logits = 4 * torch.randn(50_000, generator=torch.Generator().manual_seed(2))
    for sampling in (Sampling(1), Sampling(1, top_k=5), Sampling(1, top_p=0.7)):
        p = distribution(logits, sampling)
        for u in (0.0, 2**-52, 0.5, 1 - 2**-24, 1 - 2**-52):
            assert p[draw(p, u)] > 0


def test_residual_is_what_the_draft_has_left_out() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    assert residual(p, q).tolist() == pytest.approx([0.3, 0, 0.1])
    assert p.tolist() == pytest.approx([0.5, 0.3, 0.2]) and q.tolist() == pytest.approx([0.2, 0.7, 0.1])


def test_rounding_that_leaves_no_residual_leaves_the_target() -> None:
    p = torch.tensor([0.5, 0.25, 0.25])
    assert residual(p, p * (1 + 1e-6)).tolist() == p.tolist()


def test_numbers_are_uniform_and_a_function_of_where_they_are_used() -> None:
    seeds, positions = range(40), range(50)
    keys = [*product(seeds, positions, Purpose)]
    numbers = [uniform(*key) for key in keys]
    assert numbers == [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert all(0 <= u < 1 for u in numbers)
    x = torch.tensor(numbers, dtype=torch.float64)
    counts = torch.histc(x, 20, 0, 1)
    expected = len(keys) / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 50.8  # chi-squared, 19 degrees: one in ten thousand
    # Neighbours of every kind have nothing to do with each other, nor has a position that is drafted once more.
    table = x.view(len(seeds), len(positions), len(Purpose)) - 0.5
    again = torch.tensor([[uniform(*at, Purpose.draft, 1) for at in product([s], positions)] for s in seeds]) - 0.5
    for one, other in (
        *((table[1:], table[:-1]), (table[:, 1:], table[:, :-1]), (table[..., 1:], table[..., :-1])),
        *((again, table[..., 2]), (again[:, 1:], table[:, :-1, 2])),
    ):
        assert abs(float((one * other).mean())) < 4 * (1 / 12) / one.numel() ** 0.5
    assert uniform(0, 1, Purpose.draft, 2) != uniform(0, 1, Purpose.draft, 1) != uniform(0, 12, Purpose.draft)
    assert uniform(1, 1, Purpose.draft) != uniform(11, 1, Purpose.draft) != uniform(-1, 1, Purpose.draft)


def test_the_numbers_never_change() -> None:
    """They are part of what a seed means: answers drawn with one version are drawn again with the next."""
    assert uniform(0, 0, Purpose.target) == pytest.approx(0.810805198088121)
    assert uniform(2**32 - 1, 700, Purpose.draft, 3) == pytest.approx(0.04120481310724999)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spoilt", [{5: NAN}, {5: INF}, dict.fromkeys(range(48), NAN), dict.fromkeys(range(48), -INF)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_token_is_told_from_logits_that_are_not_finite(
    temperature: float, spoilt: dict[int, float], dtype: torch.dtype
) -> None:
    logits = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    likeliest(logits)
    for at, value in spoilt.items():
        logits[1, at] = value
    with pytest.raises(StageError, match=r"^logits are not finite: "):
        distribution(logits[1], Sampling(temperature))
    with pytest.raises(StageError, match=r"^logits are not finite: "):
        likeliest(logits)


def test_tokens_that_a_model_rules_out_are_no_mistake() -> None:
    logits = torch.tensor([[0.5, -INF, 2.0, -INF]])
    assert likeliest(logits) == [2]
    assert distribution(logits[0], Sampling(1.0)).tolist()[1::2] == [0, 0]
