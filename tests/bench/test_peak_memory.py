"""Peak memory: of this process on a CPU, seen to rise and to be reset; beyond what was held before on a GPU."""

import mmap
from pathlib import Path

import pytest
import torch
from peak_memory import of_process, peak_memory

MEGABYTE = 2**20


def peaks_can_be_reset():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not peaks_can_be_reset(), reason="this system does not reset the peak")
def test_the_peak_of_this_process_is_reset():
    def hold(megabytes):
        def run():
            # Fresh pages: malloc may hand out some that the tests before freed, which are resident already.
            with mmap.mmap(-1, megabytes * MEGABYTE) as pages:
                for _ in range(megabytes):
                    pages.write(bytes(MEGABYTE))
            return megabytes

        return run

    low = peak_memory(hold(1), "cpu")
    high, again = peak_memory(hold(128), "cpu"), peak_memory(hold(1), "cpu")
    assert (low[0], high[0]) == (1, 128)
    assert 120 * MEGABYTE < high[1] - low[1] < 160 * MEGABYTE
    assert again[1] < high[1] - 100 * MEGABYTE


def test_the_figure_is_in_bytes_or_none_where_it_is_unknown(tmp_path):
    assert of_process(lambda: "done", tmp_path / "nowhere") == ("done", None)
    (tmp_path / "status").write_text("VmPeak:\t  99 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 1 kB\n")
    assert of_process(lambda: "done", tmp_path) == ("done", 1234 * 1024)
    (tmp_path / "status").write_text("VmRSS:\t 1 kB\n")
    assert of_process(lambda: "done", tmp_path) == ("done", None)


def test_an_error_comes_through_once(tmp_path):
    called = []

    def fails():
        called.append(1)
        raise OSError("the run's own")

    with pytest.raises(OSError, match="the run's own"):
        of_process(fails, tmp_path)
    assert called == [1]


@pytest.mark.gpu
def test_a_gpu_counts_what_is_reserved_beyond_what_was_before():
    before = torch.empty(64 * MEGABYTE, dtype=torch.uint8, device="cuda")
    held, found = peak_memory(lambda: torch.empty(256 * MEGABYTE, dtype=torch.uint8, device="cuda"), "cuda")
    assert 256 * MEGABYTE <= found < 300 * MEGABYTE
    del held
    _, found = peak_memory(lambda: None, "cuda")
    assert found == 0
    assert len(before)
