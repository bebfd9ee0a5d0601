"""ONNX models of stages as other libraries take them: run by OpenVINO, quantised by ONNX Runtime and by NNCF."""

import pytest
import torch

import eefast
from eefast.exporting.exported import load_exported
from eefast.exporting.onnx_files import stage_models

onnx = pytest.importorskip("onnx", reason="needs eefast[onnx]")
runtime = pytest.importorskip("onnxruntime", reason="needs eefast[onnx]")


def logits_of(run, models, x):
    """Of every exit, all images going through all stages."""
    found, features = [], x.numpy()
    for model in models:
        logits, _, *more = run(model)({"x": features})
        found.append(torch.as_tensor(logits))
        features = more[0] if more else None
    return found


def by_runtime(model):
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)


def assert_close(found, net, x, allowed):
    for logits, wanted in zip(found, net.all_exits(x), strict=True):
        largest = wanted.logits.abs().max()
        assert (logits - wanted.logits).abs().max() <= allowed * largest


def test_quantize_static_takes_them(net, x):
    from eefast.measure.quantized_onnx import quantized

    assert_close(logits_of(by_runtime, quantized(stage_models(net), x.numpy()), x), net, x, 0.2)


def by_openvino(model):
    openvino = pytest.importorskip("openvino", reason="needs eefast[openvino]")
    core = openvino.Core()
    read = core.read_model(model) if isinstance(model, bytes) else model
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda given: [value.copy() for value in compiled(given).values()]


def test_openvino_takes_them(net, x):
    assert_close(logits_of(by_openvino, stage_models(net), x), net, x, 1e-3)


def test_nncf_takes_them(net, x):
    openvino = pytest.importorskip("openvino", reason="needs eefast[openvino]")
    nncf = pytest.importorskip("nncf", reason="OpenVINO's quantiser, nncf, is not installed")
    models, inputs = [], x.numpy()
    for model in stage_models(net):
        read = openvino.Core().read_model(model)
        models.append(nncf.quantize(read, nncf.Dataset([{"x": inputs}])))
        inputs = by_runtime(model)({"x": inputs})[-1]
    assert_close(logits_of(by_openvino, models, x), net, x, 0.2)


def test_500_images_of_mnist(tmp_path):
    """The shipped network: per stage and as one model, the exits and classes of the network."""
    from eefast.data.mnist import mnist_test

    net = eefast.load(f"{eefast.__path__[0]}/assets/eenet-mnist")
    x = net.prepare(mnist_test()[0][:500])
    folder, wanted = eefast.export(net, tmp_path / "out", format="onnx"), net(x)
    single = load_exported(folder, single=True)
    one_by_one = [single(image) for image in x.split(1)]
    for found in (load_exported(folder)(x), eefast.ExitResult(*map(torch.cat, zip(*one_by_one, strict=True)))):
        assert found.exit_index.tolist() == wanted.exit_index.tolist()
        assert found.labels.tolist() == wanted.labels.tolist()
