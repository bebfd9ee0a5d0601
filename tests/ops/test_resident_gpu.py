"""The resident CUDA kernel on a GPU: exits, batches, streams, graphs; against plain PyTorch and against itself."""

from __future__ import annotations

import copy
import importlib.resources
from collections.abc import Iterator

import pytest
import torch
from exit_cases import CRITERIA
from networks import images, lived_in, spread_thresholds
from resident_cases import Answer, check, exits_of, expected, forced, never, small
from torch import Tensor, nn

import eefast
from eefast import ops, rules, zoo
from eefast.api import Accelerated
from eefast.data.mnist import mnist_test
from eefast.model import EarlyExitNet
from eefast.planning.lowering import lower
from eefast.result import ExitResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ops.CUDA_MISSING is not None, reason=f"CUDA kernels: {ops.CUDA_MISSING}"),
]

HALF, BFLOAT = torch.float16, torch.bfloat16
# How close to a threshold a confidence is where float16 and float32 decide differently.
MARGIN = 5e-2
SHAPE = (3, 32, 32)


def accelerated(net: EarlyExitNet, dtype: torch.dtype = HALF) -> Accelerated:
    return eefast.accelerate(net.cuda(), engine="resident", dtype=dtype)


def eenet(name: str, exits: int, seed: int) -> EarlyExitNet:
    return lived_in(zoo.eenet(name, exits, "linear", "bnpool", input_shape=SHAPE), seed)


def settled(net: EarlyExitNet) -> EarlyExitNet:
    """BatchNorm gets the statistics of images, so that the maps of a deep network stay within float16's range."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(images(64, net.input_shape, 4))
    return net.eval()


def spread(net: EarlyExitNet) -> EarlyExitNet:
    spread_thresholds(net, images(257, net.input_shape, 5), 0.4)
    return net


def answer_of(result: ExitResult) -> Answer:
    return Answer(result.logits.cpu(), result.confidence.cpu(), result.exit_index.cpu(), None)


def same_bits(a: ExitResult, b: ExitResult) -> bool:
    return answer_of(a).same_bits(answer_of(b))


@pytest.fixture(scope="module")
def net() -> EarlyExitNet:
    return spread(eenet("eenet20", 3, 1)).cuda()


@pytest.fixture(scope="module")
def fast(net: EarlyExitNet) -> Accelerated:
    return accelerated(net)


NETWORKS = {
    "sanitize-8 layers": (lambda: small(1, 10, SHAPE, "pool", 0), HALF, 5),
    "8 layers, odd": (lambda: small(1, 256, (3, 13, 19), "bnpool", 1), BFLOAT, 67),
    "8 layers, head convolution": (lambda: small(1, 33, (3, 15, 16), "conv1", 2), HALF, 67),
    "eenet20": (lambda: eenet("eenet20", 5, 3), HALF, 257),
    "eenet20, bfloat16": (lambda: eenet("eenet20", 5, 4), BFLOAT, 257),
    "eenet8": (lambda: lived_in(zoo.eenet("eenet8", 2, filters=16, input_shape=(1, 28, 28)), 5), HALF, 67),
    "sanitize-eenet8, 2 filters": (lambda: lived_in(zoo.eenet("eenet8", 2, input_shape=(1, 28, 28)), 6), BFLOAT, 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_exit_in_turn(name: str) -> None:
    make, dtype, count = NETWORKS[name]
    net = make()
    lowered, x = lower(net), images(count, net.input_shape, 1)
    exits = exits_of(lowered, x, dtype)
    fast = accelerated(net, dtype)
    for at in range(net.num_exits + 1):
        limits = forced(net, at)
        net.thresholds.copy_(limits)
        check(answer_of(fast(x.cuda().to(dtype))), expected(net, exits, limits), dtype)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_column_of_a_rule_is_the_criterion_of_that_name(net: EarlyExitNet, criterion: str) -> None:
    named, x = spread(copy.deepcopy(net).cpu().with_criterion(criterion)), images(67, SHAPE, 6).cuda()
    sign = -1 if criterion == "entropy" else 1
    table = named.with_criterion(rules.stateless(criterion, 3), (sign * named.thresholds).tolist())
    expected_, found = accelerated(named)(x), accelerated(table)(x)
    assert same_bits(found._replace(confidence=sign * found.confidence), expected_)


@pytest.mark.parametrize(("name", "dtype"), [("eenet20", HALF), ("eenet56", HALF), ("eenet110", HALF)])
def test_free_exits(name: str, dtype: torch.dtype) -> None:
    """Decisions differ only where a confidence is close to its threshold; deep networks add up more roundings."""
    net = spread(settled(eenet(name, 4, 7)))
    x = images(1024, SHAPE, 8)
    want = expected(net, exits_of(lower(net), x, dtype), net.thresholds)
    got = answer_of(accelerated(net, dtype)(x.cuda().to(dtype)))
    same = got.exits == want.exits
    assert len(got.exits.unique()) == 5
    assert same.float().mean() > 0.99
    scale = float(want.logits.abs().max())
    difference = (got.logits - want.logits)[same].abs().amax(1)
    assert float(difference.median()) < 2e-3 * scale
    assert float(difference.max()) < 3e-2 * scale


@pytest.mark.parametrize("criterion", CRITERIA[1:])
def test_criteria(criterion: str) -> None:
    net = spread(small(1, 10, SHAPE, "pool", 9).with_criterion(criterion).eval())
    x = images(257, SHAPE, 10)
    want = expected(net, exits_of(lower(net), x, HALF), net.thresholds)
    got = answer_of(accelerated(net)(x.cuda().half()))
    same = got.exits == want.exits
    assert same.float().mean() > 0.99
    torch.testing.assert_close(got.confidence[same], want.confidence[same], rtol=0, atol=2e-2)


@pytest.mark.parametrize("count", [0, 1, 2, 31, 263, 264, 265, 4096, 65536])
def test_the_same_bits_in_every_batch(net: EarlyExitNet, fast: Accelerated, count: int) -> None:
    some = images(257, SHAPE, 11).cuda().half()
    x = some[torch.arange(count) % 257]
    whole, alone = fast(x), fast(some)
    rows = torch.arange(count, device="cuda") % 257
    assert same_bits(whole, ExitResult(*(part[rows] for part in alone)))


def test_a_hundred_runs_give_the_same_bits(fast: Accelerated) -> None:
    x = images(1031, SHAPE, 12).cuda().half()
    first = fast(x)
    for _ in range(100):
        assert same_bits(fast(x), first)


def test_it_does_not_wait_for_the_device(fast: Accelerated) -> None:
    x = images(33, SHAPE, 13).cuda().half()
    first = fast(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [fast(x), *fast.stream([x, x, x, x, x])]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(result, first) for result in results)


def test_in_a_graph(net: EarlyExitNet, fast: Accelerated) -> None:
    """Thresholds may change between replays."""
    x = images(257, SHAPE, 14).cuda().half()
    first, buffer, before = fast(x), torch.zeros_like(x), net.thresholds.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fast(buffer)
    buffer.copy_(x)
    graph.replay()
    assert same_bits(result, first)
    net.thresholds.copy_(never(net))
    graph.replay()
    assert (result.exit_index == net.num_exits).all()
    net.thresholds.copy_(before)
    graph.replay()
    assert same_bits(result, first)


def test_on_a_separate_stream(fast: Accelerated) -> None:
    x = images(257, SHAPE, 15)
    first = fast(x.cuda().half())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros(257, *SHAPE, device="cuda", dtype=HALF)
        torch.cuda._sleep(50_000_000)
        late.copy_(x.cuda().half())
        result = fast(late)
    side.synchronize()
    assert same_bits(result, first)


@pytest.mark.parametrize("sizes", [(), (1,), (257, 0, 3, 64, 1, 1, 300)])
def test_stream(fast: Accelerated, sizes: tuple[int, ...]) -> None:
    batches = [images(n, SHAPE, 16 + i).cuda().half() for i, n in enumerate(sizes)]
    results = list(fast.stream(iter(batches)))
    assert len(results) == len(sizes)
    assert all(same_bits(result, fast(x)) for result, x in zip(results, batches, strict=True))


def test_a_buffer_that_is_written_to_again(net: EarlyExitNet, fast: Accelerated) -> None:
    """On the current stream, while the kernels of the batches before have not begun."""
    data = [images(257, SHAPE, 30 + i).cuda().half() for i in range(9)]
    buffer, before = torch.empty_like(data[0]), net.thresholds.clone()
    expected = [fast(x) for x in data]
    torch.cuda.synchronize()

    def refilled() -> Iterator[Tensor]:
        for x in data:
            net.thresholds.copy_(before)
            yield buffer.copy_(x)
            buffer.zero_()
            net.thresholds.copy_(never(net))

    try:
        results = list(fast.stream(refilled()))
    finally:
        net.thresholds.copy_(before)
    assert all(same_bits(result, wanted) for result, wanted in zip(results, expected, strict=True))


def test_an_error_in_a_stream_comes_after_the_results_before_it(fast: Accelerated) -> None:
    x = images(33, SHAPE, 17).cuda().half()

    def batches() -> Iterator[Tensor]:
        yield x
        yield x
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(result for result in fast.stream(batches()))
    assert len(found) == 2
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\]"):
        list(fast.stream([x, x, x[:, :1]]))


@pytest.mark.parametrize("engine", ["resident", "auto"])
def test_the_shipped_network(engine: str) -> None:
    """Accuracy and exits on the MNIST test images as on the CPU in float32, but for images next to a threshold."""
    with importlib.resources.as_file(importlib.resources.files("eefast") / "assets" / "eenet-mnist") as folder:
        net = eefast.load(folder).eval()
    x, labels = mnist_test()
    want = net(x)
    fast = eefast.accelerate(net.cuda(), engine=engine, dtype=HALF)
    assert fast.plan.engine == "resident"
    got = fast(x.cuda())
    exits, classes = got.exit_index.cpu(), got.labels.cpu()
    flipped = (exits != want.exit_index).nonzero().flatten()
    assert len(flipped) <= 40
    with torch.no_grad():
        confidences = [out.confidence for out in net.cpu().all_exits(net.prepare(x[flipped]))]
    for i, row in enumerate(flipped):
        parting = min(int(exits[row]), int(want.exit_index[row]))
        assert abs(float(confidences[parting][i] - net.thresholds[parting])) < MARGIN
    right, wanted = (classes == labels).sum(), (want.labels == labels).sum()
    assert abs(int(right - wanted)) <= 5
    histogram, expected_histogram = (e.bincount(minlength=net.num_exits + 1) for e in (exits, want.exit_index))
    assert (histogram - expected_histogram).abs().max() <= len(flipped)
    net.cuda()
    assert same_bits(got, fast(x.cuda().contiguous(memory_format=torch.channels_last)))


def test_what_it_cannot_run_is_said_by_name() -> None:
    with pytest.raises(ValueError, match=r"engine='resident' cannot run: on CUDA it computes in float16 or bfloat16"):
        eefast.accelerate(eenet("eenet20", 1, 0).cuda(), engine="resident")
    wide = zoo.eenet("eenet18", 1, input_shape=(3, 64, 64)).eval().cuda()
    with pytest.raises(ValueError, match=r"takes images of up to 32×32, not 64×64"):
        eefast.accelerate(wide, engine="resident", dtype=HALF)
    assert eefast.accelerate(wide, dtype=HALF).plan.engine == "compact"


def test_other_sizes_of_images(fast: Accelerated, net: EarlyExitNet) -> None:
    x = images(9, (3, 17, 30), 18)
    cpu = eenet("eenet20", 3, 1)
    want = expected(cpu, exits_of(lower(cpu), x, HALF), net.thresholds.cpu())
    check(answer_of(fast(x.cuda().half())), want, HALF)
    with pytest.raises(RuntimeError, match="images of 3×40×40; on CUDA expected at most 8×32×32"):
        fast(torch.zeros(1, 3, 40, 40, device="cuda", dtype=HALF))
