"""Early exit as one ONNX graph: Compress keeps the survivors, ScatterND writes their answers over those before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eefast.model import EarlyExitNet
from eefast.result import ExitResult

from . import export, onnx_runtime, openvino_model
from .openvino_model import Call
from .peer import Peer, Run


def graph(net: EarlyExitNet) -> bytes:
    """(images, thresholds [n] float32) → (logits [N, K], confidence [N], exit_index [N] int64)."""
    import onnx
    from onnx import compose, helper

    models = [onnx.load_from_string(model) for model in export.stages(net)]
    nodes: list[Any] = []
    constants = {"zero": [0], "one": [1]}
    constants |= {f"exit {i}": [i] for i in range(len(models))}
    weights = [helper.make_tensor(name, onnx.TensorProto.INT64, [1], value) for name, value in constants.items()]

    def add(op: str, inputs: list[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **options))
        return output

    features, position, answers = "x", "", {}
    for i, model in enumerate(models):
        part = compose.add_prefix(model, f"{i} ").graph
        weights.extend(part.initializer)
        add("Identity", [features], f"{i} x")
        nodes.extend(part.node)
        count = add("Shape", [f"{i} confidence"], f"{i} count")
        here = {
            "logits": f"{i} logits",
            "confidence": f"{i} confidence",
            "exit_index": add("Expand", [f"exit {i}", count], f"{i} exit"),
        }
        if i == 0:
            answers = here
            total = add("Squeeze", [count, "zero"], "total")
            limits = [add("Squeeze", [name, "zero"], f"{name} scalar") for name in ("zero", "one")]
            position = add("Range", [limits[0], total, limits[1]], "0 position")
        else:
            rows = add("Unsqueeze", [position, "one"], f"{i} rows")
            for name, value in here.items():
                answers[name] = add("ScatterND", [answers[name], rows, value], f"{i} all {name}")
        if i < net.num_exits:
            threshold = add("Gather", ["thresholds", f"exit {i}"], f"{i} threshold")
            leaves = "Greater" if net.criterion.comparison == ">" else "Less"
            stays = add("Not", [add(leaves, [here["confidence"], threshold], f"{i} leaves")], f"{i} stays")
            features = add("Compress", [f"{i} features", stays], f"{i} kept", axis=0)
            position = add("Compress", [position, stays], f"{i} kept position", axis=0)
    for name, value in answers.items():
        add("Identity", [value], name)

    def info(name: str, kind: int, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    numbers, integers = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [info("x", numbers, "n", *net.input_shape), info("thresholds", numbers, net.num_exits)]
    outputs = [
        info("logits", numbers, "n", net.num_classes),
        info("confidence", numbers, "n"),
        info("exit_index", integers, "n"),
    ]
    made = helper.make_graph(nodes, "early exit", inputs, outputs, weights)
    versions = [helper.make_opsetid("", max(model.opset_import[0].version for model in models))]
    whole = helper.make_model(made, opset_imports=versions, ir_version=models[0].ir_version)
    onnx.checker.check_model(whole)
    return whole.SerializeToString()  # type: ignore[no-any-return]


def around(net: EarlyExitNet, call: Call) -> Run:
    def run(x: Tensor) -> ExitResult:
        # The next call may overwrite what this one hands out.
        logits, confidence, exits = (torch.tensor(part) for part in call([x.numpy(), net.thresholds.numpy()]))
        return ExitResult(logits, exits, confidence, net.cost[exits])

    return run


def on_onnx_runtime(net: EarlyExitNet) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(graph(net), options, providers=["CPUExecutionProvider"])
    return around(net, lambda inputs: session.run(None, dict(zip(("x", "thresholds"), inputs, strict=True))))


def on_openvino(net: EarlyExitNet) -> Run:
    return around(net, openvino_model.compiled(graph(net)))


def describe_openvino() -> str:
    return f"{openvino_model.version()}, f32, LATENCY, Compress + ScatterND"


def describe_onnx_runtime() -> str:
    return f"{onnx_runtime.describe()}, Compress + ScatterND"


PEERS = (
    Peer(
        "ONNX Runtime, one graph",
        on_onnx_runtime,
        describe_onnx_runtime,
        False,
        "onnxruntime graph",
        needs=onnx_runtime.NEEDS,
    ),
    Peer("OpenVINO, one graph", on_openvino, describe_openvino, False, "openvino graph", needs=openvino_model.NEEDS),
)
