"""A network ↔ a folder: config.json says how to build it, model.safetensors holds weights, training.json the record."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import criteria, rules, zoo
from ..carrying import CARRIES
from ..heads import HEADS, TOKEN_HEADS
from ..model import EarlyExitNet
from ..preprocessing import Preprocessing
from ..system import files
from . import CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE, image_fields, profile_rows, record_file
from .attached import build_attached
from .building import build, first_names
from .fields import MOST_EXITS, Field, check_fields, is_int, is_name, is_normalization, is_shape
from .qdq_stages import QDQ_FIELDS, build_qdq
from .quantized_rows import QUANTIZED_FIELDS, build_quantized, describe_stages, thresholds_row
from .stored import MOST_JSON, read_json, read_safetensors

OLD_CONFIG_FILE = "attached.json"
"""The first versions of `eefast train --backbone` wrote this instead of config.json."""


def save(net: EarlyExitNet, folder: str | Path) -> None:
    """See `EarlyExitNet.save`."""
    from safetensors.torch import save as safetensors_bytes

    net.check_saving()
    normalization = net.normalization and [[float(v) for v in part] for part in net.normalization]
    config = {"format": 1, **(net.config or {}), "normalization": normalization, "criterion": net.criterion.name}
    config |= image_fields.describe(net)
    if net.profiles:
        config |= {"profiles": profile_rows.rows(net.profiles)}
    if config.get("kind") == "quantized":
        config |= describe_stages(net)
    elif config.get("kind") == "qdq":
        config |= {"float_thresholds": thresholds_row((net.config or {}).get("float_thresholds", {}))}
    firsts, state = first_names(net), net.state_dict()
    weights = {name: state[name].detach().cpu().contiguous() for name, first in firsts.items() if name == first}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.together():
        files.write(folder / WEIGHTS_FILE, safetensors_bytes(weights))
        files.write(folder / CONFIG_FILE, _text(config))
        if net.record is not None:
            files.write(folder / RECORD_FILE, record_file.text(net.record))
    for other in (OLD_CONFIG_FILE, *([] if net.record else [RECORD_FILE])):
        (folder / other).unlink(missing_ok=True)


def _text(config: dict[str, Any]) -> str:
    """What `_read_config` reads; names of classes that would make the file too large are left out."""
    found = json.dumps(config, indent=2) + "\n"
    if len(found) <= MOST_JSON or "classes" not in config:
        return found
    return json.dumps({key: value for key, value in config.items() if key != "classes"}, indent=2) + "\n"


def read_folder(folder: Path) -> EarlyExitNet:
    """The network that `save` wrote, on the CPU, in eval mode, in the dtype that it was saved in.

    Raises `ValueError` or `OSError` for files that are missing, damaged or not of the same network.
    """
    kind, config, told = _read_config(folder)
    profiles = config.pop("profiles", None)
    weights, size = read_safetensors(folder / WEIGHTS_FILE)
    rule = _rule(config, weights)
    net = {"eenet": build, "attached": build_attached, "quantized": build_quantized, "qdq": build_qdq}[kind](
        config, weights, size
    )
    for key in ("num_exits", "placement"):
        if key in config and config[key] != (found := (net.config or {})[key]):
            raise ValueError(f"{CONFIG_FILE} says {key}={config[key]}, but the network has {found}")
    if rule is not None:
        try:
            found_rule = rules.read(*rule, net.num_exits)
        except ValueError as error:
            raise ValueError(f"{WEIGHTS_FILE}: {error}") from None
        net = net.with_criterion(found_rule, net.thresholds.tolist())
    if profiles is not None:
        net.profiles = profile_rows.read(profiles)
    net.record = record_file.read(folder, net.name, net.num_classes, net.input_shape)
    image_fields.give(net, *told, CONFIG_FILE)
    return net


def _rule(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[str, Tensor] | None:
    """Name and table of a rule that carries, taken out of both; the network is built with another criterion first."""
    name, table = config["criterion"], weights.pop("rule", None)
    carries = criteria.get(name).carries
    if carries != (table is not None):
        has = "lacks the rule of" if carries else "has a rule, which does not belong to"
        raise ValueError(f"{WEIGHTS_FILE} {has} criterion {name!r}")
    if table is None:
        return None
    config["criterion"] = "max_probability"
    return name, table


def _read_config(folder: Path) -> tuple[str, dict[str, Any], tuple[Preprocessing | None, tuple[str, ...] | None]]:
    """The kind of network, the arguments that build it, and what it says of image files, all of them checked."""
    old = not (folder / CONFIG_FILE).exists() and (folder / OLD_CONFIG_FILE).exists()
    file = OLD_CONFIG_FILE if old else CONFIG_FILE
    for name in (file, WEIGHTS_FILE):
        if not (folder / name).exists():
            raise ValueError(f"{name} is missing; give the folder that net.save(folder) wrote")
    config = read_json(folder / file)
    kind = config.pop("kind", "attached" if old else "eenet")  # the first folders have none
    kinds = {"eenet": _EENET, "attached": _ATTACHED, "quantized": _QUANTIZED, "qdq": _QDQ}
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{file} says kind={reprlib.repr(kind)}; it must be one of {', '.join(kinds)}; a newer eefast may read it"
        )
    told = image_fields.take(config, file)
    fields = kinds[kind]
    if kind == "eenet" or (kind == "qdq" and "name" in config):
        fields = {**(_EENET8 if config.get("name") == "eenet8" else _EENET), **(QDQ_FIELDS if kind == "qdq" else {})}
    # The first folders have none, and most networks.
    more = {"profiles": profile_rows.FIELD, **({"carry": _CARRY} if kind != "quantized" else {})}
    fields = {**fields, **{key: field for key, field in more.items() if key in config}}
    check_fields(config, fields, file)
    del config["format"]
    return kind, config, told


def _is_head(value: Any, more: Sequence[str] = ()) -> bool:
    return isinstance(value, str) and value in (*HEADS, *more)


def _is_heads(value: Any, more: Sequence[str] = ()) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MOST_EXITS and all(_is_head(head, more) for head in value)


_CRITERIA = (*criteria.CRITERIA, *criteria.CARRYING)
_ALL: dict[str, Field] = {
    "format": (lambda v: is_int(v, 1), "1, the format that this eefast reads; a newer eefast may read it"),
    "num_classes": (lambda v: is_int(v, 2**31 - 1), "a number of classes"),
    "input_shape": (is_shape, "[channels, height, width], each 1 … 65535"),
    "normalization": (is_normalization, "null or [means, deviations], finite, deviations above 0"),
    "criterion": (lambda v: isinstance(v, str) and v in _CRITERIA, f"one of {', '.join(_CRITERIA)}"),
}
_FIELDS: dict[str, Field] = {
    **_ALL,
    "head": (lambda v: _is_head(v) or _is_heads(v), f"one of {', '.join(HEADS)}, or a list of them"),
}
_ANY_SHAPE: Field = (
    lambda v: is_shape(v, sides=(1, 2)),
    "[channels, height, width], of a network on rows [channels, length], each 1 … 65535",
)
_CARRY: Field = (lambda v: v in CARRIES, f"one of {', '.join(CARRIES)}")
_EENET: dict[str, Field] = {
    **_FIELDS,
    "name": (
        lambda v: isinstance(v, str) and v.removesuffix("-1d") in zoo.names(),
        f"one of {', '.join(zoo.names())}, also with -1d",
    ),
    "input_shape": _ANY_SHAPE,
    "num_exits": (is_int, "a number of early exits"),
    "placement": (
        lambda v: isinstance(v, list) and len(v) <= MOST_EXITS and all(is_int(blocks, least=0) for blocks in v),
        f"a list of at most {MOST_EXITS} numbers of blocks",
    ),
}
_EENET8: dict[str, Field] = {**_EENET, "filters": (is_int, "a number of channels")}
_ATTACHED: dict[str, Field] = {
    **_ALL,
    "head": (
        lambda v: _is_head(v, TOKEN_HEADS) or _is_heads(v, TOKEN_HEADS),
        f"one of {', '.join(dict.fromkeys((*HEADS, *TOKEN_HEADS)))}, or a list of them",
    ),
    "backbone": (lambda v: is_name(v) and v.startswith(("torchvision:", "timm:")), "torchvision:NAME or timm:NAME"),
    "exits": (
        lambda v: isinstance(v, list) and len(v) <= MOST_EXITS and all(map(is_name, v)) and len({*v}) == len(v),
        f"a list of at most {MOST_EXITS} names of modules, none of them twice",
    ),
}
_QUANTIZED: dict[str, Field] = {**_ALL, "input_shape": _ANY_SHAPE, **QUANTIZED_FIELDS}
_QDQ: dict[str, Field] = {**_ATTACHED, **QDQ_FIELDS}
