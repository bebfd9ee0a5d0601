"""Host waits are counted one by one; a trace's spans add up to the time in which the GPU works."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from launch_gaps import busy_seconds, covered, host_waits
from networks import images, lived_in, spread_thresholds
from torch.autograd import DeviceType

import eefast
from eefast import zoo

X = torch.arange(24.0).view(6, 4)
MASK = X[:, 0] > 7


def set_rows(x, mask, value):
    x = x.clone()
    x[mask] = value


WAITS = {
    "item": (lambda x, mask: x.sum().item(), 1),
    "int": (lambda x, mask: int(mask.sum()), 1),
    "bool": (lambda x, mask: 1 if mask.any() else 0, 1),
    "format": (lambda x, mask: f"{x.sum():.1f}", 1),
    "cpu": (lambda x, mask: x.cpu(), 1),
    "list": (lambda x, mask: x.tolist(), 1),
    "numpy": (lambda x, mask: x.cpu().numpy(), 1),
    "nonzero": (lambda x, mask: mask.nonzero(), 1),
    "where": (lambda x, mask: torch.where(mask), 1),
    "a mask reads": (lambda x, mask: x[mask], 1),
    "a mask writes": (lambda x, mask: set_rows(x, mask, x[:4].clone()), 1),
    "masked_select": (lambda x, mask: x[:, 0].masked_select(mask), 1),
    "unique": (lambda x, mask: mask.unique(), 1),
    "bincount": (lambda x, mask: mask.long().bincount(), 1),
    "several": (lambda x, mask: (x[mask], x[~mask], int(mask.sum())), 3),
    "a mask fills": (lambda x, mask: set_rows(x, mask, 0.0), 0),
    "arithmetic": (lambda x, mask: (x * 2).sum().where(mask, x[:, 0]), 0),
    "indices": (lambda x, mask: x[torch.arange(2, device=x.device)], 0),
    "a known size": (lambda x, mask: torch.nonzero_static(mask, size=4), 0),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits(name):
    run, expected = WAITS[name]
    # On the CPU the array is there at once, which is one more that would wait.
    assert host_waits(lambda: run(X, MASK), "cpu") == expected + (name == "numpy")
    assert host_waits(lambda: run(X, MASK), "cuda") == 0, "on a GPU, what is done on the CPU waits for nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("name", WAITS)
def test_what_waits_on_a_gpu_is_what_pytorch_warns_of(name):
    run, expected = WAITS[name]
    x, mask = X.cuda(), MASK.cuda()
    run(x, mask)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(x, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = host_waits(lambda: run(x, mask), "cuda")
    assert found == expected
    assert (found > 0) == any("synchronizing" in str(w.message) for w in seen)


def test_graphs_count_their_own_waits():
    graphs = SimpleNamespace(waits=5)

    def run():
        graphs.waits += 2
        X.sum().item()

    assert host_waits(run, "cuda", graphs) == 2
    assert host_waits(run, "cpu", graphs) == 3


def test_compiled_code_is_not_compiled_again():
    calls = []

    def backend(graph, example):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile(torch.nn.Linear(4, 2), backend=backend, fullgraph=True)
    compiled(X)
    assert host_waits(lambda: int(compiled(X).sum() > 0), "cpu") == 1
    compiled(X)
    assert len(calls) == 1


@torch.no_grad()
def test_waits_of_whole_networks():
    net, x = lived_in(zoo.eenet("eenet20", 3, input_shape=(3, 12, 12)), 5), images(31, (3, 12, 12))
    spread_thresholds(net, x, 0.3)
    # Per exit five masks read and one writes; the last exit, and the thresholds that are looked at, on a CPU twice.
    masked = host_waits(lambda: net(x), "cpu")
    assert masked >= 4 * 5
    fast = eefast.accelerate(net, engine="compact")
    fast(x)
    ours = host_waits(lambda: fast(x), "cpu")
    assert ours <= 4 + 2 < masked


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0),
        ([(3, 5)], 2),
        ([(0, 1), (2, 4)], 3),
        ([(2, 4), (0, 3)], 4),
        ([(0, 10), (1, 2), (3, 4), (9, 12)], 12),
        ([(1, 2), (1, 2)], 1),
        ([(5, 5)], 0),
    ],
)
def test_spans_that_overlap_count_once(spans, expected):
    assert covered(spans) == expected


class Trace:
    """In place of the profiler on a GPU: (device, begin, end, whether an annotation)."""

    EVENTS = (
        (DeviceType.CPU, 0, 90, False),
        (DeviceType.CUDA, 10, 20, False),
        (DeviceType.CUDA, 15, 25, False),
        (DeviceType.CUDA, 40, 45, False),
        (DeviceType.CUDA, 0, 80, True),
    )

    def __init__(self, activities):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def events(self):
        return [
            SimpleNamespace(
                device_type=device, time_range=SimpleNamespace(start=begin, end=end), is_user_annotation=annotation
            )
            for device, begin, end, annotation in self.EVENTS
        ]


def test_busy_is_what_the_device_does(monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", Trace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran = []
    assert busy_seconds(lambda: ran.append(1)) == pytest.approx(20e-6)
    assert ran == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler sees a GPU")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profiler_that_sees_no_gpu_measures_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert busy_seconds(lambda: X * 2) is None


def test_without_a_profiler_nothing_is_measured(monkeypatch):
    def missing(activities):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(torch.profiler, "profile", missing)
    assert busy_seconds(lambda: X * 2) is None
