"""Bytes → the same damaged, and the claim that such files load or raise `CheckpointError`."""

import torch
from hypothesis import strategies as st

from eefast import EarlyExitNet
from eefast.checkpoint.loading import CheckpointError, load


def damage(content: bytes, header: int | None = None) -> st.SearchStrategy[bytes]:
    """`content` cut short, or with some bytes changed, preferably among the first `header` ones."""
    position = st.integers(0, (header or len(content)) - 1) | st.integers(0, len(content) - 1)
    changes = st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4)
    return st.integers(0, len(content) - 1).map(lambda n: content[:n]) | changes.map(lambda c: changed(content, c))


def changed(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    copy = bytearray(content)
    for position, value in changes:
        copy[position % len(copy)] = value
    return bytes(copy)


def loads_or_complains(path):
    try:
        net = load(path, **({} if path.is_dir() else {"input_shape": (1, 8, 8)}))
    except CheckpointError:
        return
    assert isinstance(net, EarlyExitNet)
    with torch.no_grad():
        result = net(torch.zeros(2, *net.input_shape, dtype=next(net.parameters()).dtype))
    assert result.logits.shape == (2, net.num_classes)
