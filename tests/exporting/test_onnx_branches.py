"""The model for single images: one graph in which later stages are computed only where no exit before was taken."""

import pytest
import torch

import eefast
from eefast.exporting.onnx_files import SINGLE

onnx = pytest.importorskip("onnx", reason="needs eefast[onnx]")
runtime = pytest.importorskip("onnxruntime", reason="needs eefast[onnx]")


@pytest.fixture(scope="module")
def path(net, tmp_path_factory):
    return eefast.export(net, tmp_path_factory.mktemp("exported") / "onnx", format="onnx") / SINGLE


def test_it_takes_single_images_only(path, x):
    with pytest.raises(Exception, match="invalid dimensions"):
        runtime.InferenceSession(path).run(None, {"x": x[:2].numpy()})


def test_its_thresholds_are_those_of_the_network_and_may_be_given(path, net, x):
    session, image = runtime.InferenceSession(path), x[:1].numpy()
    assert session.run(["exit"], {"x": image})[0].tolist() == net(x[:1]).exit_index.tolist()
    for i in range(3):
        limits = torch.full((2,), torch.inf)
        limits[i:] = -torch.inf
        assert session.run(["exit"], {"x": image, "thresholds": limits.numpy()})[0].tolist() == [i]


def convolutions(graph):
    """Of the nodes that always run."""
    return sum(node.op_type == "Conv" for node in graph.node)


def test_only_the_first_stage_always_runs(path):
    graph = onnx.load(path).graph
    (branch,) = (node for node in graph.node if node.op_type == "If")
    then, otherwise = (attribute.g for attribute in branch.attribute)
    then, otherwise = (then, otherwise) if len(then.node) < len(otherwise.node) else (otherwise, then)
    assert convolutions(then) == 0
    assert convolutions(graph) > 0
    assert convolutions(otherwise) > 0
    (inner,) = (node for node in otherwise.node if node.op_type == "If")
    assert sum(convolutions(attribute.g) for attribute in inner.attribute) > 0
