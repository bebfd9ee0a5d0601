"""Rules in Python: exit_in_python beside the op, and whole networks in the engines that call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rule_cases import agreeing_outputs, as_images, speaking_network
from torch import Tensor

import eefast
from eefast import ops, rules
from eefast.criteria import carry
from eefast.engines.python_exits import exit_in_python
from eefast.result import concatenated

TABLE = rules.vote([1.0, 1.5, 2.0]).table()


def voted(exit_index: int, logits: Tensor, row: Tensor, before: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    return carry(logits, row, TABLE[exit_index], before, confidence)


def most_votes(exit_index: int, logits: Tensor, row: Tensor, votes: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Votes of all exits so far are the answer: no table of nine numbers says that."""
    votes = votes if exit_index else torch.zeros_like(votes)
    votes = votes + torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])
    return votes, votes.amax(1)


@pytest.mark.parametrize("threshold", [torch.tensor(0.6), torch.tensor([0.6, -9.0, torch.nan] * 9), None])
def test_one_exit_writes_and_returns_what_the_op_does(threshold: Tensor | None) -> None:
    r = torch.Generator().manual_seed(0)
    features, linear = torch.randn(31, 5, 3, 2, generator=r), (torch.randn(5, 5, generator=r), torch.zeros(5))
    entries = torch.randperm(31, generator=r)[:20].int(), torch.randperm(27, generator=r)[:20].int()
    found = []
    for place in range(2):
        results = torch.ones(27, 4), torch.ones(27), torch.full((27,), -7)
        live = torch.tensor([17]).int()
        given = linear, threshold, features, (*entries, live), results
        if place == 0:
            back = exit_in_python(voted, 1, *given)
        else:
            back = ops.exit_head.run(
                features, *linear, threshold, *entries, live, "carried", 1, *results, TABLE[1].contiguous()
            )
        survivors = int(back[2])
        found.append((*results, back[2], back[0][:survivors], back[1][:survivors]))
        assert back[0].shape == back[1].shape == (20,)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert threshold is None or 0 < survivors < 17


@pytest.mark.parametrize("engine", ["reference", "compact", "auto"])
def test_networks_answer_by_a_rule_in_python(engine: str) -> None:
    outputs = agreeing_outputs(67, 4, 5)
    net = speaking_network(4, 5, rules.PythonRule("most votes", most_votes), [1.5] * 3)
    fast, x = eefast.accelerate(net, engine=engine), as_images(outputs)
    answer = fast(x)
    for image, taken, votes in zip(outputs, answer.exit_index.tolist(), answer.logits, strict=True):
        classes = image[: taken + 1, :-1].argmax(1)
        counts = torch.bincount(classes, minlength=5)
        assert votes.tolist() == counts.tolist()
        assert taken == 3 or counts.max() == 2
        assert torch.bincount(classes[:-1], minlength=5).max() < 2
    streamed = concatenated(list(fast.stream(x.split(9))))
    assert all(map(torch.equal, streamed, answer))
    assert len(answer.exit_index.unique()) == 3


def test_the_resident_engine_says_why_it_does_not(caplog: pytest.LogCaptureFixture) -> None:
    net = speaking_network(3, 5, rules.PythonRule("most votes", most_votes), [1.5] * 2)
    with pytest.raises(ValueError, match="criterion 'most votes' is a rule in Python, which its kernels do not call"):
        eefast.accelerate(net, engine="resident")
    plan = eefast.accelerate(net).plan
    assert (plan.engine, plan.stages[0].kernel) == ("compact", "Python")
    assert "criterion 'most votes' is a rule in Python" in plan.reason


def test_another_rule_in_python_holds_from_the_next_call_on() -> None:
    net, x = speaking_network(3, 5, rules.PythonRule("mine", voted), [0.5] * 2), as_images(agreeing_outputs(31, 3, 5))
    fast = eefast.accelerate(net, engine="compact")
    before = fast(x)
    net.criterion = rules.PythonRule("mine", most_votes).criterion
    assert not torch.equal(fast(x).logits, before.logits)
    assert torch.equal(fast(x).logits, net(x).logits)


def test_what_a_rule_in_python_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name='vote' is another rule's; take one that is free"):
        rules.PythonRule("vote", voted)
    net = eefast.zoo.eenet("eenet8", 2, filters=2, input_shape=(1, 8, 8)).eval()
    mine = rules.PythonRule("mine", lambda i, logits, row, before, s: (logits[:, :1], s), 0.25)
    net = net.with_criterion(mine)
    assert (net.exit_rule, net.thresholds.tolist(), net.state_dict().get("rule")) == (mine, [0.25] * 2, None)
    assert net.with_criterion("mine").exit_rule == mine
    with pytest.raises(ValueError, match="criterion='mine' is a rule in Python, which no folder holds"):
        net.save(tmp_path)
    with pytest.raises(ValueError, match=r"the rule returns \[3, 1\] and \[3\] at exit 0; expected logits \[3, 10\]"):
        net(torch.zeros(3, 1, 8, 8))
