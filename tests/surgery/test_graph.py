"""Graphs of backbones: traced or followed from module to module, in eval and in training mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from custom_backbones import SMALL, Custom, assert_answers_of, checked, in_place, make, plain, residual
from networks import images, lived_in
from torch import Tensor, nn
from torch.nn import functional as F

from eefast.surgery.attachment import attach
from eefast.surgery.calls import watch
from eefast.surgery.graph import Trace, traced


@pytest.mark.parametrize("forward", [plain, in_place, checked, residual])
@pytest.mark.parametrize("exits", [[], ["first"], ["first", "second"]])
def test_however_it_is_written(forward, exits):
    backbone = make(forward)
    net = attach(backbone, exits, input_shape=SMALL)
    x = images(33, SMALL)
    for n in (1, 3, 33):
        assert_answers_of(net, backbone, x[:n].clone())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_answers_of(other, backbone, x.clone())
        assert other.state_dict().keys() == net.state_dict().keys()


def dropping(m: Custom, x: Tensor) -> Tensor:
    x = F.dropout(m.first(x), 0.5, training=m.training)
    return m.fc(F.dropout(m.pool(m.second(x)).flatten(1), 0.5, m.training))


@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("mode", [True, False])
def test_dropout_as_a_function_follows_the_mode_that_it_was_traced_in_and_the_other(copied, mode):
    backbone = make(dropping).train(mode)
    net = copied(attach(backbone, ["first"], input_shape=SMALL))
    x = torch.ones(3, *SMALL)
    assert_answers_of(net.eval(), backbone, x)
    assert (net.stages[1](net.stages[0](x)) != 0).all()
    net.train()
    features = net.stages[1](net.stages[0](x))
    assert not torch.equal(features, net.stages[1](net.stages[0](x))), "dropout inside of a stage"
    assert (net.heads[1].pool(features) == 0).any(), "dropout after the pooling"


def test_dtype_and_optional_arguments_of_the_backbone():
    class Optional(Custom):
        def forward(self, x: Tensor, mask: Tensor | None = None, features_only: bool = False) -> Tensor:
            x = self.first(x) if mask is None else self.first(x * mask)
            return x if features_only else self.fc(self.pool(self.third(x)).flatten(1))

    backbone = lived_in(Optional(), 1).bfloat16()
    net = attach(backbone, ["first"], input_shape=SMALL)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert_answers_of(net, backbone, images(3, SMALL).bfloat16())


def unlike_in_training(m: Custom, x: Tensor) -> Tensor:
    return plain(m, x * 2 if m.training else x)


def neither_traced_nor_a_chain(m: Custom, x: Tensor) -> Tensor:
    return plain(m, x * 2 if x.mean() > 0 else x * 3)


def unlike_in_training_and_not_traced(m: Custom, x: Tensor) -> Tensor:
    return checked(m, x * 2 if m.training else x)


def written_to_in_training(m: Custom, x: Tensor) -> Tensor:
    if x.mean() > 1e30:  # not traced
        x = x * 2
    x = m.first(x)
    F.dropout(x, 0.5, m.training, inplace=True)
    return m.fc(m.pool(m.second(x)).flatten(1))


def written_to_before_it_returns(m: Custom, x: Tensor) -> Tensor:
    return checked(m, x).mul_(2)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (written_to_in_training, "what 'second' receives was written to by code between the modules"),
        (written_to_before_it_returns, "'the backbone' returns something other than its last module"),
        (unlike_in_training, "in training mode the backbone computes"),
        (unlike_in_training_and_not_traced, "'first' receives something other than"),
        (
            neither_traced_nor_a_chain,
            "cannot be cut: torch.fx cannot trace it .*'first' receives something other than",
        ),
    ],
)
def test_backbones_that_cannot_be_followed_are_refused(forward, message):
    with pytest.raises(ValueError, match=message):
        attach(make(forward), ["first"], input_shape=SMALL)


class AnyNumber(Custom):
    def forward(self, *xs: Tensor) -> Tensor:
        return plain(self, xs[0] * 2)


def test_a_backbone_whose_forward_names_no_images_is_refused():
    backbone = make(plain)
    backbone.__class__ = AnyNumber
    with pytest.raises(ValueError, match=r"cannot trace it \(its forward takes \*xs, not an argument for the images"):
        attach(backbone, ["first"], input_shape=SMALL)


def trace_of(backbone: nn.Module, names: list[str]) -> Trace:
    x = images(2, SMALL)
    return traced(backbone, watch(backbone, x), [x, images(3, SMALL)], names)


@pytest.mark.parametrize("forward", [plain, checked], ids=["traced", "followed"])
@torch.no_grad()
def test_a_graph_ends_with_the_last_name_and_knows_what_each_module_returned(forward):
    backbone = make(forward)
    trace = trace_of(backbone, ["first", "third"])
    assert trace.nodes[-1] is trace.returned["third"]
    first, second = trace.returned["first"], trace.returned["second"]
    assert torch.equal(trace.values[first], backbone.first(images(2, SMALL)))
    assert [n.target for n in trace.between(first, second)] == ["norm", "relu", "second"]
    assert trace.also_needed(first) == []
    assert trace.is_map(first)


@torch.no_grad()
def test_a_value_that_a_later_node_reads_is_needed_after_a_cut():
    def around(m: Custom, x: Tensor) -> Tensor:
        x = m.second(m.first(x))
        return m.fc(m.pool(m.norm(m.third(x)) + x).view(x.size(0), -1))

    trace = trace_of(make(around), ["second", "third", "fc"])
    assert trace.also_needed(trace.returned["third"]) == [trace.returned["second"]]
    assert trace.also_needed(trace.returned["second"]) == []
    assert trace.values.get(trace.batch_size) is None, "one node in the place of all sizes"
    assert not trace.is_map(trace.returned["fc"])


@pytest.mark.parametrize(
    ("name", "targets"), [("body", ["body", "fc"]), ("body.0", ["body.0", "body.1", "fc"])], ids=["whole", "opened"]
)
@torch.no_grad()
def test_only_modules_with_a_cut_inside_are_opened(name, targets):
    backbone = make(lambda m, x: m.fc(m.body(x).mean((2, 3))), body=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    assert [n.target for n in trace_of(backbone, [name, "fc"]).nodes if n.op == "call_module"] == targets
