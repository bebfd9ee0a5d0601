"""Stores on the CPU's GPU of fibers: seen by the block after a barrier, by other blocks after a fence, not before."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
from simt_build import ROOT, build

LINES = [
    number
    for number, line in enumerate((ROOT / "tests/simt/messages.cpp").read_text().splitlines(), start=1)
    if "__syncthreads();" in line or "__threadfence();" in line
]
ORDERS = range(8)
TEXT = list(range(1, 65))


class Mail(ctypes.Structure):
    """As in tests/simt/messages.cpp."""

    _fields_ = (("text", ctypes.c_int * 64), ("sent", ctypes.c_int), ("received", ctypes.c_int * 64))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = build("messages")
    found.messages.restype = ctypes.c_char_p
    return found


def received(library: ctypes.CDLL, dropped: int, delayed: bool) -> Iterator[list[int]]:
    for order in ORDERS:
        mail = Mail()
        assert library.messages(ctypes.byref(mail), order, dropped, delayed) is None
        assert [list(mail.text), mail.sent] == [TEXT, 1], "at the end of the launch all stores have arrived"
        yield list(mail.received)


@pytest.mark.parametrize("delayed", [False, True])
def test_a_message_in_the_right_order_arrives(library: ctypes.CDLL, delayed: bool) -> None:
    assert all(text == TEXT for text in received(library, 0, delayed))


@pytest.mark.parametrize("line", LINES)
def test_without_a_barrier_or_a_fence_it_does_not(library: ctypes.CDLL, line: int) -> None:
    assert any(text != TEXT for text in received(library, line, True))


@pytest.mark.parametrize("line", [LINES[1], LINES[2]])
def test_fences_matter_only_where_stores_are_delayed(library: ctypes.CDLL, line: int) -> None:
    assert all(text == TEXT for text in received(library, line, False))
