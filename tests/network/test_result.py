"""Answers of a batch: probabilities, classes, and parts put together."""

import pytest
import torch

from eefast.result import ExitResult, concatenated


def answers(*rows: int) -> ExitResult:
    """One row of answers per number, which says which."""
    n = torch.tensor(rows, dtype=torch.float32)
    return ExitResult(torch.stack([n, -n, 2 * n - 3], dim=1), torch.tensor(rows), n / 10, n / 100)


def test_probabilities_and_classes_follow_from_the_logits():
    found = answers(0, 1, 4)
    assert found.labels.tolist() == [0, 0, 2]
    torch.testing.assert_close(found.probs.sum(1), torch.ones(3))
    torch.testing.assert_close(found.probs.log() - found.logits, (-found.logits.logsumexp(1))[:, None].expand(3, 3))


def test_an_empty_batch_has_no_answers():
    none = ExitResult(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))
    assert none.labels.shape == (0,)
    assert none.probs.shape == (0, 3)


@pytest.mark.parametrize("parts", [[(0, 1, 4)], [(0,), (1, 4)], [(), (0, 1), (4,), ()]], ids=["one", "two", "empty"])
def test_parts_become_the_whole_in_their_order(parts):
    found = concatenated([ExitResult(*(part[list(rows)] for part in answers(*range(5)))) for rows in parts])
    assert all(torch.equal(a, b) for a, b in zip(found, answers(0, 1, 4), strict=True))
