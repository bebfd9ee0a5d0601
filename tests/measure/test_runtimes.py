"""Models for ONNX Runtime and OpenVINO: every output, any batch size, PyTorch's number of threads."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eefast.measure import runtimes
from eefast.runtimes import onnx_models

WITH_ONNX, WITH_OPENVINO = (
    pytest.mark.skipif(not all(map(find_spec, needs)), reason=f"needs {needs}: pip install 'eefast[bench]'")
    for needs in (runtimes.ONNX_NEEDS, runtimes.OPENVINO_NEEDS)
)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.conv(x)
        return features.mean((2, 3)), features.amax((1, 2, 3))


@pytest.fixture
def two():
    """A module, and its model."""
    torch.manual_seed(0)
    module = TwoOutputs().eval()
    return module, runtimes.onnx_model(module, torch.randn(2, 3, 7, 7), ["mean", "most"])


@pytest.mark.parametrize(
    ("present", "needs", "message"),
    [
        ((), runtimes.ONNX_NEEDS, "onnx and onnxruntime not installed: pip install onnx onnxruntime"),
        (("onnx",), runtimes.OPENVINO_NEEDS, "^openvino not installed: pip install openvino$"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, present, needs, message):
    monkeypatch.setattr(onnx_models, "find_spec", lambda name: name in present or None)
    with pytest.raises(ImportError, match=message):
        runtimes.check_installed(needs)


def test_what_is_there_is_not_missed(monkeypatch):
    monkeypatch.setattr(onnx_models, "find_spec", lambda name: object())
    runtimes.check_installed((*runtimes.ONNX_NEEDS, *runtimes.OPENVINO_NEEDS))


def test_a_session_has_as_many_threads_as_pytorch(monkeypatch):
    """And what `adjust` changes, on the CPU only."""
    made = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=lambda *a, **k: (a, k))
    monkeypatch.setitem(sys.modules, "onnxruntime", made)
    (model, options), more = runtimes.onnx_runtime(b"model", lambda options: setattr(options, "profile", True))
    assert (model, more) == (b"model", {"providers": ["CPUExecutionProvider"]})
    assert (options.intra_op_num_threads, options.profile) == (torch.get_num_threads(), True)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "f32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("shape", [None, (5, 3, 7, 7)])
def test_openvino_computes_in_the_dtype_that_was_asked_for(monkeypatch, dtype, precision, shape):
    seen = SimpleNamespace(shape=None)

    class Core:
        def read_model(self, model):
            return SimpleNamespace(reshape=lambda shape: setattr(seen, "shape", shape))

        def compile_model(self, model, device, options):
            seen.device, seen.options = device, options
            request = SimpleNamespace(
                infer=lambda inputs, share_inputs: setattr(seen, "inputs", inputs),
                get_output_tensor=lambda i: SimpleNamespace(data=f"output {i}"),
            )
            return SimpleNamespace(create_infer_request=lambda: request, outputs=[0, 1])

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    call = runtimes.openvino(b"model", dtype, shape)
    assert call(("x", "y")) == ["output 0", "output 1"]
    assert (seen.device, seen.inputs, seen.shape) == ("CPU", ["x", "y"], shape and list(shape))
    assert seen.options["INFERENCE_PRECISION_HINT"] == precision
    assert seen.options["INFERENCE_NUM_THREADS"] == torch.get_num_threads()


@WITH_ONNX
@pytest.mark.parametrize("n", [1, 2, 31])
def test_onnx_runtime_gives_every_output_for_any_batch_size(two, n):
    module, model = two
    x = torch.randn(n, 3, 7, 7)
    found = runtimes.onnx_runtime_call(model)(x.numpy())
    for got, expected in zip(found, module(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=1e-4, atol=1e-5)


@WITH_OPENVINO
@pytest.mark.parametrize("shape", [None, (31, 3, 7, 7)])
def test_openvino_gives_every_output(two, shape):
    module, model = two
    x = torch.randn(31, 3, 7, 7)
    found = runtimes.openvino(model, shape=shape)([x.numpy()])
    for got, expected in zip(found, module(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got.copy()), expected.detach(), rtol=1e-4, atol=1e-5)
