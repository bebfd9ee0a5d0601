"""A request gets one answer or error, the first one; which requests fit together."""

import pytest
import torch

from eefast.serving.request import Request

LOGITS = torch.tensor([0.0, 1.0])


def made(engine="e", shape=(1, 1, 2, 2), dtype=torch.float32, **words):
    return Request(engine, torch.zeros(shape, dtype=dtype), torch.zeros(1), 1.0, **words)


def test_an_answer_says_how_long_it_took():
    request = made(deadline=6.0)
    request.began = 3.0
    request.answer(LOGITS, 1, 2, 0.5, 0.25, 6.5)
    answer = request.future.result(0)
    assert answer[2:] == (2, 0.5, 0.25, 2.0, 3.5, True)
    request.answer(LOGITS, 0, 0, 0.0, 0.0, 9.0)
    request.fail(ValueError("too late"))
    assert request.future.result(0) is answer


def test_a_cancelled_request_takes_no_answer():
    request = made()
    assert request.future.cancel()
    request.answer(LOGITS, 1, 2, 0.5, 0.25, 6.5)
    request.fail(ValueError("after all"))
    assert request.future.cancelled()


@pytest.mark.parametrize("other", [{"engine": "f"}, {"shape": (1, 1, 2, 3)}, {"dtype": torch.uint8}])
def test_what_differs_cannot_be_in_one_batch(other):
    assert made().alike(made(deadline=3.0))
    assert not made().alike(made(**other))
