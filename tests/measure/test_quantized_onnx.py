"""Models that ONNX Runtime quantised: what is in eight bits, and chained models get one another's outputs."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from eefast.measure import runtimes
from eefast.measure.quantized_onnx import ON_MAPS, quantized

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, runtimes.ONNX_NEEDS)), reason=f"needs {runtimes.ONNX_NEEDS}: pip install 'eefast[bench]'"
)


def quantised_inputs(model: bytes) -> set[str]:
    """The types of nodes whose input comes from eight bits."""
    import onnx

    graph = onnx.load_from_string(model).graph
    made = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return {node.op_type for node in graph.node if made & set(node.input)} - {"QuantizeLinear"}


@pytest.fixture(scope="module")
def chain() -> tuple[list[nn.Module], list[bytes]]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 7))
    modules = [first.eval(), second.eval()]
    examples = [torch.randn(2, 3, 9, 9), torch.randn(2, 5, 7, 7)]
    models = [runtimes.onnx_model(m, x, ["y"]) for m, x in zip(modules, examples, strict=True)]
    return modules, models


@pytest.mark.parametrize(("only", "linear"), [((), True), (ON_MAPS, False)])
def test_what_is_in_eight_bits(chain: tuple[list[nn.Module], list[bytes]], only: tuple[str, ...], linear: bool) -> None:
    modules, models = chain
    x = torch.randn(37, 3, 9, 9)
    found = quantized(models, x.numpy(), only)
    assert "Conv" in quantised_inputs(found[0]) & quantised_inputs(found[1])
    assert bool({"Gemm", "MatMul"} & quantised_inputs(found[1])) is linear
    # Ranges of the second model are those of the first one's outputs: other ones would cut nearly all off.
    between = torch.from_numpy(runtimes.onnx_runtime_call(found[0])(x.numpy())[0])
    last = torch.from_numpy(runtimes.onnx_runtime_call(found[1])(between.numpy())[0])
    with torch.no_grad():
        expected = modules[1](modules[0](x))
    assert (last - expected).abs().max() < 0.1 * expected.abs().max()


def test_what_cannot_be_quantised_says_so() -> None:
    with pytest.raises(RuntimeError, match="quantize_static: "):
        quantized([b"no model"], torch.randn(2, 3, 9, 9).numpy())
