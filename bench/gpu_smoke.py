"""Do the kernels run here, and which of several ways is faster? A line of JSON each, in seconds, without any row."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import eefast
from eefast import ops, zoo
from eefast.measure.timing import mean_seconds
from eefast.planning.fusing import FusedConv

LEAST_SECONDS = 0.02
Shape = tuple[int, int, int, int]

HEADS: dict[str, tuple[Shape, int]] = {"cuda": ((256, 256, 56, 56), 1000), "cpu": ((3, 8, 5, 5), 7)}
"""Shape of the features, and classes."""

CONVOLUTIONS: dict[str, tuple[tuple[Shape, int, int, int], ...]] = {
    "cuda": (
        ((256, 3, 224, 224), 64, 7, 2),
        ((256, 64, 56, 56), 256, 1, 1),
        ((256, 64, 56, 56), 64, 3, 1),
        ((80, 512, 7, 7), 512, 3, 1),
    ),
    "cpu": (((2, 3, 9, 9), 4, 7, 2), ((2, 4, 5, 5), 8, 1, 1)),
}
"""Shape of the features, outputs, kernel, stride."""


def versions(device: str) -> Iterator[dict[str, Any]]:
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "system": platform.release()}
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    missing = {"C++": ops.CPP_MISSING, "CUDA": ops.CUDA_MISSING, "Triton": ops.TRITON_MISSING}
    yield {**found, "python": platform.python_version(), "device": gpu, "missing": missing}


def resident(device: str) -> Iterator[dict[str, Any]]:
    """One forward of the resident engine beside the network itself."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    net = zoo.eenet("eenet20", 3, "fine", "pool", input_shape=(3, 32, 32)).eval().to(device)
    x = torch.randn(65, 3, 32, 32, device=device)
    net.thresholds.fill_(0.5)
    found, wanted = eefast.accelerate(net, engine="resident", dtype=dtype)(x.to(dtype)), net(x)
    same = found.exit_index == wanted.exit_index
    error = float((found.logits - wanted.logits)[same].abs().max() / wanted.logits.abs().max()) if same.any() else None
    yield {"same exits": float(same.float().mean()), "largest error of logits": error}


def heads(device: str) -> Iterator[dict[str, Any]]:
    """An exit with many classes: our kernels, and pooling before them."""
    (n, c, h, w), classes = HEADS[device]
    dtype = torch.float16 if device == "cuda" else torch.float32
    x = torch.randn(n, c, h, w, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(classes + 1, c, device=device), torch.zeros(classes + 1, device=device)
    rows, live = torch.arange(n, device=device, dtype=torch.int32), torch.full((1,), n, device=device).int()
    results = torch.zeros(n, classes, device=device), torch.zeros(n, device=device)
    exits, threshold = torch.zeros(n, device=device, dtype=torch.int64), torch.tensor(0.5, device=device)

    def head(run: Callable[..., Any], features: Tensor) -> Any:
        return run(features, weight, bias, threshold, rows, rows, live, "max_probability", 0, *results, exits)

    def pooled(run: Callable[..., Any]) -> Any:
        return head(run, x.mean((2, 3), keepdim=True, dtype=torch.float32))

    ways: dict[str, Callable[[], Any]] = {
        "exit_head": partial(head, ops.exit_head.run, x),
        "mean, exit_head": partial(pooled, ops.exit_head.run),
    }
    if device == "cuda" and not ops.CUDA_MISSING:
        ways["exit_head, CUDA C++"] = partial(head, torch.ops.eefast.exit_head_cuda.default, x)
    for name, call in ways.items():
        yield {"way": name, "classes": classes, "features": [n, c, h, w], "milliseconds": milliseconds(call, device)}


def convolutions(device: str) -> Iterator[dict[str, Any]]:
    """Each in one kernel and apart, by cuDNN's heuristics and by its fastest algorithm."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    before = torch.backends.cudnn.benchmark
    for (n, c, h, w), outputs, kernel, stride in CONVOLUTIONS[device]:
        x = torch.randn(n, c, h, w, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        plain = torch.nn.Conv2d(c, outputs, kernel, stride, kernel // 2).to(device, dtype)
        plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        conv, times = FusedConv(plain, relu=True), {}
        for fastest in (False, True):
            torch.backends.cudnn.benchmark = fastest
            for conv.in_one_kernel in (True, False):
                name = f"{'one kernel' if conv.in_one_kernel else 'apart'}{', fastest' if fastest else ''}"
                times[name] = milliseconds(partial(conv, x), device)
        torch.backends.cudnn.benchmark = before
        yield {"features": [n, c, h, w], "outputs": outputs, "kernel": kernel, "milliseconds": times}


def milliseconds(call: Callable[[], Any], device: str) -> float:
    call()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return round(1e3 * mean_seconds(call, LEAST_SECONDS, wait), 4)


PARTS: tuple[Callable[[str], Iterator[dict[str, Any]]], ...] = (versions, resident, heads, convolutions)


@torch.no_grad()
def smoke(device: str) -> bool:
    """Whether every part ran; one that fails says so in its line, and the others run."""
    good = True
    for part in PARTS:
        try:
            for found in part(device):
                print(json.dumps({part.__name__: found}), flush=True)
        except Exception as error:  # whatever a GPU finds
            good = False
            traceback.print_exc()
            print(
                json.dumps({part.__name__: {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}}), flush=True
            )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same on small shapes")
    return 0 if smoke(parser.parse_args().device) else 1


if __name__ == "__main__":
    sys.exit(main())
