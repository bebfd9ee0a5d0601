"""Memory of a result is used again when nothing holds the result, never before."""

import gc
import threading

import pytest
import torch

from eefast.engines.kept_memory import LINE, MOST, KeptMemory


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (0, 5, 7, 2), (1, 1, 1, 1), (MOST // 4, 2, 3, 1)])
def test_channels_last(shape, dtype):
    found = KeptMemory().empty(shape, dtype)
    assert (tuple(found.shape), found.dtype) == (shape, dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if 0 < found.nbytes <= MOST:
        assert found.data_ptr() % LINE == 0


def test_used_again_once_nothing_holds_it():
    memory = KeptMemory()
    first = memory.empty((4, 3, 5, 5), torch.float32)
    address = first.data_ptr()
    first.fill_(1.0)
    part = first[:2]
    del first
    second = memory.empty((4, 3, 5, 5), torch.float32).fill_(2.0)
    assert second.data_ptr() != address
    assert (part == 1).all()
    # The second is the one that is kept now; smaller results fit into its memory.
    address = second.data_ptr()
    del second
    gc.collect()
    third = memory.empty((2, 3, 5, 5), torch.float32)
    assert third.data_ptr() == address
    del third
    assert memory.empty((16, 3, 5, 5), torch.uint8).data_ptr() == address


def test_threads_never_share():
    memory, wrong = KeptMemory(), []

    def work(number):
        for i in range(300):
            mine = memory.empty((2, 3, 8, 8), torch.float32).fill_(number + i)
            if (mine != number + i).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
