"""Baselines: they answer as the network's own layers do, for 1, 3 and 31 images."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds

from eefast import zoo
from eefast.measure import baselines, runtimes
from eefast.runtimes import onnx_models

WITH_ONNX, WITH_OPENVINO = (
    pytest.mark.skipif(not all(map(find_spec, needs)), reason=f"needs {needs}: pip install 'eefast[bench]'")
    for needs in (runtimes.ONNX_NEEDS, runtimes.OPENVINO_NEEDS)
)


@pytest.fixture(scope="module")
def net():
    return lived_in(zoo.eenet("eenet8", input_shape=(3, 12, 12)), 3)


def compiled(net):
    return baselines.compiled(baselines.plain(net))


@pytest.mark.parametrize(
    "baseline",
    [
        baselines.eager,
        baselines.eager_contiguous,
        compiled,
        pytest.param(baselines.onnx_runtime, marks=WITH_ONNX),
        pytest.param(baselines.openvino, marks=WITH_OPENVINO),
    ],
)
def test_without_early_exits_the_final_exit_answers(net, baseline, monkeypatch):
    if baseline is compiled:
        # What is compiled for each shape, without the minutes that a C++ compiler takes.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    run, x = baseline(net), images(31, (3, 12, 12))
    with torch.no_grad():
        expected = net.all_exits(x)[-1].logits
    for n in (31, 1, 3, 31):
        torch.testing.assert_close(run(x[:n]).clone(), expected[:n], rtol=1e-4, atol=1e-4)


WITH_BOTH = pytest.mark.skipif(
    not all(map(find_spec, ("onnxruntime", *runtimes.OPENVINO_NEEDS))),
    reason="needs ONNX Runtime, which quantises, and OpenVINO: pip install 'eefast[bench]'",
)


@pytest.mark.parametrize(
    "baseline",
    [
        pytest.param(baselines.onnx_runtime_int8, marks=WITH_ONNX),
        pytest.param(baselines.openvino_int8, marks=WITH_BOTH),
    ],
)
def test_others_quantise_the_exported_network(net, baseline):
    """Convolutions in eight bits: near the float32 network, but not that network."""
    x = images(64, (3, 12, 12))
    run = baseline(net, x[:32])
    with torch.no_grad():
        expected = net.all_exits(x)[-1].logits
    for n in (3, 31, 64):
        error = (run(x[:n]).clone() - expected[:n]).square().mean().sqrt() / expected.std()
        assert 1e-4 < error < 0.2


@pytest.mark.parametrize("folded", [False, True])
def test_the_masked_loop_answers_as_one_by_one(net, folded):
    x = images(31, (3, 12, 12))
    spread_thresholds(net, x, 0.4)
    run, alone = baselines.masked(net, folded=folded), one_by_one(net, x)
    assert set(alone.exit_index.tolist()) == {0, 1, 2}
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same_answers(run(x), alone, net)
    net.thresholds.fill_(2)
    assert run(x).exit_index.tolist() == [2] * 31, "the thresholds of this moment count"


def test_onnx_runtime_that_is_missing_says_what_to_install(net, monkeypatch):
    monkeypatch.setattr(onnx_models, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="onnx and onnxruntime not installed: pip install onnx onnxruntime"):
        baselines.onnx_runtime(net)
