"""Networks tried before planning: stages that no engine could run as the network does, named; what counts as equal."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import Stage, assert_same_answers, images, lived_in, one_by_one
from odd_networks import ENGINES, SHAPE, assert_answers_or_refusal, conv, layers, network
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast.heads import ExitHead
from eefast.planning import planner, probe, trial
from eefast.planning.errors import UnsupportedError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    planner.log_once.cache_clear()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def hooked(register: str) -> nn.Module:
    stage = nn.Sequential(conv(), nn.ReLU())
    hook = (lambda m, args: (args[0] * 2,)) if "pre" in register else (lambda m, args, out: out * 2)
    getattr(stage[0], register)(hook)
    return stage


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch statistics": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False)),
        "stage 1 has BatchNorm2d '1' without running statistics, so that its answers depend on the whole batch",
    ),
    "functional batch statistics": (
        lambda: Stage(lambda s, x: F.batch_norm(s.conv(x), None, None, training=True), **layers()),
        "stage 1 answers differently for an image alone, so it depends on the whole batch",
    ),
    "mean of the batch": (
        lambda: Stage(lambda s, x: s.conv(x - x.mean(0)), **layers()),
        "stage 1 answers differently for an image alone, so it depends on the whole batch",
    ),
    "random": (
        lambda: Stage(lambda s, x: s.conv(F.dropout(x, 0.5, True)), **layers()),
        "stage 1 answers differently when it is called again",
    ),
    "stateful": (Counting, "stage 1 answers differently when it is called again"),
    "hook": (
        partial(hooked, "register_forward_hook"),
        "stage 1 has Conv2d '0' with a forward hook, which only the reference engine calls",
    ),
    "pre-hook": (partial(hooked, "register_forward_pre_hook"), "stage 1 has Conv2d '0' with a forward hook"),
    "no view": (
        lambda: nn.Sequential(Stage(lambda s, x: s.conv(x).view(len(x), -1).view_as(x), **layers())),
        "stage 1: on channels-last maps in float32 its copy in '0': RuntimeError: view size is not compatible",
    ),
}


@pytest.mark.parametrize("engine", ["compact", "resident"])
@pytest.mark.parametrize("name", REFUSED)
def test_stages_that_only_the_reference_engine_answers_are_refused_by_name(name: str, engine: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"^engine='{engine}' cannot run: .*; use engine='") as refusal:
        eefast.accelerate(network(make()), engine=engine)
    assert reason in str(refusal.value) or (name, engine) == ("no view", "resident")


@pytest.mark.parametrize("name", REFUSED)
def test_stages_that_only_the_reference_engine_answers_are_logged_once(name: str, caplog: Any) -> None:
    make, reason = REFUSED[name]
    net, x = network(make()), images(5, SHAPE)
    with caplog.at_level(logging.WARNING, "eefast"):
        for _ in range(2):
            fast = eefast.accelerate(net)
    assert [r.message for r in caplog.records if reason in r.message] == [caplog.records[-1].message]
    assert fast.plan.engine == "reference"
    if name not in ("random", "stateful"):
        with torch.no_grad():
            torch.testing.assert_close(fast(x).logits, net(x).logits)


def test_an_exception_in_the_stage_itself_names_its_module() -> None:
    """The constant meets another dtype; the reference engine then says so at the call, as the network does."""
    inner = Stage(lambda s, x: F.conv2d(x, s.conv.weight.bfloat16()), conv=nn.Conv2d(8, 8, 1))
    net = network(nn.Sequential(nn.ReLU(), inner))
    said = "(Input type|expected scalar type)"  # by which of PyTorch's convolutions is tried first
    with pytest.raises(ValueError, match=rf"cannot run: stage 1 in '1': RuntimeError: {said}"):
        eefast.accelerate(net, engine="compact")
    fast = eefast.accelerate(net)
    with pytest.raises(RuntimeError, match=said):
        fast(images(2, SHAPE))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.flatten(1), r"stage 1 returns shape \[2, 504\], not maps \[N, C, H, W\]"),
        (lambda x: (x, x), "stage 1 returns a tuple, not a tensor with a row for each image"),
        (lambda x: x[0], r"stage 1 returns shape \[8, 9, 7\], not a tensor with a row for each image"),
    ],
    ids=["flat", "a tuple", "one row"],
)
def test_answers_that_are_no_maps(answer: Callable[[Tensor], Any], message: str) -> None:
    net = network(conv())
    net.stages[1] = Stage(lambda s, x: answer(x)).eval()
    with pytest.raises(UnsupportedError, match=f"^{message}$"):
        trial.expected(net, probe.images(net))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_what_engines_must_answer_is_computed_in_float32_or_more(dtype: torch.dtype) -> None:
    net = network(conv()).to(dtype)
    x = probe.images(net)
    found = trial.expected(net, x)
    exact = copy.deepcopy(net).double()
    wanted = exact.all_exits(x[: trial.IMAGES].double())
    for part, out in zip(found, wanted, strict=True):
        assert part.rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        rows = torch.cat([out.logits, out.confidence_logit[:, None]], 1)
        torch.testing.assert_close(part.rows.double(), rows.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1].seen, found[0].features)


class TestModes:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_a_part_left_in_training_mode_is_refused(self, engine: str) -> None:
        net = network(conv())
        net.heads[1].classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 5))
        with pytest.raises(ValueError, match=r"exit 1 has parts in training mode .*\(Dropout, Linear, Seq"):
            eefast.accelerate(net, engine=engine)

    def test_in_eval_mode_and_where_the_mode_changes_nothing_it_is_not(self) -> None:
        net, x = network(conv()), images(5, SHAPE)
        net.heads[1].classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 5))
        net.eval()
        assert assert_answers_or_refusal(net, x, "auto") == ""
        net.stages[1] = conv()  # in training mode too, but it answers the same
        assert assert_answers_or_refusal(net, x, "compact") == "" or "Dropout" in repr(net)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_are_no_numbers_run_as_the_reference_does(engine: str) -> None:
    net, x = network(conv()), images(5, SHAPE)
    net.thresholds.fill_(0.0)
    with torch.no_grad():
        net.stages[1].weight[0] = torch.nan
    fast = eefast.accelerate(net, engine=engine)
    torch.testing.assert_close(fast(x).logits, net(x).logits, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_stages_without_arithmetic(name: str) -> None:
    """Their shares of the MACs are 0, not 0 ÷ 0."""
    heads = [ExitHead("bnpool", (4, 5, 7), 3, (4, 5, 7)) for _ in range(2)]
    net: Any = lived_in(eefast.EarlyExitNet([nn.Identity(), nn.Identity()], heads, input_shape=(4, 5, 7)), 3)
    x, fast = images(9, (4, 5, 7)), eefast.accelerate(net, engine=name)
    assert_same_answers(fast(x), one_by_one(net, x), net)
    assert [row.share for row in fast.plan.stages] == [0.0, 0.0]


NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize(
    ("got", "wanted", "reason"),
    [
        ([1.0, 2.0], [1.0, 2.0], ""),
        ([1.0, 2.1], [1.0, 2.0], ""),
        ([1.0, 2.3], [1.0, 2.0], "answers differ by 0.15 of the largest"),
        ([0.1, 2.0], [0.2, 2.0], ""),
        ([1e-8, 0.0], [0.0, 0.0], ""),
        ([1e-3, 0.0], [0.0, 0.0], "answers differ by 1e+03 of the largest"),
        ([NAN, INF], [NAN, INF], ""),
        ([NAN, 1.0], [1.0, 1.0], "answers differ by nan of the largest"),
        ([1.0, 1.0], [NAN, 1.0], "answers differ by nan of the largest"),
        ([-INF, 1.0], [INF, 1.0], "answers differ by inf of the largest"),
        ([1.0, 3.0], [INF, 1.0], "answers differ by inf of the largest"),
        ([1.0], [1.0, 2.0], "shape [1] instead of [2]"),
    ],
    ids=str,
)
def test_differences_of_a_tenth_of_the_largest_number_are_allowed(
    got: list[float], wanted: list[float], reason: str
) -> None:
    assert trial.difference(torch.tensor(got), torch.tensor(wanted), 0.1) == reason


def test_what_is_no_tensor_is_another_shape() -> None:
    assert trial.difference((1, 2), torch.zeros(2), 0.1) == "shape tuple instead of [2]"  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_in_another_dtype_may_round_but_not_compute_something_else(dtype: torch.dtype) -> None:
    stage, x = conv(), images(2, (8, 5, 4))
    wanted = stage(x).detach()
    copied = copy.deepcopy(stage).to(dtype)
    assert trial.mismatch(copied, x, wanted, dtype) == ""
    assert "answers differ by" in trial.mismatch(lambda y: copied(y) * 1.5, x, wanted, dtype)


def test_a_copy_gets_channels_last_features_which_it_may_write_to() -> None:
    x = images(2, (8, 5, 4))
    before, seen = x.clone(), []

    def writing(y: Tensor) -> Tensor:
        seen.append((y.dtype, y.is_contiguous(memory_format=torch.channels_last)))
        return y.mul_(2)

    assert trial.mismatch(writing, x, 2 * x, torch.float64) == ""
    assert seen == [(torch.float64, True)]
    assert torch.equal(x, before)


def test_what_a_copy_raises_is_why_it_does_not_run() -> None:
    failing = nn.Sequential(nn.Identity(), Stage(lambda s, x: x.view(-1, 3)))
    reason = trial.mismatch(failing, images(1, (8, 5, 4)), torch.zeros(1), torch.float16)
    assert reason.startswith("on channels-last maps in float16 its copy in '1': RuntimeError: ")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("dtype", "device", "allowed"),
    [
        (torch.float64, "cuda", 1e-3),
        (torch.float32, "cpu", 1e-3),
        (torch.float32, "cuda", trial.TF32),
        (torch.float16, "cpu", 0.25),
        (torch.float8_e5m2, "cpu", 0.25),
    ],
    ids=str,
)
def test_tolerances(dtype: torch.dtype, device: str, allowed: float) -> None:
    assert trial.tolerance(dtype, torch.device(device)) == allowed
