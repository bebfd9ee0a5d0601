"""Networks on rows [N, C, L] in every engine, beside the network itself, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from networks import Stage, assert_same_answers
from torch import Tensor, nn

import eefast
from eefast import ops, zoo
from eefast.data.sensors import sensor_windows
from eefast.heads import ExitHead
from eefast.planning.errors import UnsupportedError
from eefast.planning.rows import network_on_maps

needs_cpp = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
ENGINES = ["reference", "compact", pytest.param("resident", marks=needs_cpp)]


def lived_in(net: eefast.EarlyExitNet) -> eefast.EarlyExitNet:
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean.copy_(0.3 * torch.randn(m.running_mean.shape, generator=g))
            m.running_var.copy_(0.7 + 0.7 * torch.rand(m.running_var.shape, generator=g))
    return net.eval()


def rows(count: int, length: int) -> Tensor:
    return sensor_windows(count, length)[0]


@torch.no_grad()
def split_up(net: eefast.EarlyExitNet, x: Tensor) -> eefast.EarlyExitNet:
    """With thresholds in the widest gap between confidences of the middle half."""
    for i, out in enumerate(net.all_exits(x)[:-1]):
        value = net.criterion.confidence(out.logits, out.confidence_logit).sort().values
        low = len(value) // 4
        gap = low + int(value[low : len(value) - low + 1].diff().argmax())
        net.thresholds[i] = (value[gap] + value[gap + 1]) / 2
    return net


@torch.no_grad()
def one_by_one(net: eefast.EarlyExitNet, x: Tensor) -> eefast.ExitResult:
    return eefast.ExitResult(*map(torch.cat, zip(*(net(row) for row in x.split(1)), strict=True)))


def chain(*stages: nn.Module, channels: int, length: int) -> eefast.EarlyExitNet:
    """Stages, each with a head."""
    heads, x = [], torch.zeros(1, channels, length)
    for stage in stages:
        x = stage.eval()(x)
        heads.append(ExitHead("pool", x.shape[1:], 7, (channels, length)))
    return eefast.EarlyExitNet(list(stages), heads, input_shape=(channels, length))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **more: object) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, kernel, stride, padding=more.pop("padding", kernel // 2), **more)


def separable() -> eefast.EarlyExitNet:
    torch.manual_seed(1)
    return chain(
        nn.Sequential(conv(6, 19, 7, 2), nn.BatchNorm1d(19), nn.ReLU(), nn.MaxPool1d(3, 2, 1)),
        nn.Sequential(conv(19, 19, 5, groups=19), conv(19, 32, 1), nn.Hardswish(), conv(32, 32, 3, 2, groups=32)),
        nn.Sequential(conv(32, 32, 3, groups=4), nn.SiLU(), nn.AvgPool1d(3, 2, 1), conv(32, 64, 3, groups=2)),
        channels=6,
        length=93,
    )


def gated() -> eefast.EarlyExitNet:
    """A squeeze-and-excitation block and a concatenation, in layers."""
    torch.manual_seed(2)
    gate = nn.Sequential(nn.AdaptiveAvgPool1d(1), conv(16, 4, 1), nn.ReLU(), conv(4, 16, 1), nn.Sigmoid())
    return chain(
        nn.Sequential(conv(6, 16), nn.ReLU()),
        Stage(lambda m, x: torch.cat([x * m.gate(x), m.conv(x)], 1), gate=gate, conv=conv(16, 32, 5)),
        channels=6,
        length=40,
    )


NETWORKS: Mapping[str, Callable[[], eefast.EarlyExitNet]] = {
    "length 1": lambda: zoo.eenet("eenet20-1d", input_shape=(6, 1)),
    "length 7": lambda: zoo.eenet("eenet20-1d", head="bnpool", input_shape=(6, 7)),
    "length 128": lambda: zoo.eenet("eenet20-1d", 3, "linear", "conv2", input_shape=(6, 128)),
    "length 1023": lambda: zoo.eenet("eenet20-1d", input_shape=(6, 1023)),
    "flattened": lambda: zoo.eenet("eenet20-1d", head="plain", input_shape=(6, 31)),
    "strided stem": lambda: zoo.eenet("eenet18-1d", input_shape=(6, 33)),
    "bottlenecks": lambda: zoo.eenet("eenet50-1d", input_shape=(6, 33)),
    "groups and pools": separable,
    "gates and joins": gated,
}
ALIKE = ("bottlenecks", "strided stem", "flattened")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in NETWORKS])
@pytest.mark.sampled(9)
def test_every_engine_gives_the_answers_of_the_network(name: str, engine: str) -> None:
    torch.manual_seed(0)
    net = lived_in(NETWORKS[name]())
    x = rows(17, net.input_shape[1])
    net = split_up(net, x)
    wanted = one_by_one(net, x)
    fast = eefast.accelerate(net, engine=engine)
    assert_same_answers(fast(x), wanted, net)
    assert_same_answers(fast(x[:1]), eefast.ExitResult(*(part[:1] for part in wanted)), net)
    assert len(fast(x[:0]).logits) == 0
    if engine == "resident":
        partial = fast.until(0)(x)
        for got, expected in zip(partial.finished(fast.resume(partial.survivors)), fast(x), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_lengths_streams_warmup_and_changed_weights(engine: str) -> None:
    torch.manual_seed(0)
    net = lived_in(zoo.eenet("eenet20-1d", input_shape=(6, 32)))
    net = split_up(net, rows(9, 50))
    fast = eefast.accelerate(net, engine=engine, example_inputs=rows(3, 32))
    fast.warmup()
    batches = [rows(9, 50), rows(4, 32), rows(0, 32)]
    for x, result in zip(batches, fast.stream(batches), strict=True):
        if len(x):
            assert_same_answers(result, one_by_one(net, x), net)
    with torch.no_grad():
        net.stages[0][0][0].weight.mul_(0.5)
    assert_same_answers(fast(batches[0]), one_by_one(net, batches[0]), net)


def test_the_weights_are_the_same_and_the_state_dict_is_untouched() -> None:
    net = lived_in(zoo.eenet("eenet20-1d", input_shape=(6, 32)))
    before = {name: (value.data_ptr(), tuple(value.shape)) for name, value in net.state_dict().items()}
    made = network_on_maps(net)
    after = {name: (value.data_ptr(), tuple(value.shape)) for name, value in net.state_dict().items()}
    assert before == after
    theirs = {value.data_ptr() for value in net.parameters()}
    assert {value.data_ptr() for value in made.parameters()} == theirs
    x = rows(5, 32)
    assert torch.equal(made.prepare(x), x.unsqueeze(2))
    assert made.prepare(x).data_ptr() == x.data_ptr()


class CountsDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * x.dim()


def test_a_network_that_counts_dimensions_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    net = chain(CountsDimensions(), conv(6, 6), channels=6, length=20).eval()
    with pytest.raises(UnsupportedError, match=r"on maps of one row, the network's .* at exit 0"):
        network_on_maps(net)
    with pytest.raises(ValueError, match="engine='compact' cannot run: on maps of one row"):
        eefast.accelerate(net, engine="compact")
    fast = eefast.accelerate(net)
    assert fast.plan.engine == "reference"
    assert torch.equal(fast(rows(3, 20)).logits, net(rows(3, 20)).logits)


def test_what_is_no_row_is_refused() -> None:
    net = lived_in(zoo.eenet("eenet20-1d", input_shape=(6, 32)))
    for module in (net, eefast.accelerate(net, engine="compact")):
        with pytest.raises(ValueError, match=r"x has shape \(3, 6, 1, 32\); expected \[N, 6, L\]"):
            module(torch.zeros(3, 6, 1, 32))
        with pytest.raises(ValueError, match=r"x has shape \(6, 32\); expected \[N, 6, L\]; x\[None\] makes a batch"):
            module(torch.zeros(6, 32))
    with pytest.raises(ValueError, match=r"input_shape=\(6, 3, 32\) must be \(C, L\)"):
        zoo.eenet("eenet20-1d", input_shape=(6, 3, 32))
    with pytest.raises(ValueError, match="name='eenet8-1d' is unknown"):
        zoo.eenet("eenet8-1d", input_shape=(6, 32))


@pytest.mark.parametrize(
    ("length", "engine"),
    [
        *(pytest.param(length, "resident", marks=needs_cpp) for length in (5, 128)),
        (31, "reference"),
        pytest.param(31, "compact", marks=pytest.mark.slow),
    ],
)
def test_integers(length: int, engine: str, tmp_path) -> None:
    net = lived_in(zoo.eenet("eenet20-1d", 2, head="conv1", input_shape=(6, length)))
    x = rows(40, length)
    made = split_up(eefast.quantize(net, x), x)
    wanted = made(x)
    assert len(wanted.exit_index.unique()) >= 2
    errors = [a.logits - b.logits for a, b in zip(made.all_exits(x), net.all_exits(x), strict=True)]
    assert max(e.square().mean().sqrt() for e in errors) < 0.1 * net.all_exits(x)[-1].logits.std()
    made.save(tmp_path)
    loaded = eefast.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), wanted, strict=True))
    fast = eefast.accelerate(loaded, engine=engine)
    found = fast(x)
    assert torch.equal(found.exit_index, wanted.exit_index)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    partial = fast.until(0)(x)
    found = partial.finished(fast.resume(partial.survivors))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def test_pooling_in_integers() -> None:
    backbone = nn.Sequential(
        nn.Conv1d(6, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(3, 2, 1),
        nn.Conv1d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv1d(12, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    net, x = lived_in(eefast.attach(backbone, ["3"], input_shape=(6, 37))), rows(32, 37)
    made = eefast.quantize(net, x)
    for found, wanted in zip(made.all_exits(x), net.all_exits(x), strict=True):
        assert (found.logits - wanted.logits).abs().max() < 0.2 * wanted.logits.std()
    if not ops.CPP_MISSING:
        fast = eefast.accelerate(made, engine="resident")
        torch.testing.assert_close(fast(x).logits, made(x).logits, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(tmp_path) -> None:
    net = lived_in(zoo.eenet("eenet32-1d", 3, head="conv1", input_shape=(6, 32)))
    net.save(tmp_path)
    loaded = eefast.load(tmp_path)
    assert loaded.name == "eenet32-1d"
    assert torch.equal(loaded(rows(5, 32)).logits, net(rows(5, 32)).logits)
