"""A stage with its head, in PyTorch and in installed libraries, gives the features and what the head's linear reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from runtime_stages import INSTALLED, Fake, in_a_library, stage
from torch import Tensor, nn

import eefast
from eefast import zoo
from eefast.engines.chunks import Kept
from eefast.heads import ExitHead
from eefast.planning import stage_runtimes
from eefast.planning.folding import fold_stage
from eefast.planning.stage_runtimes import Chosen, HeadBody, chosen
from eefast.runtimes import RUNTIMES, StageAndHead

SIZE, AFTER = (3, 10, 14), (4, 5, 7)
KINDS = ("pool", "conv1", "plain", "depthwise")


def head(kind: str) -> ExitHead:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return ExitHead(kind, AFTER, 5, (3, *AFTER[1:])).eval()


def body(kind: str) -> HeadBody:
    convs = head(kind).convs
    return HeadBody(convs, fold_stage(convs, torch.float32)[0], kind == "plain")


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runtimes, "choices", {})
    monkeypatch.setattr(stage_runtimes, "times", {})
    monkeypatch.setattr(stage_runtimes, "hung", {})


def choose(asked: str, kind: str = "conv1") -> Chosen:
    made = stage("residual")
    folded, note = fold_stage(made, torch.float32)
    given = images(2, SIZE), torch.channels_last, asked, False
    return chosen(made, Chosen(folded, note), *given, head=body(kind))


def assert_as_the_head(made: nn.Module, x: Tensor, kind: str) -> None:
    """Beside the layers in float64, one after the other."""
    features, seen = made(x)
    exact, layers = stage("residual").double()(x.double()), head(kind).double()
    maps = layers.convs(exact)
    wanted = maps.permute(0, 2, 3, 1).flatten(1) if kind == "plain" else maps.mean((2, 3))
    assert seen.shape == (*wanted.shape, 1, 1)
    for got, part in ((features, exact), (seen[:, :, 0, 0], wanted)):
        largest = float(part.abs().max()) if part.numel() else 0.0
        torch.testing.assert_close(got.double(), part, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_in_pytorch(kind: str) -> None:
    made = body(kind).after(fold_stage(stage("residual"), torch.float32)[0])
    assert_as_the_head(made, images(3, SIZE), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_in_libraries(name: str, kind: str) -> None:
    made = choose(name, kind).stage
    assert stage_runtimes.has_head(made)
    for n in (0, 1, 3, 31):
        assert_as_the_head(made, images(n, SIZE), kind)


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_nan_stays_nan(name: str) -> None:
    x = images(7, SIZE)
    x[2], x[5, 1, 3, 3] = torch.nan, torch.nan
    for part in choose(name).stage(x):
        assert part.isnan().flatten(1).any(1).tolist() == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("kind", ["pool", "conv1", "strided2"])
@pytest.mark.parametrize("name", INSTALLED)
def test_whole_networks(name: str, kind: str) -> None:
    net = lived_in(zoo.eenet("eenet8", 2, input_shape=SIZE, num_classes=7, head=kind), 0)
    x = images(31, SIZE)
    spread_thresholds(net, x, 0.3)
    fast = eefast.accelerate(net, stages=name)
    assert all(step.with_head for step in fast.engine.steps)  # type: ignore[attr-defined]
    assert fast.plan.stages[0].kernel == "C++ (linear)"
    expected = one_by_one(net, x)
    for n in (0, 1, 3, 31):
        assert_same_answers(fast(x[:n]), type(expected)(*(part[:n] for part in expected)), net)
    streamed = torch.cat([result.exit_index for result in fast.stream([x[:9], x[9:]])])
    assert torch.equal(streamed, fast(x).exit_index)


@pytest.fixture
def only_fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def offer(fake: Fake) -> None:
        for name in list(RUNTIMES):
            monkeypatch.delitem(RUNTIMES, name)
        monkeypatch.setitem(RUNTIMES, "fake", fake)

    return offer


def test_a_library_that_cannot_run_the_head_runs_the_stage(only_fake: Any) -> None:
    def alone(made: nn.Module, x: Tensor) -> Tensor:
        if isinstance(made, StageAndHead):
            raise NotImplementedError("no such head")
        out: Tensor = made(x)
        return out

    only_fake(Fake(alone))
    found = choose("fake")
    assert not stage_runtimes.has_head(found.stage)
    assert "left out" not in found.note


def test_a_wrong_head_is_noticed(only_fake: Any) -> None:
    def wrong(made: nn.Module, x: Tensor) -> Any:
        return (made(x)[0], made(x)[1] * 1.01) if isinstance(made, StageAndHead) else made(x)

    only_fake(Fake(wrong))
    assert not stage_runtimes.has_head(choose("fake").stage)


@torch.no_grad()
def test_features_are_in_the_memory_that_was_given() -> None:
    whole = body("conv1").after(fold_stage(stage("residual"), torch.float32)[0])
    made, kept, x = in_a_library(whole, images(2, SIZE)), Kept(), images(5, SIZE)
    features, seen = made(x, lambda shape, dtype: kept.map("a", shape, dtype, torch.device("cpu")))
    assert features.data_ptr() == kept.maps["a"].data_ptr()
    for got, wanted in zip((features, seen), whole(x), strict=True):
        assert torch.equal(got, wanted)
