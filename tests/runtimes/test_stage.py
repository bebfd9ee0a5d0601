"""Stages in installed libraries answer as PyTorch, for every batch and image size, from any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from networks import images
from runtime_stages import INSTALLED, STAGES, in_a_library, stage
from torch import Tensor

from eefast.planning import stage_runtimes
from eefast.planning.folding import fold_stage
from eefast.planning.stage_runtimes import Chosen
from eefast.runtimes import RUNTIMES, RuntimeStage

SIZE = (3, 10, 14)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    largest = float(wanted.abs().max()) if len(wanted) else 0.0
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("kind", STAGES)
@torch.no_grad()
def test_answers_are_those_of_float64(name: str, kind: str) -> None:
    made = RUNTIMES[name].build(fold_stage(stage(kind), torch.float32)[0], images(2, SIZE), 1)
    exact = stage(kind).double()
    for shape in ((0, *SIZE), (1, *SIZE), (3, *SIZE), (31, *SIZE), (3, 3, 16, 8)):
        x = images(shape[0], shape[1:])
        before = x.clone()
        for layout in (torch.contiguous_format, torch.channels_last):
            assert_close(made(x.contiguous(memory_format=layout)), exact(x.double()))
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_four_threads_at_once(name: str) -> None:
    made = RUNTIMES[name].build(fold_stage(stage("mobile"), torch.float32)[0], images(2, SIZE), 1)
    parts = images(4 * 23, SIZE).split(23)
    wanted = [made(x) for x in parts]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for n in (1, 23, 7) * 20:
                if not torch.allclose(made(parts[i][:n]), wanted[i][:n], rtol=0, atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_the_library_runs_one_size_and_pytorch_all_others() -> None:
    calls: list[tuple[int, ...]] = []

    def run(x: Tensor, written: Sequence[Tensor]) -> None:
        assert x.is_contiguous()
        calls.append(tuple(x.shape))
        written[0].copy_(x[:, :2] + 1)

    made = RuntimeStage(run, torch.nn.Conv2d(3, 2, 1), torch.zeros(2, 3, 5, 7), [(2, 5, 7)], "a library")
    x = torch.rand(4, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    assert torch.equal(made(x), x[:, :2] + 1)
    for other in (x[:0], x[:, :, 1:], x.double()):
        folded = made.folded.to(other.dtype)
        assert torch.equal(made(other), folded(other))
    assert calls == [(4, 3, 5, 7)]


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("kind", STAGES)
@torch.no_grad()
def test_nan_stays_nan(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runtimes, "choices", {})
    monkeypatch.setattr(stage_runtimes, "times", {})
    made = stage(kind)
    folded, note = fold_stage(made, torch.float32)
    found = stage_runtimes.chosen(made, Chosen(folded, note), images(2, SIZE), torch.channels_last, name, False).stage
    x = images(31, SIZE)
    x[3] = torch.nan
    x[7, 1, 2, 3] = torch.nan
    x[30, 2, 9, 13] = torch.inf
    before = x.clone()
    for rows in (x, x[3:4], x[30:], x[4:7]):
        wanted = folded(rows.contiguous(memory_format=torch.channels_last))
        got = found(rows)
        assert (got.isnan().flatten(2).any(2) >= wanted.isnan().flatten(2).any(2)).all()
        sound = ~rows.flatten(1).sum(1).isnan() & rows.flatten(1).isfinite().all(1)
        assert_close(got[sound], wanted[sound].double())
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_only_samples_with_nan_are_left_to_pytorch() -> None:
    folded = fold_stage(stage("residual"), torch.float32)[0]
    made = in_a_library(folded, images(2, SIZE))
    made.run = lambda features, written: written[0].copy_(folded(features.nan_to_num()))
    made.loses_nan = True
    x = images(5, SIZE)
    x[1], x[3, 0, 0, 0] = torch.nan, -torch.inf
    got = made(x)
    assert got[1].isnan().all()
    assert torch.equal(got[3:4].isnan(), folded(x[3:4]).isnan())
    assert_close(got[[0, 2, 4]], folded(x[[0, 2, 4]]).double())


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_lazily_negated_features(name: str) -> None:
    made = RUNTIMES[name].build(fold_stage(stage("residual"), torch.float32)[0], images(2, SIZE), 1)
    x = images(3, SIZE)
    assert_close(made(torch._neg_view(x)), stage("residual").double()(-x.double()))
