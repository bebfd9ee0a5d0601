"""OpenVINO's requests: shared memory, one for each thread that calls at a time."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import images
from torch import nn

from eefast.runtimes import openvino_requests


class Request:
    """shape: of the model that it is of, None for any number of images."""

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        self.shape, self.busy = shape, False

    def set_input_tensor(self, tensor: Any) -> None:
        self.read = tensor

    def set_output_tensor(self, number: int, tensor: Any) -> None:
        assert number == 0
        self.written = tensor

    def infer(self) -> None:
        assert not self.busy
        assert self.shape == (self.read.shape if len(self.read) == 1 else None)
        self.busy = True
        together.wait()
        self.written[...] = self.read + 1
        self.busy = False


together = threading.Barrier(2)


@pytest.mark.parametrize("number", [1, 4])
def test_threads_have_requests_of_their_own_which_are_used_again(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    made: list[Request] = []

    def compiled(model: bytes, threads: int, shape: tuple[int, ...] | None = None) -> Any:
        def new() -> Request:
            made.append(Request(shape))
            return made[-1]

        return SimpleNamespace(create_infer_request=new)

    def tensor(array: Any, shared_memory: bool) -> Any:
        assert shared_memory
        return array

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=tensor))
    monkeypatch.setattr(openvino_requests, "compiled_model", compiled)
    monkeypatch.setattr(openvino_requests, "onnx_stage", lambda stage, example: (b"", [torch.Size((3, 5, 7))]))
    stage = openvino_requests.OpenVino().build(nn.Identity(), images(2, (3, 5, 7)), 1)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(3):
            x = images(number, (3, 5, 7), seed + i)
            if not torch.equal(stage(x), x + 1):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(made) == 2
