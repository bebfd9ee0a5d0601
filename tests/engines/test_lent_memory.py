"""Memory is lent again when nobody holds it, and never before."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from eefast.engines import lent_memory
from eefast.engines.lent_memory import LentMemory


def test_what_nobody_holds_is_lent_again() -> None:
    memory = LentMemory()
    first = memory.lend((33,), np.uint8)
    address = first.data_ptr()
    part = first[3:7].view(2, 2)
    del first
    second = memory.lend((33,), np.uint8)
    assert second.data_ptr() != address  # a part of it is in use
    del part
    assert memory.lend((20,), np.uint8).data_ptr() == address
    assert memory.lend((34,), np.uint8).data_ptr() not in (address, second.data_ptr())


def test_large_memory_is_not_kept(monkeypatch) -> None:
    monkeypatch.setattr(lent_memory, "KEPT_BYTES", 32)
    memory = LentMemory()
    memory.lend((33,), np.uint8)
    assert not memory._kept
    memory.lend((32,), np.uint8)
    assert len(memory._kept) == 1


def test_no_more_is_kept_than_said() -> None:
    memory = LentMemory()
    held = [memory.lend((9,), np.uint8) for _ in range(7)]
    assert len({one.data_ptr() for one in held}) == 7
    assert len(memory._kept) == lent_memory.KEPT


def test_it_can_be_used_in_every_mode() -> None:
    with torch.inference_mode():
        made = LentMemory().lend((5, 3), np.float32)
    assert not made.is_inference()
    assert (made.shape, made.dtype) == ((5, 3), torch.float32)
    assert LentMemory().lend((0, 3), np.float32).shape == (0, 3)


def test_threads_never_share_a_piece() -> None:
    memory = LentMemory()

    def work(number: int) -> bool:
        alone = True
        for _ in range(300):
            mine = memory.lend((257,), np.uint8).fill_(number)
            gc.get_count()  # another thread may run here
            alone &= bool((mine == number).all())
        return alone

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
