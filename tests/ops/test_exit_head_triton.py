"""What the Triton exit head promises beyond the right answer: any order of programs, any batch, graphs, no waiting."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton here, so no kernels to test")
import torch
from concurrent_programs import run_concurrently
from eefast.kernels import exit_head as kernel
from eefast.kernels.launch import Launch
from exit_cases import (
    CRITERIA,
    SENTINEL,
    Case,
    assert_same_bits,
    check,
    cuda_arguments,
    dtypes_and_shapes,
    launched,
    make_case,
    on_gpu,
    without_waiting,
)  # fmt: skip
from torch import Tensor
from torch._inductor.cudagraph_trees import get_manager
from where import GPU, interpreted, run_by_triton, runs_triton

from eefast import ops
from eefast.ops import checks, on_cuda

gpu = pytest.mark.gpu
op = torch.ops.eefast.exit_head.default
run = on_gpu(op) if GPU else kernel.run

# (K, C, H, W), one for each way through the kernels: few and many classes, several samples in a tile and one, channels
# in one block and in several, pixels likewise, odd sizes.
SHAPES = {
    "few classes": (10, 64, 8, 8),
    "one class": (1, 3, 2, 3),
    "odd": (7, 19, 7, 5),
    "small map": (10, 16, 1, 1),
    "large map": (10, 16, 40, 33),
    "classes in blocks": (40, 300, 2, 2),
    "many channels": (10, 2048, 2, 2),
    "many classes": (200, 40, 3, 3),
    "imagenet": (1000, 513, 2, 2),
    "flattened map": (10, 5000, 1, 1),
    "flattened map, one class": (1, 5000, 1, 1),
    "flattened map, few classes": (3, 8192, 1, 1),
    "most classes": (8191, 5, 1, 1),
    "parts of a map": (100, 40, 33, 35),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
CONSTANTS = ("CHANNEL_STRIDE", "PIXEL_STRIDE", "ROWS", "BLOCK_PIXELS", "BLOCK_CHANNELS", "PARTS", "SLICES")


def launches_of(arguments: tuple[Any, ...], **override: Any) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """override: arguments of the last one."""
    lists = torch.empty_like(arguments[4]), torch.empty_like(arguments[4]), torch.empty_like(arguments[6])
    *others, last = kernel.launches(*arguments, *lists)
    return [*others, replace(last, arguments=last.arguments | override)], lists


class TestBatches:
    pytestmark = runs_triton

    @pytest.mark.parametrize(
        ("i", "memory", "live"), [(0, "channels_last", "part"), (1, "contiguous", "all"), (2, "channels_last", "none")]
    )
    @dtypes_and_shapes(SHAPES, ("few classes", "many classes"))
    @pytest.mark.sampled(20)
    def test_shapes_match_float64(
        self, dtype: torch.dtype, shape: tuple[int, ...], i: int, memory: str, live: str
    ) -> None:
        criterion = CRITERIA[(i + list(SHAPES.values()).index(shape)) % len(CRITERIA)]
        check(run, make_case(19, *shape, dtype=dtype, memory=memory, criterion=criterion, live=live, seed=i))

    @shapes
    @pytest.mark.sampled(2)
    def test_answer_depends_on_the_sample_only(self, shape: tuple[int, ...]) -> None:
        """Bitwise the same in any batch and at any position."""
        first = list(SHAPES.values()).index(shape) % 4
        for criterion in CRITERIA if GPU else CRITERIA[first : first + 1]:
            case = make_case(20, *shape, dtype=torch.float16, memory="channels_last", criterion=criterion, final=True)
            whole, split = case.arguments(), case.outputs()
            run(*whole)
            start = 0
            for size in (1, 2, 17):
                part = torch.arange(start, start + size).flip(0)
                live = torch.tensor([size], dtype=torch.int32)
                some = replace(case, rows=case.rows[part], positions=case.positions[part], live=live)
                run(*some.arguments()[:-3], *split)
                start += size
            assert start == 20
            for a, b in zip(whole[-3:], split, strict=True):
                assert_same_bits(a, b)

    @pytest.mark.parametrize("threshold", [-math.inf, math.inf, math.nan])
    @pytest.mark.parametrize("shape", [SHAPES["few classes"], SHAPES["many classes"]])
    @pytest.mark.parametrize("criterion", ["learned", "entropy"])
    def test_all_exit_and_none_exits(self, criterion: str, shape: tuple[int, ...], threshold: float) -> None:
        check(run, replace(make_case(19, *shape, criterion=criterion), threshold=torch.tensor(threshold)))


class TestInterpreted:
    """What only the interpreter can show."""

    pytestmark = interpreted

    @pytest.mark.parametrize("window", [4, 128])
    @pytest.mark.parametrize("threads", [2, 7, 32])
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(("size", "classes"), [(257, 3), (131, 70)])
    @pytest.mark.sampled(5)
    def test_programs_in_any_order(self, size: int, classes: int, seed: int, threads: int, window: int) -> None:
        """The scan over tiles waits for what it needs, whatever runs when; the workspace is left as it was found."""

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            (*others, last), lists = launches_of(arguments, WINDOW=window)
            for launch in others:
                launch.run()
            run_concurrently(last, threads)
            assert not last.arguments["workspace"].any()
            return lists

        check(run, make_case(size, classes, 4, 2, 2, seed=seed))

    @shapes
    @pytest.mark.parametrize("live", ["part", "none"])
    @pytest.mark.sampled(9)
    def test_the_workspace_is_left_as_it_was_found(self, live: str, shape: tuple[int, ...]) -> None:
        launches, _ = launches_of(make_case(19, *shape, live=live).arguments())
        for launch in launches:
            launch.run()
        assert not launches[-1].arguments["workspace"].any()

    @pytest.mark.parametrize("shape", [SHAPES["few classes"], SHAPES["many classes"]])
    @pytest.mark.parametrize(("name", "value"), [("rows", 6), ("rows", -1), ("positions", 8), ("positions", -1)])
    def test_an_index_out_of_range_stops_the_kernel(self, shape: tuple[int, ...], name: str, value: int) -> None:
        case = make_case(3, *shape)
        indices = getattr(case, name).clone()
        indices[1] = value
        with pytest.raises(Exception, match=f"{name} is out of range"):
            kernel.run(*replace(case, **{name: indices}).arguments())

    @pytest.mark.parametrize("final", [True, False])
    @pytest.mark.parametrize("shape", [(10, 16, 3, 3), (100, 16, 1, 1)], ids=str)
    def test_opcheck(self, shape: tuple[int, ...], final: bool) -> None:
        """The op run by the Triton kernel instead of the C++ kernel or the reference."""
        with run_by_triton("exit_head"):
            case = make_case(5, *shape, final=final)
            torch.library.opcheck(op, case.arguments())
            check(op, case)


def test_more_classes_than_the_kernels_keep_in_registers() -> None:
    case = make_case(2, 8192, 3, 1, 1)
    with pytest.raises(RuntimeError, match=r"weight has 8192 classes, on CUDA at most 8191; use engine='reference'"):
        ops.exit_head.run_triton(*case.arguments())


@shapes
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_samples_at_any_address_are_read_in_the_same_way(memory: str, shape: tuple[int, ...]) -> None:
    """What decides the order of the additions: strides, blocks and how far 16 divides the address."""

    def way(case: Case) -> tuple[Any, ...]:
        launches, _ = launches_of(case.arguments())
        features = launches[0].arguments["features"]
        constants = [x.arguments[n] for x in launches for n in CONSTANTS if n in x.arguments]
        return features.data_ptr() % 16, *features.stride()[1:], *constants

    case = make_case(5, *shape, dtype=torch.float16, memory=memory)
    spread = torch.cat([case.features, case.features], 1).reshape(-1)[1:][: case.features.numel()]
    spread = spread.as_strided(case.features.shape, case.features.stride())
    slices = [case.features[i:j] for i, j in ((0, 5), (1, 5), (1, 2), (2, 4), (3, 4))]
    ways = {way(replace(case, features=f, rows=case.rows % len(f))) for f in (*slices, spread, case.features[::2])}
    assert len(ways) == 1
    assert ways.pop()[0] == 0


@pytest.mark.parametrize("strides", [(64, 2**26, 8, 1), (1, 2**20, 2**30, 2**26)], ids=["contiguous", "channels_last"])
def test_maps_spread_wider_than_32_bits_are_copied(strides: tuple[int, ...]) -> None:
    features = torch.empty_strided((2**20, 64, 8, 8), strides, device="meta")
    (launch,), _ = launches_of(replace(make_case(3, 10, 64, 8, 8), features=features).arguments())
    assert launch.arguments["CHANNEL_STRIDE"] == 1


def test_a_stride_that_is_never_used_compiles_nothing_new() -> None:
    case = make_case(1, 10, 64, 8, 8, memory="channels_last")
    single = case.features[:1]
    constants = []
    for stride in (64, 4096, 2**40):
        same = single.as_strided(single.shape, (stride, *single.stride()[1:]))
        (launch,), _ = launches_of(replace(case, features=same, rows=case.rows * 0).arguments())
        constants.append({name: value for name, value in launch.arguments.items() if name.isupper()})
    assert constants[0] == constants[1] == constants[2]


@pytest.mark.parametrize(
    ("features", "rows", "weight", "message"),
    [
        ((1, 2**21, 32, 32), 1, (2, 2**21), r"features has shape .*, on CUDA a sample has fewer than 2³¹ elements"),
        ((1, 2, 1, 1), 2**29, (2, 2), r"rows has 536870912 entries, on CUDA fewer than 2²⁹ at a time; split the batch"),
        ((1, 2**21, 1, 1), 1, (2**10, 2**21), r"weight has 2147483648 elements, on CUDA fewer than 2³¹"),
    ],
)
def test_more_than_the_kernels_count(
    features: tuple[int, ...], rows: int, weight: tuple[int, ...], message: str
) -> None:
    maps, entries, matrix = (torch.empty(shape, device="meta") for shape in (features, (rows,), weight))
    with pytest.raises(RuntimeError, match=message):
        checks.check_range_on_cuda(maps, entries, ("weight", matrix))


def test_launches_on_the_device_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        events.append(wanted)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    features = torch.zeros(1)
    assert on_cuda.on_device_of_features(lambda *args: events.append(args))(features, 1, 2) is None
    assert events == [features.device, (features, 1, 2), "left"]


@gpu
class TestOnTheGPU:
    @pytest.mark.parametrize(("shape", "launches"), [(SHAPES["few classes"], 1), (SHAPES["many classes"], 3)])
    def test_launches_without_waiting(self, shape: tuple[int, ...], launches: int) -> None:
        arguments = cuda_arguments(make_case(257, *shape).arguments())
        without_waiting(lambda: op(*arguments))
        names = launched(lambda: op(*arguments))
        assert len(names) == launches, names

    @pytest.mark.parametrize("n", [256, 4096, 65536])
    def test_repetition_gives_the_same_bits(self, n: int) -> None:
        case = make_case(n, 10, 16, 4, 4, dtype=torch.float16, memory="channels_last", live="part")
        first = cuda_arguments(case.arguments())
        lists = op(*first)
        for _ in range(20):
            again = cuda_arguments(case.arguments())
            for a, b in zip((*op(*again), *again[-3:]), (*lists, *first[-3:]), strict=True):
                assert torch.equal(a, b)
        check(run, case)

    def test_streams_side_by_side(self) -> None:
        """Each stream has a separate workspace: launches that overlap do not disturb each other."""
        cases = [make_case(4096, 10, 16, 4, 4, seed=seed) for seed in range(4)]
        arguments = [cuda_arguments(case.arguments()) for case in cases]
        streams = [torch.cuda.Stream() for _ in cases]
        torch.cuda.synchronize()
        results: list[list[tuple[Tensor, ...]]] = [[] for _ in cases]
        for _ in range(25):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[i].append(op(*arguments[i]))
        torch.cuda.synchronize()
        for i, case in enumerate(cases):
            expected = op(*case.arguments())
            for lists in results[i]:
                assert all(torch.equal(a.cpu(), b) for a, b in zip(lists, expected, strict=True))

    def test_graph_replays_with_changed_inputs(self) -> None:
        cases = [
            make_case(257, *SHAPES["few classes"], seed=seed, live=live) for seed, live in ((0, "all"), (1, "part"))
        ]
        static = cuda_arguments(cases[0].arguments())
        op(*static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lists = op(*static)
        for case in [*cases, cases[0]]:

            def replayed(*arguments: Any) -> tuple[Tensor, ...]:
                for ours, new in zip(static, arguments, strict=True):
                    if isinstance(ours, Tensor):
                        ours.copy_(new)
                graph.replay()
                for ours, theirs in zip(static[-3:], arguments[-3:], strict=True):
                    theirs.copy_(ours)
                return tuple(x.cpu() for x in lists)

            check(replayed, case)

    @pytest.mark.parametrize("classes", [10, 300])
    def test_more_elements_than_a_32_bit_integer_counts(self, classes: int) -> None:
        case = make_case(9, classes, 64, 8, 8, dtype=torch.float16, memory="channels_last", final=True)
        count = 2**31 // case.features[0].numel() + 9
        features = torch.zeros(count, 64, 8, 8, dtype=torch.float16, device="cuda").to(
            memory_format=torch.channels_last
        )
        features[-len(case.features) :] = case.features.cuda()
        there, here = cuda_arguments(case.arguments()), case.arguments()
        op(features, *there[1:4], there[4] + count - len(case.features), *there[5:])
        op(*here)
        for a, b in zip(there[-3:], here[-3:], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)

    def test_compiled_with_cuda_graphs(self) -> None:
        """Growing batches: the workspace outlives what torch.compile allocates while it warms up."""

        @torch.compile(mode="reduce-overhead")
        def compiled(results: int, features: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            written = (
                torch.full((results, 10), SENTINEL, device=features.device),
                torch.full((results,), SENTINEL, device=features.device),
                torch.full((results,), int(SENTINEL), device=features.device),
            )
            return (*op(features, *rest, *written), *written)

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            out = compiled(len(arguments[-1]), *arguments[:-3])
            for given, written in zip(arguments[-3:], out[3:], strict=True):
                given.copy_(written)
            return out[:3]

        for n in (31, 257, 4096, 65536):
            for seed in range(4):
                check(on_gpu(run), make_case(n, 10, 16, 2, 2, live="part", seed=seed))
        assert any(get_manager(0, create_if_none_exists=False).roots.values()), "no graph was recorded"

    @pytest.mark.parametrize("shape", [(10, 10, 3, 3), (10, 64, 8, 8), (200, 37, 3, 3)])
    def test_slices_of_a_batch_give_the_same_bits(self, shape: tuple[int, ...]) -> None:
        case = make_case(37, *shape, dtype=torch.float16, memory="channels_last", final=True)
        whole = cuda_arguments(case.arguments())
        op(*whole)
        for first in range(1, 9):
            part = cuda_arguments(case.arguments())
            part[0] = part[0][first:]
            kept = (part[4] >= first).nonzero()[:, 0]
            part[4], part[5] = part[4][kept] - first, part[5][kept]
            part[6].fill_(len(kept))
            op(*part)
            at = part[5].long()
            for a, b in zip(part[-3:], whole[-3:], strict=True):
                assert torch.equal(a[at], b[at])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_another_device_than_the_current_one(self) -> None:
        case = make_case(257, *SHAPES["few classes"])
        arguments = [x.to("cuda:1") if isinstance(x, Tensor) else x for x in case.arguments()]
        lists, here = op(*arguments), case.arguments()
        for a, b in zip((*lists, *arguments[-3:]), (*op(*here), *here[-3:]), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)

    def test_large_batch(self) -> None:
        case = make_case(65536, 10, 8, 2, 2, dtype=torch.float16, memory="channels_last", live="part")
        check(run, case)
