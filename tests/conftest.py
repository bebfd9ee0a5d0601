"""What all tests share: few threads, poisoned fresh memory, a limit of memory, Triton interpreted where no GPU is."""

import ctypes
import gc
import os
import resource
import signal
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from where import GPU

# cuBLAS wants a workspace of a stated size where algorithms are to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Parallel test processes with several spinning threads each slow one another down many times over.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# nohup, or a shell that starts the tests in the background, has these ignored; commands would then ignore them, too.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """Uninitialised tensors are filled with NaN or the largest integer, so that reading them shows."""
    if os.environ.get("EEFAST_TEST_POISON") == "0":
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


PEAK_GIGABYTES = 3
"""What a test process, or one that it starts, may take: machines have 4 GB per core and more."""


def peak_gigabytes():
    """Of this process, and the largest of those that it has started and waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(of).ru_maxrss for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit / 1e9


kept_gigabytes = [0.0]


def give_back_memory():
    """To the system, where 1.5 GB are in use and 0.3 GB more than after the last time: glibc keeps what is freed."""
    statm = Path("/proc/self/statm")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not statm.exists():
        return

    def used():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9

    if used() > max(1.5, kept_gigabytes[0] + 0.3):
        gc.collect()
        trim(0)
        kept_gigabytes[0] = used()


@pytest.fixture(autouse=True)
def limit_memory():
    """The first test after which a process is too large fails; on a GPU the driver's own memory counts, too."""
    before = peak_gigabytes()
    yield
    give_back_memory()
    after = peak_gigabytes()
    if not GPU and before < PEAK_GIGABYTES <= after:
        pytest.fail(
            f"a process of {after:.1f} GB; {PEAK_GIGABYTES} are the limit, {before:.1f} it was before this test"
        )


@pytest.fixture(autouse=GPU)
def stop_after_a_cuda_error():
    """After an error on the device every later call in the process fails; a worker that ends is named and replaced."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        raise


def pytest_report_header():
    return "GPU tests: " + (
        torch.cuda.get_device_name() if GPU else "deselected, no CUDA device; run `make gpu` on one"
    )


def pytest_collection_finish():
    """What there is now stays, so the garbage collector need only look at what tests make: quickly, therefore often."""
    gc.collect()
    gc.freeze()


def sampled(items, count):
    """`count` of a function's cases or more: every value of each parameter is in one, unless there are over `count`."""
    names = items[0].callspec.indices
    few = [name for name in names if len({item.callspec.indices[name] for item in items}) <= count]
    seen, taken = set(), []
    # By a checksum, since cases at equal distances may share a value of an inner parameter.
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        values = {(name, item.callspec.indices[name]) for name in few}
        if len(taken) < count or not values <= seen:
            seen |= values
            taken.append(item)
    return taken


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of functions marked `sampled(count)` the other cases are marked slow."""
    functions = {}
    for item in items:
        if item.get_closest_marker("sampled") and hasattr(item, "callspec"):
            functions.setdefault((item.parent.nodeid, item.originalname), []).append(item)
    for cases in functions.values():
        ready = [item for item in cases if not item.get_closest_marker("slow")]
        if ready:
            for item in set(ready).difference(sampled(ready, ready[0].get_closest_marker("sampled").args[0])):
                item.add_marker("slow")
    if GPU:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True, scope="session")
def plan_quickly():
    """Planning measures no more often than it must: which way is the fastest decides no test."""
    from eefast.planning import probe, tuning

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "LIMIT", 0.0)
        patch.setattr(tuning, "SECONDS", 0.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def assert_in_the_interpreter():
    """Interpreted kernels obey `tl.device_assert` as compiled ones do, see `Launch.options`."""
    if not GPU and find_spec("triton"):
        from triton.runtime import interpreter

        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
