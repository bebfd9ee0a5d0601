"""Stages in installed libraries answer as PyTorch, for every batch and image size, from any number of threads."""

from __future__ import annotations

import threading

import pytest
import torch
from networks import images
from runtime_stages import INSTALLED, STAGES, stage
from torch import Tensor

from eefast.planning.folding import fold_stage
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

    def run(x: Tensor, out: Tensor) -> None:
        assert x.is_contiguous()
        calls.append(tuple(x.shape))
        out.copy_(x[:, :2] + 1)

    made = RuntimeStage(run, torch.nn.Conv2d(3, 2, 1), torch.zeros(2, 3, 5, 7), (2, 5, 7))
    x = torch.rand(4, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    assert torch.equal(made(x), x[:, :2] + 1)
    for other in (x[:0], x[:, :, 1:], x.double()):
        folded = made.folded.to(other.dtype)
        assert torch.equal(made(other), folded(other))
    assert calls == [(4, 3, 5, 7)]
