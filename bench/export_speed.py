"""An exported package in C++ beside the resident engine in Python, in turn, one thread → images per second of both."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import eefast
from eefast.data.mnist import mnist_test

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=7, help="processes in C++, Python measured after each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = eefast.load(f"{eefast.__path__[0]}/assets/eenet-mnist")
    images = net.prepare(mnist_test()[0][: max(options.images)])
    fast = eefast.accelerate(net, engine="resident", frozen=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        eefast.export(net, folder / "out", format="aoti")
        program = build(folder / "build")
        for n in options.images:
            x, calls = images[:n].contiguous(), max(20, 2000 // n)
            x.numpy().tofile(folder / "images")
            command = [str(program), str(folder / "out"), str(folder / "images"), str(calls)]
            result = fast(x)
            cpp, python = [], []
            for _ in range(options.rounds):
                done = subprocess.run(
                    command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
                )
                pairs = zip(result.labels.tolist(), result.exit_index.tolist(), strict=True)
                assert done.stdout.split() == [str(number) for pair in pairs for number in pair], "other answers in C++"
                cpp.append(statistics.median(map(float, done.stderr.split())))
                python.append(seconds(fast, x, calls))
            a, b = n / statistics.median(cpp), n / statistics.median(python)
            print(f"{n:4} images a call: C++ {a:,.0f} images/s, Python {b:,.0f}, ratio {a / b:.3f}", flush=True)


def build(folder: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    source = ["-S", str(ROOT / "examples" / "cpp"), "-B", str(folder), f"-DTORCH={torch_folder}"]
    for words in ([*source, "-DCMAKE_BUILD_TYPE=Release"], ["--build", str(folder)]):
        subprocess.run(["cmake", *words], check=True, capture_output=True)
    return folder / "run_package"


def seconds(fast: eefast.Accelerated, x: torch.Tensor, calls: int) -> float:
    found = []
    for _ in range(calls):
        begin = time.perf_counter()
        fast(x)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


if __name__ == "__main__":
    main()
