"""The resident op on one thread: every algorithm, section by section, against the peak of multiply-adds of one core."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from prepared import Network, network_on_noise
from progress import track
from rows import AlgorithmRow, CeilingRow, append, environment

from eefast import ops
from eefast.engines.program import ResidentProgram
from eefast.model import EarlyExitNet
from eefast.planning import packing, probe, tuning
from eefast.planning.lowering import lower

IMAGES, ROUNDS = 16, 9
NETWORKS = (
    Network("eenet20", (3, 32, 32), 10, (0.6, 0.28, 0.12)),
    Network("eenet110", (3, 32, 32), 10, (0.3, 0.15, 0.1, 0.08, 0.07, 0.06, 0.05, 0.05, 0.14)),
    Network("eenet32", (1, 28, 28), 10, (0.5, 0.5)),
)
# Logits of another network would be off by about the largest logit.
TOLERANCE = 1e-4


def peak() -> float:
    """Billions of float32 multiply-adds per second of one core, by a program compiled for this processor."""
    source = Path(__file__).with_name("fma_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        compiler = os.environ.get("CXX", "c++").split()
        subprocess.run([*compiler, "-O3", "-march=native", "-std=c++20", source, "-o", program], check=True)
        return float(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


@torch.no_grad()
def measure(network: Network) -> list[AlgorithmRow]:
    """All algorithms and groups, taking turns; raises `RuntimeError` where one is wrong."""
    net, images, _ = network_on_noise(network, IMAGES, IMAGES, "cpu", torch.float32)
    images, lowered = images.contiguous(), lower(net)
    exact = copy.deepcopy(net).double().plain()(images.double())
    limits, known = probe.thresholds(net, net.num_exits), {}  # type: ignore[var-annotated]
    choices = [(a, g) for a in tuning.ALGORITHMS for g in tuning.GROUPS]
    sections, seconds = len(lowered.sizes), {choice: [] for choice in choices}
    packed, errors = {}, {}
    for a, g in choices:
        packed[a, g] = packing.program(lowered, (a,) * sections, (g,) * sections, False, known)
        logits = run(net, packed[a, g], images, limits, torch.zeros(sections, dtype=torch.float64))
        errors[a, g] = float((logits - exact).abs().max() / exact.abs().max())
        if not errors[a, g] <= TOLERANCE:
            raise RuntimeError(f"{network.name} with algorithm {a} is off by {errors[a, g]:.2g} of the largest logit")
    for _ in range(ROUNDS):
        for choice in choices:
            own, begin = torch.zeros(sections, dtype=torch.float64), time.perf_counter()
            run(net, packed[choice], images, limits, own)
            seconds[choice].append((time.perf_counter() - begin, own.tolist()))
    rows = []
    for (a, g), found in seconds.items():
        whole = statistics.median(s for s, _ in found) / IMAGES * 1e6
        parts = tuple(statistics.median(s[i] for _, s in found) / IMAGES * 1e6 for i in range(sections))
        algorithm = f"F({a}×{a})" if a else "direct"
        rows.append(AlgorithmRow(str(network.name), algorithm, g, IMAGES, whole, parts, 0.0, errors[a, g]))
    return rows


def run(
    net: EarlyExitNet,
    program: ResidentProgram,
    images: torch.Tensor,
    limits: torch.Tensor,
    seconds: torch.Tensor,
) -> torch.Tensor:
    arguments = program.arguments(limits, net.criterion.name, net.num_classes)
    return ops.resident_forward.run(images, *arguments, 1, seconds)[0]


def multiply_adds(network: Network) -> int:
    """Of all convolutions up to the final exit, for one image."""
    net, _, _ = network_on_noise(network, IMAGES, IMAGES, "cpu", torch.float32)
    counted, sizes = 0, lower(net)
    for layer in sizes.layers:
        if layer.kind == ops.Kind.CONVOLUTION:
            height, width = sizes.sizes[layer.section]
            counted += layer.weight.numel() * height * width
    return counted


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if ops.CPP_MISSING:
        sys.exit(f"the C++ kernels are {ops.CPP_MISSING}")
    around, most = environment("cpu"), peak()
    append([CeilingRow("multiply-adds of one core", "float32", most)], around)
    print(f"one core does {most:.1f} billion multiply-adds a second; {ops.instruction_set()}")
    print(f"{'':10}{'algorithm':>10}{'group':>6}{'µs/image':>10}{'of peak':>9}  sections, µs")
    for network in track(NETWORKS, "networks"):
        work, found = multiply_adds(network), []
        for row in measure(network):
            share = work / row.microseconds / 1e3 / most
            found.append(AlgorithmRow(**{**vars(row), "peak_share": share}))
            parts = " ".join(f"{s:.0f}" for s in row.sections)
            line = f"{row.trunk:10}{row.algorithm:>10}{row.group:6}{row.microseconds:10.0f}{share:9.0%}  {parts}"
            print(line, flush=True)
        append(found, around)
    return 0


if __name__ == "__main__":
    sys.exit(main())
