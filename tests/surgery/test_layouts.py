"""How values of a backbone are maps: told by their shape, made and undone without changing or moving a number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from eefast.surgery.layouts import CHANNELS_LAST, MAP, TOKENS, as_map, layout_of, undone


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 8, 16, 12), MAP),
        ((2, 8, 8, 6), MAP),
        ((2, 8, 1, 1), MAP),
        ((2, 16, 12, 40), CHANNELS_LAST),
        ((2, 8, 6, 96), CHANNELS_LAST),
        ((2, 16, 12, 8), MAP),
        ((2, 49, 24), TOKENS),
        ((3, 8, 16, 12), None),
        ((3, 49, 24), None),
        ((2, 8), None),
        ((2, 3, 4, 5, 6), None),
    ],
)
def test_layouts_are_told_by_their_shape(shape, layout):
    """Of two images of 16 × 12 pixels."""
    assert layout_of(torch.zeros(shape), torch.zeros(2, 3, 16, 12)) == layout


def test_rows_have_no_tokens():
    rows = torch.zeros(2, 3, 50)
    assert layout_of(torch.zeros(2, 8, 25), rows) == MAP
    assert layout_of(torch.zeros(2, 8), rows) is None
    assert layout_of(torch.zeros(2, 8, 25, 1), rows) is None


def mapped(layout: str, *steps) -> fx.GraphModule:
    graph = fx.Graph()
    node = graph.placeholder("value")
    for step in steps:
        node = step(graph, node, layout)
    graph.output(node)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("layout", "shape", "read"),
    [
        (TOKENS, (3, 17, 24), lambda x: x.transpose(1, 2)[:, :, None, :]),
        (CHANNELS_LAST, (3, 5, 6, 24), lambda x: x.movedim(3, 1)),
        (MAP, (3, 24, 5, 6), lambda x: x),
    ],
)
def test_a_map_is_made_in_place_and_undone(layout, shape, read):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made: Tensor = mapped(layout, as_map)(value)
    assert torch.equal(made, read(value))
    assert made.data_ptr() == value.data_ptr(), "nothing is copied"
    assert layout == MAP or made.is_contiguous(memory_format=torch.channels_last)
    back = mapped(layout, as_map, undone)(value)
    assert torch.equal(back, value)
    assert back.data_ptr() == value.data_ptr(), "nothing is copied"
    # An engine may hand the map on in another memory layout.
    back = mapped(layout, undone)(made.contiguous())
    assert torch.equal(back, value)
    assert back.is_contiguous()
