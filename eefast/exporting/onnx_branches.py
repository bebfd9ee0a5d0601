"""ONNX models of the stages → one model for a single image, which computes a stage only if no exit before it is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ANSWERS = ("logits", "confidence", "exit")


def one_model(
    models: Sequence[bytes], input_shape: Sequence[int], comparison: str, thresholds: Sequence[float]
) -> bytes:
    """The model that takes "x" [1, C, H, W] → "logits" [1, K], "confidence" [1], both float32, "exit" [1] int64.

    models: see `onnx_files.stage_models`. Its other input, "thresholds" [n], may be left out.
    """
    import onnx
    from onnx import TensorProto, helper

    stages = [onnx.compose.add_prefix(onnx.load_from_string(model), f"stage{i}/") for i, model in enumerate(models)]
    for i, stage in enumerate(stages):
        before = f"stage{i - 1}/"
        names = {f"stage{i}/x": f"{before}features" if i else "x"}
        names |= {f"stage{i}/{what}_before": f"{before}{what}" for what in ("logits", "confidence")}
        _rename(stage.graph, names)
    classes = stages[-1].graph.output[0].type.tensor_type.shape.dim[1].dim_value
    shapes = {"logits": [1, classes], "confidence": [1], "exit": [1]}
    types = {"logits": TensorProto.FLOAT, "confidence": TensorProto.FLOAT, "exit": TensorProto.INT64}

    def answers(prefix: str) -> list[Any]:
        return [helper.make_tensor_value_info(prefix + name, types[name], shapes[name]) for name in ANSWERS]

    def found(i: int, prefix: str) -> list[Any]:
        """The answer of exit i."""
        number = helper.make_tensor("", TensorProto.INT64, [1], [i])
        return [
            *(helper.make_node("Identity", [f"stage{i}/{name}"], [prefix + name]) for name in ANSWERS[:2]),
            helper.make_node("Constant", [], [f"{prefix}exit"], value=number),
        ]

    def nodes(i: int, prefix: str) -> list[Any]:
        """Stage i and what follows it."""
        graph = stages[i].graph
        if i == len(stages) - 1:
            return [*graph.node, *found(i, prefix)]
        here, index = f"exit{i}/", helper.make_tensor("", TensorProto.INT64, [], [i])
        taken = helper.make_graph(found(i, f"{here}taken/"), f"exit {i}", [], answers(f"{here}taken/"))
        on = helper.make_graph(
            nodes(i + 1, f"{here}on/"), f"after exit {i}", [], answers(f"{here}on/"), stages[i + 1].graph.initializer
        )
        compared = {">": "Greater", "<": "Less"}[comparison]
        return [
            *graph.node,
            helper.make_node("Constant", [], [f"{here}index"], value=index),
            helper.make_node("Gather", ["thresholds", f"{here}index"], [f"{here}threshold"]),
            helper.make_node(compared, [f"stage{i}/confidence", f"{here}threshold"], [f"{here}exits"]),
            helper.make_node(
                "If", [f"{here}exits"], [prefix + name for name in ANSWERS], then_branch=taken, else_branch=on
            ),
        ]

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *input_shape])
    limits = helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [len(thresholds)])
    kept = helper.make_tensor("thresholds", TensorProto.FLOAT, [len(thresholds)], thresholds)
    inputs, kept_values = ([x, limits], [kept]) if thresholds else ([x], [])
    graph = helper.make_graph(
        nodes(0, ""), "network", inputs, answers(""), [*kept_values, *stages[0].graph.initializer]
    )
    model = helper.make_model(graph, opset_imports=stages[0].opset_import, ir_version=stages[0].ir_version)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Give values that nodes read other names, also inside of their own graphs."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                _rename(inner, names)
