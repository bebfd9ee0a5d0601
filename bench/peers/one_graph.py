"""Early exit as one ONNX graph: Compress keeps the survivors, ScatterND writes their answers over those before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eefast.measure import runtimes
from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet
from eefast.result import ExitResult

from . import export
from .peer import Peer, onnx_runtime_version, openvino_settings


class _Nodes:
    """The nodes and constants of a graph that is built up."""

    def __init__(self, constants: Mapping[str, int]) -> None:
        import onnx

        self.helper, self.integers = onnx.helper, onnx.TensorProto.INT64
        self.nodes: list[Any] = []
        self.weights = [self.helper.make_tensor(name, self.integers, [1], [i]) for name, i in constants.items()]

    def add(self, op: str, inputs: list[str], output: str, **options: Any) -> str:
        self.nodes.append(self.helper.make_node(op, inputs, [output], **options))
        return output


def graph(net: EarlyExitNet) -> bytes:
    """(images, thresholds [n] float32) → (logits [N, K], confidence [N], exit_index [N] int64)."""
    import onnx
    from onnx import compose

    models = [onnx.load_from_string(model) for model in export.stages(net)]
    made = _Nodes({"zero": 0, "one": 1, **{f"exit {i}": i for i in range(len(models))}})
    features, position, answers = "x", "", {}
    for i, model in enumerate(models):
        part = compose.add_prefix(model, f"{i} ").graph
        made.weights.extend(part.initializer)
        made.add("Identity", [features], f"{i} x")
        made.nodes.extend(part.node)
        count = made.add("Shape", [f"{i} confidence"], f"{i} count")
        exits = made.add("Expand", [f"exit {i}", count], f"{i} exit")
        here = {"logits": f"{i} logits", "confidence": f"{i} confidence", "exit_index": exits}
        if i == 0:
            answers, position = here, _positions(made, count)
        else:
            rows = made.add("Unsqueeze", [position, "one"], f"{i} rows")
            for name, value in here.items():
                answers[name] = made.add("ScatterND", [answers[name], rows, value], f"{i} all {name}")
        if i < net.num_exits:
            threshold = made.add("Gather", ["thresholds", f"exit {i}"], f"{i} threshold")
            leaves = "Greater" if net.criterion.comparison == ">" else "Less"
            stays = made.add("Not", [made.add(leaves, [f"{i} confidence", threshold], f"{i} leaves")], f"{i} stays")
            features = made.add("Compress", [f"{i} features", stays], f"{i} kept", axis=0)
            position = made.add("Compress", [position, stays], f"{i} kept position", axis=0)
    for name, value in answers.items():
        made.add("Identity", [value], name)
    return _model(made, net, models[0])


def _positions(made: _Nodes, count: str) -> str:
    """0 … N - 1."""
    total = made.add("Squeeze", [count, "zero"], "total")
    zero, one = (made.add("Squeeze", [name, "zero"], f"{name} scalar") for name in ("zero", "one"))
    return made.add("Range", [zero, total, one], "0 position")


def _model(made: _Nodes, net: EarlyExitNet, like: Any) -> bytes:
    """like: a model that says which versions to take."""
    import onnx
    from onnx import helper

    def info(name: str, kind: int, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    numbers = onnx.TensorProto.FLOAT
    inputs = [info("x", numbers, "n", *net.input_shape), info("thresholds", numbers, net.num_exits)]
    outputs = [info("logits", numbers, "n", net.num_classes), info("confidence", numbers, "n")]
    outputs.append(info("exit_index", made.integers, "n"))
    body = helper.make_graph(made.nodes, "early exit", inputs, outputs, made.weights)
    versions = [helper.make_opsetid("", max(opset.version for opset in like.opset_import))]
    whole = helper.make_model(body, opset_imports=versions, ir_version=like.ir_version)
    onnx.checker.check_model(whole)
    return whole.SerializeToString()  # type: ignore[no-any-return]


def around(net: EarlyExitNet, call: Callable[[Sequence[Any]], Sequence[Any]]) -> Run:
    def run(x: Tensor) -> ExitResult:
        # The next call may overwrite what this one hands out.
        logits, confidence, exits = (torch.tensor(part) for part in call([x.numpy(), net.thresholds.numpy()]))
        return ExitResult(logits, exits, confidence, net.cost[exits])

    return run


def on_onnx_runtime(net: EarlyExitNet) -> Run:
    session = runtimes.onnx_runtime(graph(net))
    return around(net, lambda inputs: session.run(None, dict(zip(("x", "thresholds"), inputs, strict=True))))


def on_openvino(net: EarlyExitNet) -> Run:
    return around(net, runtimes.openvino(graph(net)))


def describe_openvino() -> str:
    return f"{openvino_settings(torch.float32)}, Compress + ScatterND"


def describe_onnx_runtime() -> str:
    return f"{onnx_runtime_version()}, Compress + ScatterND"


PEERS = (
    Peer(
        "ONNX Runtime, one graph",
        on_onnx_runtime,
        describe_onnx_runtime,
        False,
        "onnxruntime graph",
        needs=runtimes.ONNX_NEEDS,
    ),
    Peer("OpenVINO, one graph", on_openvino, describe_openvino, False, "openvino graph", needs=runtimes.OPENVINO_NEEDS),
)
