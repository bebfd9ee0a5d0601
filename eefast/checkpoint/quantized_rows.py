"""A quantised network ↔ rows of config.json, one for each step, from which it is built without tracing anything.

All that is read is checked before the network is returned, so that engines can rely on it: which values a step reads,
their sizes, that no sum leaves 32 bits, that products with a ratio are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import StageCost
from ..criteria import CARRYING, CRITERIA
from ..heads import HEADS, ExitHead, channels_read
from ..model import EarlyExitNet
from ..modules.integer_maps import largest_sums, short_mantissa
from ..quantized import QuantizedAffine, QuantizedConvolution, QuantizedMaxPool, QuantizedStage, Step, quantized_head
from . import CONFIG_FILE
from .building import put
from .fields import MOST_ELEMENTS, MOST_EXITS, Field, check_channels, check_fields, is_int, is_name, is_number

MOST_STEPS = 4096
MOST_KERNEL = 128
Shape = tuple[int, int, int]


def describe_stages(net: EarlyExitNet) -> dict[str, Any]:
    """The fields of config.json that only a quantised network has, without its kind and name."""
    copied, rows = (net.config or {}).get("float_thresholds", {}), len(net.input_shape) == 2
    return {
        "num_classes": net.num_classes,
        "input_shape": list(net.input_shape),
        "float_thresholds": thresholds_row(copied),
        "costs": [[cost.stage_macs, cost.head_macs] for cost in net.stage_costs],
        "stages": [_stage_row(stage, rows) for stage in net.stages],
        "heads": [_head_row(head, rows) for head in net.heads],
    }


def thresholds_row(thresholds: Mapping[str, Sequence[float]]) -> dict[str, list[float | str]]:
    """By criterion, as JSON has them: without infinities."""

    def as_json(threshold: float) -> float | str:
        return threshold if abs(threshold) < float("inf") else str(threshold)

    return {name: [as_json(v) for v in values] for name, values in thresholds.items()}


def read_thresholds(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """What `thresholds_row` wrote, checked by `THRESHOLDS_FIELD`."""
    return {name: [float(v) for v in values] for name, values in row.items()}


def _stage_row(stage: nn.Module, rows: bool) -> dict[str, Any]:
    if not isinstance(stage, QuantizedStage):
        raise ValueError(
            f"a stage is a {type(stage).__name__}; only networks that eefast.quantize returns are saved so"
        )
    return {
        "zeros": list(stage.zeros),
        "output": stage.output,
        "steps": [_step_row(step, rows) for step in stage.steps],
    }


def _step_row(step: nn.Module, rows: bool) -> dict[str, Any]:
    # In networks on rows every window is one row high, and folders do not say it.
    more = {"row": True} if getattr(step, "row", False) and not rows else {}
    if isinstance(step, QuantizedConvolution):
        names = ("source", "residual", "kernel", "stride", "padding", "relu", "winograd")
        return {
            "kind": "convolution",
            "channels": len(step.weight),
            **{name: getattr(step, name) for name in names},
            **more,
        }
    if isinstance(step, QuantizedAffine):
        return {"kind": "affine", "source": step.source, "relu": step.relu}
    assert isinstance(step, QuantizedMaxPool)
    return {
        "kind": "max_pool",
        **{name: getattr(step, name) for name in ("source", "kernel", "stride", "padding")},
        **more,
    }


def _head_row(head: nn.Module, rows: bool) -> dict[str, Any]:
    assert isinstance(head, ExitHead)
    convs = _stage_row(head.convs[0], rows) if len(head.convs) else None
    norm = head.norm
    eps = norm.eps if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) else None
    return {"kind": head.kind, "eps": eps, "convs": convs}


def build_quantized(config: Mapping[str, Any], weights: Mapping[str, Tensor], size: int) -> EarlyExitNet:
    """The quantised network that `config` describes, with `weights`, in eval mode.

    config: the fields of config.json, checked one by one; how they fit together is checked here.
    size: bytes of the file that the weights come from; nothing larger is built or copied.
    """
    check_channels(config["normalization"], config["input_shape"])
    classes, stages, heads, costs = config["num_classes"], list[QuantizedStage](), list[ExitHead](), list[StageCost]()
    channels, *sides = config["input_shape"]
    shape, rows = (channels, *([1] * (2 - len(sides))), *sides), len(sides) == 1
    if len({len(config[name]) for name in ("stages", "heads", "costs")}) != 1:
        raise ValueError(f"{CONFIG_FILE} has different numbers of stages, heads and costs")
    with torch.device("meta"):  # shapes are compared before memory is taken
        for i, (row, head, macs) in enumerate(zip(*(config[n] for n in ("stages", "heads", "costs")), strict=True)):
            stage, shape = _stage(row, shape, i == 0, rows, f"{CONFIG_FILE}: stages[{i}]")
            stages.append(stage)
            heads.append(_head(head, shape, config, f"{CONFIG_FILE}: heads[{i}]"))
            costs.append(StageCost(macs[0], macs[1], (shape[0], shape[2]) if rows else shape, classes))
        copied = read_thresholds(config["float_thresholds"])
        net = EarlyExitNet(
            stages, heads, input_shape=config["input_shape"], criterion=config["criterion"],
            normalization=config["normalization"], costs=costs,
            config={"kind": "quantized", "name": config["name"], "float_thresholds": copied},
        )  # fmt: skip
    if not ((net.cost > 0) & net.cost.isfinite()).all():
        raise ValueError(f"{CONFIG_FILE} has costs of which the final exit's is 0")
    _check_dtypes(net, weights)
    put(net, weights, size, config["name"])
    _check_numbers(net)
    net.check_thresholds()
    return net.eval().requires_grad_(False)


def _stage(row: Mapping[str, Any], source: Shape, image: bool, rows: bool, where: str) -> tuple[QuantizedStage, Shape]:
    """The stage without its numbers, and the shape of what it returns.

    source: shape of what it reads; rows: whether that is one row high, as are windows of more than one pixel then.
    """
    check_fields(row, _STAGE, where)
    shapes, zeros, steps = [source], row["zeros"], []
    if len(zeros) != len(row["steps"]) + 1:
        raise ValueError(f"{where} has {len(zeros)} zeros for {len(row['steps'])} steps; it must have one more")
    for i, described in enumerate(row["steps"]):
        place = f"{where}.steps[{i}]"
        kind = described.get("kind") if isinstance(described, dict) else None
        if not isinstance(kind, str) or kind not in _STEPS:
            raise ValueError(f"{place} has no kind that is one of {', '.join(_STEPS)}")
        check_fields(
            described, _STEPS[kind] | ({"row": _FLAG} if "row" in described and kind != "affine" else {}), place
        )
        step, shape = _step(described, shapes, zeros, image, rows, place)
        steps.append(step)
        shapes.append(shape)
    output = row["output"]
    if not image <= output < len(shapes):
        raise ValueError(f"{where} says output={output}; it must be a value that a step writes")
    scales, parameters = torch.empty(len(shapes), dtype=torch.float64), torch.empty(2, source[0]) if image else None
    return QuantizedStage(steps, scales, zeros, output=output, image=parameters), shapes[output]


def _step(
    row: Mapping[str, Any], shapes: Sequence[Shape], zeros: Sequence[int], image: bool, rows: bool, where: str
) -> tuple[Step, Shape]:
    """A step without its numbers, and the shape of the value that it writes; shapes: of the values before."""
    kind, source = row["kind"], row["source"]
    convolution, from_image = kind == "convolution", image and source == 0
    if source >= len(shapes) or (from_image and not convolution):
        raise ValueError(f"{where} says source={source}; it must be a value before, the image for convolutions only")
    if row.get("relu") and zeros[len(shapes)] != 0:
        raise ValueError(f"{where} has a ReLU, but the zero point {zeros[len(shapes)]}; it must be 0")
    channels, height, width = shapes[source]
    if kind == "affine":
        numbers = torch.empty(channels), torch.empty(channels)
        return QuantizedAffine(source, *numbers, relu=row["relu"]), shapes[source]
    kernel, stride, padding = row["kernel"], row["stride"], row["padding"]
    outputs = row["channels"] if convolution else channels
    one_row = (rows or row.get("row", False)) and kernel > 1
    tall, above = (1, 0) if one_row else (kernel, padding)
    shape = outputs, (height + 2 * above - tall) // stride + 1, (width + 2 * padding - kernel) // stride + 1
    if min(shape) < 1 or prod(shape) > MOST_ELEMENTS or padding > (kernel if convolution else kernel // 2):
        raise ValueError(
            f"{where} has a window of {kernel}, padding {padding}, that does not fit maps of {shapes[source]}"
        )
    if not convolution:
        if zeros[len(shapes)] != zeros[source]:
            raise ValueError(f"{where} is a max pooling with another zero point than its source")
        return QuantizedMaxPool(source, kernel, stride, padding, one_row), shape
    residual = row["residual"]
    if residual >= 0 and (residual >= len(shapes) or shapes[residual] != shape or (image and residual == 0)):
        raise ValueError(f"{where} says residual={residual}; it must be a map before of {shape}, or -1")
    winograd = row["winograd"]
    if winograd and ((kernel, stride, padding) != (3, 1, 1) or one_row or from_image or zeros[source] != 0):
        raise ValueError(f"{where} says winograd={winograd}; it must be 0 but for 3 × 3, stride 1, on maps of zero 0")
    window = {1: (3, 4), 2: (4, 4)}.get(winograd, (tall, kernel))
    if outputs * channels * prod(window) > MOST_ELEMENTS:
        raise ValueError(f"{where} has a weight of more than {MOST_ELEMENTS} numbers")
    step = QuantizedConvolution(
        source, torch.empty(outputs, channels, *window), torch.empty(4 if winograd == 2 else 2, outputs),
        torch.empty(outputs),
        kernel=kernel, stride=stride, padding=padding, relu=row["relu"], residual=residual, ratio=torch.empty(()),
        winograd=winograd, row=one_row,
    )  # fmt: skip
    return step, shape


def _head(row: Mapping[str, Any], features: Shape, config: Mapping[str, Any], where: str) -> ExitHead:
    check_fields(row, _HEAD, where)
    convs, shape, rows = None, features, len(config["input_shape"]) == 2
    if row["convs"] is not None:
        convs, shape = _stage(row["convs"], features, False, rows, f"{where}.convs")
    if shape[0] != channels_read(row["kind"], features[0]) or (row["kind"] == "plain" and shape != features):
        raise ValueError(f"{where} has convolutions to {shape} of features of {features}")
    if prod(features) * config["num_classes"] > MOST_ELEMENTS:
        raise ValueError(f"{where} has a classifier of more than {MOST_ELEMENTS} numbers")
    arguments = (features[0], features[2]) if rows else features, config["num_classes"], config["input_shape"]
    return quantized_head(row["kind"], *arguments, convs=convs, eps=row["eps"])


def _check_dtypes(net: EarlyExitNet, weights: Mapping[str, Tensor]) -> None:
    """`ValueError` where a number of integer arithmetic is in another dtype than it is computed in."""
    for path, module in net.named_modules():
        if isinstance(module, QuantizedStage | QuantizedConvolution | QuantizedAffine):
            for name, value in module.named_buffers(path, recurse=False):
                if name in weights and weights[name].dtype != value.dtype:
                    raise ValueError(f"{name} is {weights[name].dtype}; it must be {value.dtype}")


def _check_numbers(net: EarlyExitNet) -> None:
    """`ValueError` for numbers with which engines would compute something else than the network does."""
    last: tuple[float, int] | None = None
    for i, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
        assert isinstance(stage, QuantizedStage)
        assert isinstance(head, ExitHead)
        _check_stage(stage, last, f"stages.{i}")
        last = float(stage.scales[stage.output]), stage.zeros[stage.output]
        for convs in head.convs:
            assert isinstance(convs, QuantizedStage)
            _check_stage(convs, last, f"heads.{i}.convs.0")


def _check_stage(stage: QuantizedStage, source: tuple[float, int] | None, path: str) -> None:
    """source: scale and zero point of the map that the stage reads, None for the image."""
    _require(bool((stage.scales > 0).all()), f"{path}.scales", "above 0")
    if source is not None:
        same = (float(stage.scales[0]), stage.zeros[0]) == source
        _require(same, f"{path}.scales", "those with which the stage before returns its map")
    if stage.image is not None:
        _require(bool((stage.image[0] > 0).all()), f"{path}.image", "multipliers above 0, and shifts")
    for i, step in enumerate(stage.steps):
        name = f"{path}.steps.{i}"
        if isinstance(step, QuantizedConvolution):
            _require(bool((step.weight > -128).all()), f"{name}.weight", "in -127 … 127")
            fits = (largest_sums(step.weight, step.bias, step.winograd) < 2**31).all()
            _require(bool(fits), f"{name}.bias", "so small that every sum fits 32 bits")
            first, second = step.bias.long().chunk(2)  # of even and odd columns or, with winograd 2, rows
            wrong = (first - second) % 2 if step.winograd else first - second
            _require(not wrong.any(), f"{name}.bias", "two equal rows or, with winograd, rows of equal parity")
            _require(bool((step.scale > 0).all()), f"{name}.scale", "above 0")
            least = 0 if step.residual < 0 else torch.finfo(torch.float32).tiny
            exact = float(step.ratio) == float(short_mantissa(step.ratio)) and float(step.ratio) >= least
            _require(exact and (step.residual >= 0 or float(step.ratio) == 0), f"{name}.ratio", _SHORT)
        elif isinstance(step, QuantizedAffine):
            _require(torch.equal(step.scale, short_mantissa(step.scale)), f"{name}.scale", _SHORT)
        else:
            assert isinstance(step, QuantizedMaxPool)
            same = bool(stage.scales[i + 1] == stage.scales[step.source])
            _require(same, f"{path}.scales", "the same for a max pooling and its source")


_SHORT = "of at most 16 significant bits, and 0 for a step without residual"


def _require(fits: bool, name: str, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {wanted}; the file is damaged, quantise the network again")


def _is_list(value: Any, most: int, least: int = 0) -> bool:
    return isinstance(value, list) and least <= len(value) <= most


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_thresholds(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in {**CRITERIA, **CARRYING}
        and _is_list(given, MOST_EXITS)
        and all(is_number(v) or v in ("inf", "-inf") for v in given)
        for name, given in value.items()
    )


_VALUE: Field = (lambda v: is_int(v, MOST_STEPS, 0), "the number of a value")
_FLAG: Field = (_is_flag, "true or false")
_WINDOW: dict[str, Field] = {
    "kernel": (lambda v: is_int(v, MOST_KERNEL), f"1 … {MOST_KERNEL}"),
    "stride": (lambda v: is_int(v, MOST_KERNEL), f"1 … {MOST_KERNEL}"),
    "padding": (lambda v: is_int(v, MOST_KERNEL, 0), f"0 … {MOST_KERNEL}"),
}
_KIND: Field = (is_name, "the kind of a step")
_STEPS: dict[str, dict[str, Field]] = {
    "convolution": {
        "kind": _KIND,
        "source": _VALUE,
        "residual": (lambda v: is_int(v, MOST_STEPS, -1), "the number of a value, or -1"),
        "channels": (is_int, "a number of channels"),
        **_WINDOW,
        "stride": (lambda v: is_int(v, 2), "1 or 2"),
        "relu": _FLAG,
        "winograd": (lambda v: is_int(v, 2, 0), "0, 1 or 2"),
    },
    "affine": {"kind": _KIND, "source": _VALUE, "relu": _FLAG},
    "max_pool": {"kind": _KIND, "source": _VALUE, **_WINDOW},
}
_STAGE: dict[str, Field] = {
    "zeros": (
        lambda v: _is_list(v, MOST_STEPS + 1, 1) and all(is_int(zero, 255, 0) for zero in v),
        f"a list of at most {MOST_STEPS + 1} integers 0 … 255",
    ),
    "output": _VALUE,
    "steps": (lambda v: _is_list(v, MOST_STEPS), f"a list of at most {MOST_STEPS} steps"),
}
_HEAD: dict[str, Field] = {
    "kind": (lambda v: isinstance(v, str) and v in HEADS, f"one of {', '.join(HEADS)}"),
    "eps": (lambda v: v is None or (is_number(v) and 0 < v <= 1), "null or a number above 0, at most 1"),
    "convs": (lambda v: v is None or isinstance(v, dict), "null or a stage"),
}
_MANY = MOST_EXITS + 1
THRESHOLDS_FIELD: Field = (_are_thresholds, "thresholds by the name of their criterion")
QUANTIZED_FIELDS: dict[str, Field] = {
    "name": (is_name, "a name"),
    "float_thresholds": THRESHOLDS_FIELD,
    "costs": (
        lambda v: _is_list(v, _MANY, 1) and all(_is_list(c, 2, 2) and all(is_int(n, 2**50, 0) for n in c) for c in v),
        f"a list of at most {_MANY} pairs of MACs",
    ),
    "stages": (
        lambda v: _is_list(v, _MANY, 1) and all(isinstance(s, dict) for s in v), f"a list of at most {_MANY} stages"
    ),
    "heads": (
        lambda v: _is_list(v, _MANY, 1) and all(isinstance(h, dict) for h in v), f"a list of at most {_MANY} heads"
    ),
}  # fmt: skip
