"""policy: which drafted tokens stand."""

import pytest
import torch
import torch.nn.functional as F

from selfspec.config import Policy
from selfspec.engine.policy import longest_prefix, make


@pytest.mark.parametrize(
    ("drafted", "wanted", "accepted"),
    [
        ([], [7], 0),
        ([3], [3, 7], 1),
        ([3], [4, 7], 0),
        ([3, 5, 2], [3, 5, 2, 7], 3),
        ([3, 5, 2], [3, 5, 4, 7], 2),
        ([3, 5, 2], [4, 5, 2, 7], 0),  # what comes after a wrong token never stands
        ([3, 5, 2], [3, 4, 2, 7], 1),
        ([3, 3, 3], [3, 3, 7, 3], 2),
        ([0, 0], [0, 0, 0], 2),
    ],
)
def test_longest_prefix(drafted: list[int], wanted: list[int], accepted: int) -> None:
    logits = F.one_hot(torch.tensor(wanted), 8).float()
    verdict = longest_prefix(drafted, logits)
    assert verdict == (accepted, wanted[accepted])
    assert isinstance(verdict.token, int)


def test_of_equal_logits_the_first_is_wanted_as_in_plain_decoding() -> None:
    logits = torch.zeros(2, 8)
    logits[:, [2, 5]] = 1
    assert longest_prefix([2], logits) == (1, 2)
    assert longest_prefix([5], logits) == (0, 2)


def test_a_config_asks_for_it_by_name() -> None:
    assert make(Policy()) is longest_prefix
