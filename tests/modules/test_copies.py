"""Copies to try things on: the same answers, nothing shared, whatever was done to the module."""

import pytest
import torch
from changed_backbones import (
    SHAPE,
    SIMPLE,
    as_it_is,
    backbone,
    frozen_parts,
    two_names,
)  # fmt: skip
from networks import images
from snapshots import unchanged
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from eefast.modules.copies import special_kind, working_copy
from eefast.modules.tracing import Tracer


@pytest.mark.parametrize("change", SIMPLE)
@pytest.mark.sampled(8)
def test_a_working_copy_answers_alike_and_shares_nothing(change):
    b = backbone(change).eval()
    x = images(3, SHAPE)
    with torch.no_grad():
        expected = b(x)
        with unchanged(b):
            copied = working_copy(b)
        with unchanged(b, random_numbers=False):
            assert torch.equal(copied(x), expected)
        assert {id(t) for t in copied.parameters()}.isdisjoint({id(t) for t in b.parameters()})
        with unchanged(b, random_numbers=False):
            copied.train()(x)
        assert working_copy(b, "meta")(x.to("meta")).shape == (3, 5)
    names = [name for name, _ in b.named_modules(remove_duplicate=False)]
    assert [name for name, _ in copied.named_modules(remove_duplicate=False)] == names
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in b.named_parameters()]


def test_a_working_copy_keeps_what_is_one_thing():
    b = backbone(two_names)
    b.again, b.list, b.tied = b.first, [b.second, b.fc.weight], b.fc.weight
    copied = working_copy(b)
    assert copied.again is copied.first is copied.layers[0]
    assert copied.list[0] is copied.second
    assert copied.list[1] is copied.tied is copied.fc.weight


def test_a_copy_on_the_meta_device_takes_no_memory():
    b = backbone(as_it_is)
    copied = working_copy(b, "meta")
    assert {t.device.type for t in copied.state_dict().values()} == {"meta"}
    assert {name: (t.shape, t.dtype, t.stride()) for name, t in copied.state_dict().items()} == {
        name: (t.shape, t.dtype, t.stride()) for name, t in b.state_dict().items()
    }


def test_parameters_of_a_copy_require_gradients_as_before_and_keep_their_attributes():
    b = backbone(frozen_parts)
    b.fc.weight.org = torch.ones(3)
    copied = working_copy(b)
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in b.parameters()]
    assert torch.equal(copied.fc.weight.org, b.fc.weight.org)
    assert copied.fc.weight.org is not b.fc.weight.org


def test_lazy_modules_are_refused():
    with pytest.raises(ValueError, match=r"a parameter has no shape yet .*; run the network on one image first"):
        working_copy(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    "wrapped", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["data-parallel", "compiled"]
)
def test_wrapped_modules_are_copied_so_that_they_can_be_traced(wrapped):
    inner = backbone(as_it_is)
    module = wrapped(inner)
    x = images(2, SHAPE)
    copied = working_copy(module)
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in module.named_modules()]
    with torch.no_grad():
        assert torch.equal(copied(x), inner(x))
        (name, _), *_ = copied.named_children()
        called = [n.target for n in Tracer().trace(copied).nodes if n.op == "call_module"]
        assert called[0] == f"{name}.first.0"


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda: torch.ones(3), ""),
        (lambda: nn.Parameter(torch.ones(3)), ""),
        (lambda: nn.Buffer(torch.ones(3)), ""),
        (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "TwoTensor"),
        (lambda: nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))), "TwoTensor"),
    ],
    ids=["tensor", "parameter", "buffer", "subclass", "parameter of one"],
)
def test_tensors_that_replace_operations_are_named(made, kind):
    assert special_kind(made()) == kind
