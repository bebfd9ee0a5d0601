"""Every Triton kernel, compiled for GPUs that are not here: fits, no spills, wide loads, tensor cores, busy memory."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton here, so no kernels to compile")
import aot  # noqa: E402
import launch_model  # noqa: E402
import triton.language as tl  # noqa: E402
from eefast.kernels.exit_common import classify  # noqa: E402
from eefast.kernels.launch import Launch  # noqa: E402

from eefast import kernels  # noqa: E402

missing = aot.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
capabilities = pytest.mark.parametrize("capability", aot.SHARED_LIMIT)


@triton.jit(do_not_specialize=["factor"])
def scale_kernel(source, target, size, factor, one, nothing, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    tl.store(target + index * one, tl.load(source + index * one, mask=mask) * factor, mask=mask)


@triton.jit
def dot_kernel(left, right, target, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    row, column, inner = tl.arange(0, 64), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    product = tl.dot(
        tl.load(left + row[:, None] * INNER + inner[None, :]), tl.load(right + inner[:, None] * COLUMNS + column)
    )
    tl.store(target + row[:, None] * COLUMNS + column, product)


@triton.jit
def rows_kernel(
    features, weight, bias, pooled, scratch, SAMPLES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """An exit with many classes whose programs are rows of the batch, each with all pixels and all classes in turn."""
    entry = tl.program_id(0) * 16 + tl.arange(0, 16)
    channel = tl.arange(0, CHANNELS)
    sums = tl.zeros([16, CHANNELS], tl.float32)
    for pixel in range(PIXELS):
        sums += tl.load(features + (entry[:, None].to(tl.int64) * PIXELS + pixel) * CHANNELS + channel)
    tl.store(pooled + entry[:, None] * CHANNELS + channel, sums / (PIXELS * 1.0))
    tl.debug_barrier()
    classify(pooled, weight, bias, scratch, entry, entry < SAMPLES, CHANNELS, CLASSES, 16, 64, 32)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scale(source: torch.Tensor, size: int = 4096, block: int = 1024, **options: int) -> Launch:
    arguments = {
        "source": source, "target": meta(4096, dtype=source.dtype), "size": size, "factor": 16, "one": 1,
        "nothing": None, "BLOCK": block,
    }  # fmt: skip
    return Launch(scale_kernel, (4,), arguments, **options)


def dot(columns: int, inner: int) -> Launch:
    arguments = {
        "left": meta(64, inner), "right": meta(inner, columns), "target": meta(64, columns, dtype=torch.float32),
        "COLUMNS": columns, "INNER": inner,
    }  # fmt: skip
    return Launch(dot_kernel, (1,), arguments)


def rows_of_batch() -> Launch:
    """256 maps of 256×56×56, 1000 classes."""
    arguments = {
        "features": meta(256, 3136, 256), "weight": meta(1001, 256, dtype=torch.float32),
        "bias": meta(1001, dtype=torch.float32), "pooled": meta(256, 256, dtype=torch.float32),
        "scratch": meta(256, 1001, dtype=torch.float32), "SAMPLES": 256, "PIXELS": 3136, "CHANNELS": 256,
        "CLASSES": 1000,
    }  # fmt: skip
    return Launch(rows_kernel, (16,), arguments, num_warps=8)


# The process that compiles has other kernels under these names than the one that asks, so names travel, not launches.
SAMPLES = {
    "aligned": lambda: scale(meta(4096)),
    "float32": lambda: scale(meta(4096, dtype=torch.float32)),
    "16 bytes later": lambda: scale(meta(4104)[8:]),
    "2 bytes later": lambda: scale(meta(4097)[1:]),
    "odd size": lambda: scale(meta(4096), size=4095),
    "256 elements per thread": lambda: scale(meta(4096, dtype=torch.float32), block=8192, num_warps=1),
    "dot": lambda: dot(64, 64),
    "large dot": lambda: dot(256, 256),
    "rows of the batch": rows_of_batch,
}


def compile_sample(name: str, capability: int) -> aot.Report:
    return aot.compile_for(SAMPLES[name](), capability)


def compile_sample_twice(name: str, capability: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        first = compile_sample(name, capability)
        patch.setattr(triton, "compile", None)
        patch.setattr(aot.subprocess, "run", None)
        return compile_sample(name, capability) == first


def signature_and_attributes(name: str) -> tuple[dict, dict, dict]:
    source = aot.prepare(SAMPLES[name](), 80)[0]
    return source.signature, source.constants, source.attrs


def cache_file(name: str, capability: int) -> str:
    return aot.prepare(SAMPLES[name](), capability)[-1].name


def is_compiled() -> bool:
    return isinstance(scale_kernel, triton.JITFunction)


@pytest.fixture(scope="session")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """One process that lasts: the kernels of this one may be interpreted ones, and to import torch takes seconds."""
    with aot.compilers(1) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            assert pool.submit(is_compiled).result()
        yield pool


def jobs() -> Iterator[Any]:
    """Every variant for every generation; all but one generation of each, in turn, are slow."""
    generations = list(aot.SHARED_LIMIT)
    for i, name in enumerate(aot.variants()):
        for j, capability in enumerate(generations):
            marks = [] if j == i % len(generations) else pytest.mark.slow
            yield pytest.param(name, capability, marks=marks, id=f"{name}-{capability}")


@pytest.mark.parametrize(("name", "capability"), [*jobs()])
@pytest.mark.sampled(8)
def test_variant(compiler: ProcessPoolExecutor, name: str, capability: int) -> None:
    report = compiler.submit(aot.compile_variant, name, capability).result()
    assert not report.failures(aot.variants()[name][1]), report


IDLE = (
    "exit_conv_head float16 10x2x28x28",
    "indexed_conv float16 3-16x32x32 3x3/1 residual none",
    "indexed_conv float16 37-200x15x13 3x3/1 residual through",
)
"""Pixels of fewer channels than a product takes, or of no multiple of 16 bytes; bench/ measures none of them."""


@pytest.mark.parametrize("name", aot.variants())
@pytest.mark.sampled(4)
def test_variant_keeps_the_memory_busy(compiler: ProcessPoolExecutor, name: str) -> None:
    report = compiler.submit(aot.compile_variant, name, 90).result()
    found = launch_model.model(aot.variants()[name][0], report)
    assert bool(found.failures()) == (name in IDLE), found


def test_every_launch_of_the_bench_has_a_program_for_each_multiprocessor() -> None:
    few = {
        name
        for name, (launch, _) in aot.variants().items()
        if launch_model.moved(launch) > launch_model.SMALL and launch.grid[0] < launch_model.MULTIPROCESSORS
    }
    assert not few


def test_an_exit_of_whole_rows_would_not(compiler: ProcessPoolExecutor) -> None:
    """The form that many classes had: 16 programs, 3136 passes with 32 bytes per thread each."""
    report = compiler.submit(compile_sample, "rows of the batch", 90).result()
    assert not report.failures({"wide_loads", "tensor_cores"})
    found = launch_model.model(rows_of_batch(), report, passes=3136 + 16 * 8)
    assert [message.split(" ", 1)[1] for message in found.failures()] == [
        "programs, 132 multiprocessors", "KB on their way, 1000 are expected",
        f"passes wait {1e6 * found.waiting:.0f} µs, {3e6 * found.moving + 5:.0f} are allowed",
    ]  # fmt: skip
    assert found.waiting > 1e-3


LOOPS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0030*/              @!P1 LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0070*/               @P2 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_bytes_in_flight_are_those_of_the_innermost_loop_with_most() -> None:
    assert aot.in_flight(LOOPS) == 24
    assert aot.in_flight(LOOPS.replace("0x30", "0x60")) == 25
    assert aot.in_flight(LOOPS.replace(".64 R4", ".U8 R4").replace(".BYPASS.128", "")) == 20


def test_every_kernel_has_variants() -> None:
    """A kernel is what `Launch` can launch, by custom a function whose name ends with _kernel."""
    files = pkgutil.iter_modules(kernels.__path__)
    modules = [importlib.import_module(f"eefast.kernels.{file.name}") for file in files]
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert defined == {launch.kernel.fn.__name__ for launch, _ in aot.variants().values()}


def test_signature_is_that_of_a_launch(compiler: ProcessPoolExecutor) -> None:
    signature, constants, attributes = compiler.submit(signature_and_attributes, "aligned").result()
    assert signature == {
        "source": "*fp16", "target": "*fp16", "size": "i32", "factor": "i32", "one": "constexpr",
        "nothing": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    assert constants == {(4,): 1, (5,): None, (6,): 1024}
    # factor is a multiple of 16 as well, but not specialised.
    assert [path for path, found in attributes.items() if found] == [(0,), (1,), (2,)]


NARROW = ("2 bytes later", "odd size")
LOADS = [(name, capability) for name in ("aligned", NARROW[0]) for capability in aot.SHARED_LIMIT]
LOADS += [(name, 80) for name in ("float32", "16 bytes later", NARROW[1])]


@pytest.mark.parametrize(("name", "capability"), LOADS)
@pytest.mark.sampled(4)
def test_narrow_loads_are_reported(compiler: ProcessPoolExecutor, name: str, capability: int) -> None:
    report = compiler.submit(compile_sample, name, capability).result()
    assert not report.failures()
    failures = report.failures({"wide_loads"})
    assert bool(failures) == (name in NARROW), report
    assert not failures or f"sm_{capability}: 0 16-byte global loads" in failures[0]


@capabilities
@pytest.mark.sampled(2)
def test_spills_are_reported(compiler: ProcessPoolExecutor, capability: int) -> None:
    report = compiler.submit(compile_sample, "256 elements per thread", capability).result()
    assert report.stack > 0
    (failure,) = report.failures()
    assert failure.startswith(f"sm_{capability}: {report.spills} spill instructions")


@capabilities
@pytest.mark.sampled(2)
def test_too_much_shared_memory_is_reported(compiler: ProcessPoolExecutor, capability: int) -> None:
    """Both factors together are 160 KB: more than an RTX card has, less than an A100 has."""
    report = compiler.submit(compile_sample, "large dot", capability).result()
    failures = [failure for failure in report.failures() if "shared memory, the limit is 101376" in failure]
    assert bool(failures) == (capability in (86, 89)), report


@capabilities
@pytest.mark.sampled(2)
def test_missing_tensor_cores_are_reported(compiler: ProcessPoolExecutor, capability: int) -> None:
    assert not compiler.submit(compile_sample, "dot", capability).result().failures({"tensor_cores"})
    failures = compiler.submit(compile_sample, "aligned", capability).result().failures({"tensor_cores"})
    assert failures == [f"sm_{capability}: 0 tensor core instructions, at least 1 is expected"]


def test_unknown_expectation(compiler: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match=r"expects = \['wide_load'\] is unknown"):
        compiler.submit(compile_sample, "aligned", 80).result().failures({"wide_load"})


def test_unchanged_kernels_are_not_compiled_again(compiler: ProcessPoolExecutor) -> None:
    assert compiler.submit(compile_sample_twice, "aligned", 80).result()


def test_cache_tells_launches_apart(compiler: ProcessPoolExecutor) -> None:
    files = [compiler.submit(cache_file, name, capability).result() for name in SAMPLES for capability in (80, 90)]
    # What is aligned to 16 bytes is the same to the compiler, wherever it is.
    assert len(set(files)) == len(files) - 2


def test_interpreted_kernels_are_refused() -> None:
    interpreted = Launch(SimpleNamespace(), (1,), {})
    with pytest.raises(TypeError, match="unset TRITON_INTERPRET"):
        aot.compile_for(interpreted, 80)
