"""The fastest of a stage's inference copies: what is tried, what is left out and why, how it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from fused_stages import HALVES, Cudnn, basic_block, conv, kinds, on_gpu
from networks import Stage, images
from torch import Tensor, nn

from eefast.planning import stage_choice
from eefast.planning.compiled_stages import CompileTime
from eefast.planning.folding import fold_stage
from eefast.planning.fusing import FusedConv, fuse_convolutions
from eefast.planning.stage_choice import fastest_stage

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")


def test_on_the_cpu_the_folded_stage_runs() -> None:
    stage, note = fastest_stage(basic_block(), torch.float32, images(2, (16, 5, 5)))
    assert note == "folded"
    assert kinds(stage)["Conv2d"] == 2
    # One of PyTorch's layers alone is traced too.
    assert fastest_stage(conv(), torch.float32, images(1, (3, 5, 5)))[1] == "folded"


def test_an_example_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"example has shape \[0, 16, 5, 5\]; pass at least one"):
        fastest_stage(basic_block(), torch.float32, torch.empty(0, 16, 5, 5))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by the name of a class; candidates take as long as it says here."""
    seconds: dict[str, float] = {}
    monkeypatch.setattr(
        stage_choice,
        "seconds_of",
        lambda candidates, features: [next(s for name, s in seconds.items() if is_of(c, name)) for c in candidates],
    )
    return seconds


def is_of(candidate: nn.Module, name: str) -> bool:
    return any(type(m).__name__ == name for m in candidate.modules())


@pytest.mark.parametrize(
    ("seconds", "note"), [(1.0, "fused (2 of 2 convolutions), 1.4× folded"), (3.0, "folded")], ids=["fused", "folded"]
)
@pytest.mark.usefixtures("poison_fresh_memory")
def test_the_fastest_of_folded_and_fused(
    seconds: float, note: str, monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]
) -> None:
    Cudnn(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("a plan has no time for it"))
    slow |= {"FusedConv": seconds, "Conv2d": 1.4}
    stage, found = fastest_stage(basic_block(), torch.float32, images(2, (16, 5, 5)), CompileTime(0))
    assert found == note
    assert is_of(stage, "FusedConv") == (note != "folded")


class Compiled(CompileTime):
    """Compiles to the same stage under another name, or fails."""

    def __init__(self, fault: str = "") -> None:
        super().__init__(1.0)
        self.fault, self.rows = fault, list[int]()

    def compiled(self, stage: nn.Module, features: Tensor) -> nn.Module:
        self.rows.append(len(features))
        if self.fault == "raises":
            raise RuntimeError("no kernel\nfound")
        if self.fault == "slow":
            self.left = 0
            return super().compiled(stage, features)
        return Stage(lambda s, x: s.a(x) + (1e-4 if self.fault == "wrong" else 0), a=stage, compiled=nn.Flatten())


SILU = nn.Sequential(conv(), nn.ReLU(), conv(), nn.SiLU())


@pytest.mark.parametrize(
    ("make", "seconds", "note"),
    [
        (lambda: SILU, 1.0, "torch.compile, 2.0× folded"),
        (lambda: SILU, 3.0, "fused (1 of 2 convolutions), 1.7× folded; torch.compile takes 2.50×"),
        (lambda: nn.Sequential(conv(), nn.ReLU()), 1.0, "torch.compile, 2.0× folded"),
        (
            lambda: Stage(lambda s, x: s.a(x) if x.sum() > 1e9 else s.a(x).relu(), a=conv()),
            3.0,
            "not folded: torch.fx cannot trace it (TraceError); torch.compile takes 1.50×",
        ),
    ],
    ids=["fastest", "slower", "wholly fused", "untraceable"],
)
def test_compiling_is_always_compared(
    make: Callable[[], nn.Module], seconds: float, note: str, monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]
) -> None:
    Cudnn(monkeypatch)
    compile_time = Compiled()
    slow |= {"Flatten": seconds, "FusedConv": 1.2, "Conv2d": 2.0}
    stage, found = fastest_stage(make(), torch.float32, images(7, (3, 5, 5)), compile_time)
    assert found == note
    assert is_of(stage, "Flatten") == note.startswith("torch.compile")
    assert compile_time.rows == [7]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "RuntimeError: no kernel"),
        ("slow", "TimeoutError: the 1 s that planning has for it are spent"),
        ("wrong", "its error is 0.0001, more than twice that of folded"),
    ],
    ids=["raises", "slow", "wrong"],
)
def test_compiling_that_fails_is_left_out_by_name(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]
) -> None:
    Cudnn(monkeypatch)
    slow |= {"Flatten": 1.0, "FusedConv": 1.2, "Conv2d": 2.0}
    stage, note = fastest_stage(SILU, torch.float32, images(2, (3, 5, 5)), Compiled(fault))
    assert note == f"fused (1 of 2 convolutions), 1.7× folded; torch.compile left out: {reason}"
    assert is_of(stage, "FusedConv")


@pytest.mark.parametrize("fault", ["raises", "wrong", "NaN"])
def test_candidates_that_fail_are_left_out(fault: str, monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]) -> None:
    cudnn = Cudnn(monkeypatch)

    def broken(*arguments: object) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no engine\nfound")
        return cudnn.relu(*arguments) + (1e-4 if fault == "wrong" else torch.nan)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", broken)
    slow |= {"FusedConv": 1.0, "Conv2d": 2.0}
    stage, note = fastest_stage(basic_block(), torch.float32, images(2, (16, 5, 5)))
    assert not is_of(stage, "FusedConv")
    reason = "RuntimeError: no engine" if fault == "raises" else "its error is "
    assert note.startswith(f"folded; fused (2 of 2 convolutions) left out: {reason}")
    assert "found" not in note


@pytest.mark.parametrize("fault", ["reads", "writes"])
def test_candidates_run_in_memory_that_holds_no_numbers(
    fault: str, monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]
) -> None:
    """As an engine of cuDNN that multiplies what is in its result's memory by 0."""
    cudnn, memory = Cudnn(monkeypatch), [0.0]

    def reading(*arguments: object) -> Tensor:
        return cudnn.relu(*arguments) + 0 * (memory[0] if fault == "reads" else 1.0)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", reading)
    monkeypatch.setattr(stage_choice, "poison_free_memory", lambda device: memory.__setitem__(0, torch.nan))
    slow |= {"FusedConv": 1.0, "Conv2d": 2.0}
    stage, note = fastest_stage(basic_block(), torch.float32, images(2, (16, 5, 5)))
    assert is_of(stage, "FusedConv") == (fault == "writes")
    assert ("left out: its error is nan" in note) == (fault == "reads")


class Held:
    """The allocator's blocks; what is made of exactly their size is in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[tuple[int, ...], float]] = []
        blocks = [{"size": 512, "state": "inactive"}, {"size": 1024, "state": "active_allocated"}]
        more = [{"size": 4096, "state": "inactive"}]
        segments = [(0, (0, 0), blocks), (0, (0, 1), more), (1, (0, 0), more)]
        snapshot = [{"device": d, "segment_pool_id": pool, "blocks": b} for d, pool, b in segments]
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
        monkeypatch.setattr(torch, "full", self.full)

    def full(self, size: tuple[int, ...], value: float, device: torch.device) -> object:
        self.made.append((size, value))
        return object()


def test_free_memory_is_filled_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this device, and not in the pools of graphs."""
    held = Held(monkeypatch)
    stage_choice.poison_free_memory(torch.device("cuda:0"))
    ((size, value),) = held.made
    assert size == (128,)
    assert value != value
    stage_choice.poison_free_memory(torch.device("cpu"))
    assert len(held.made) == 1


def test_convolutions_that_are_slower_in_one_kernel_run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape is measured once; here one of two inputs and strides."""
    Cudnn(monkeypatch)
    asked: list[int] = []

    def seconds(candidates: list[nn.Module], *inputs: Tensor) -> list[float]:
        (first, *_) = candidates
        if not isinstance(first, FusedConv):
            found = [[m.in_one_kernel for m in c.modules() if isinstance(m, FusedConv)] for c in candidates]
            return [5.0 if not whole else 4.0 if all(whole) else 2.0 for whole in found]
        asked.append(inputs[0].shape[1])
        return [1.0 if c.in_one_kernel == (inputs[0].shape[1] == 3) else 2.0 for c in candidates]

    monkeypatch.setattr(stage_choice, "seconds_of", seconds)
    layers = (conv(3, 5), nn.ReLU(), conv(5, 5), nn.ReLU(), conv(5, 5), nn.ReLU())
    fused, count, _ = fuse_convolutions(fold_stage(nn.Sequential(*layers), torch.float32)[0])
    x = images(2, (3, 5, 5))
    mixed, apart = stage_choice.faster_apart(fused, x)
    assert (count, apart, sorted(asked)) == (3, 2, [3, 5])
    convs = [m for m in mixed.modules() if isinstance(m, FusedConv)]
    assert [m.in_one_kernel for m in convs] == [m.weight.shape[1] == 3 for m in convs]
    assert all(m.in_one_kernel for m in fused.modules() if isinstance(m, FusedConv))
    assert {id(p) for p in mixed.parameters()} == {id(p) for p in fused.parameters()}
    torch.testing.assert_close(mixed(x), fused(x))
    note = "fused (1 of 3 convolutions, 2 faster apart), 2.5× folded"
    assert fastest_stage(nn.Sequential(*layers), torch.float32, x)[1] == note


def test_stages_that_know_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    Cudnn(monkeypatch)
    stage = Stage(lambda s, x: s.a(x.float()).relu(), a=conv())
    found, note = fastest_stage(stage, torch.float32, images(2, (3, 5, 5)))
    assert not is_of(found, "FusedConv")
    assert note.startswith("folded; not measured, since float64 fails: RuntimeError: Input type (float)")


def test_stages_that_change_their_input(monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]) -> None:
    Cudnn(monkeypatch)
    slow |= {"FusedConv": 1.0, "Conv2d": 2.0}
    x = images(2, (3, 5, 5)).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    stage = Stage(lambda s, x: s.a(x.mul_(2)).relu(), a=conv())
    assert fastest_stage(stage, torch.float32, x)[1] == "fused (1 of 1 convolutions), 2.0× folded"
    assert torch.equal(x, before)


def test_seconds_are_the_least_of_rounds_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = stage_choice.ROUNDS
    clock = iter([value for r in range(rounds) for value in (0, 10 - r, 0, 20 + r)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls: list[str] = []
    candidates = [lambda x: calls.append("a"), lambda x: calls.append("b")]
    assert stage_choice.seconds_of(candidates, torch.zeros(1)) == [10 - rounds + 1, 20]
    assert calls == ["a", "b"] * rounds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("make", "words"),
    [(basic_block, "of 2 conv"), (lambda: nn.Sequential(conv(16, 16), nn.SiLU()), "torch.compile")],
    ids=["fused", "compiled"],
)
def test_the_fastest_on_a_gpu(make: Callable[[], nn.Module], words: str, dtype: torch.dtype) -> None:
    stage, x = make(), images(64, (16, 8, 8)).cuda()
    found, note = fastest_stage(stage.cuda(), dtype, x, CompileTime(100))
    assert words in note or note.startswith("folded")
    assert "left out" not in note, note
    given = on_gpu(x, dtype)
    folded, _ = fold_stage(nn.Sequential(stage), dtype)
    torch.testing.assert_close(found(given), folded(given), rtol=2e-2, atol=2e-2)
