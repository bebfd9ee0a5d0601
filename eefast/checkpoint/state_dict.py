"""The content of a `torch.save` file → the state_dict in it, under whatever key it was stored."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .pickled import Inert, Stored, attributes, kind
from .stored import quoted

log = logging.getLogger("eefast")

MOST_TENSORS = 20_000


def is_module(value: Any) -> bool:
    """Whether `value` was a module: it has tables of parameters and of modules inside."""
    state = value.state if isinstance(value, Inert) else None
    return isinstance(state, dict) and {"_parameters", "_modules"} <= state.keys()


def tensors(module: Inert) -> dict[str, Any]:
    """Parameters and buffers of a pickled module by name, as its `state_dict` had them.

    Plain lists called `layers` count as well: the reference keeps the BatchNorms of its `bnpool` exits in one.
    Raises `ValueError` where modules contain themselves or are nested beyond reason.
    """
    found: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [("", module)]
    left = MOST_TENSORS
    while todo:
        prefix, owner = todo.pop()
        inside = attributes(owner)
        values = [*_table(inside, "_parameters"), *_table(inside, "_buffers")]
        children = _table(inside, "_modules")
        if isinstance(layers := inside.get("layers"), list):
            children += [(f"layers.{i}", child) for i, child in enumerate(layers[:MOST_TENSORS])]
        left -= 1 + len(values) + len(children)
        if left < 0 or len(prefix) > 1000:
            raise ValueError(f"its modules hold over {MOST_TENSORS} tensors and modules, or contain themselves")
        found |= {prefix + name: value for name, value in values if value is not None}
        todo += [(f"{prefix}{name}.", child) for name, child in children if isinstance(child, Inert)]
    return found


def _table(inside: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    entries = inside.get(name, {})
    if not isinstance(entries, dict) or not all(isinstance(key, str) and len(key) < 100 for key in entries):
        raise ValueError(f"{name} of one of its modules is no dict of names")
    return list(entries.items())


# Usual keys of the weights in a checkpoint, in the order in which they are tried; averages come last.
_KEYS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "checkpoint"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema"),
)


def weights(content: Any, data: bytearray) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The state_dict in what `read` returned: tensors that are views of `data`, by name.

    Also the attributes of the module, if it was a whole module, and the keys under which it was found, such as
    "state_dict", else "". `_orig_mod.` of torch.compile is taken out of the names.
    Raises `ValueError` for other content, naming the entry that is no dense tensor, or is larger than the file.
    """
    where: list[str] = []
    while isinstance(content, dict) and (
        inner := [key for key in _KEYS if _may_hold(content.get(key), 3 - len(where))]
    ):
        where.append(inner[0])
        content = content[inner[0]]
        if len(inner) > 1:
            log.warning("the checkpoint has weights under %s; those under %r are used", inner, inner[0])
    state: dict[str, Any] = {}
    found = content
    if is_module(content):
        state, found = attributes(_unwrapped(content)), tensors(content)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"it holds {kind(content)}, neither a module nor a state_dict; save model.state_dict()")
    if len(found) > MOST_TENSORS:
        raise ValueError(f"it holds {len(found)} tensors; at most {MOST_TENSORS} are read")
    for name, value in found.items():
        if not isinstance(value, Stored):
            raise ValueError(f"{quoted(name)} is {kind(value)}, not a dense tensor in memory")
        if value.nbytes > len(data):
            raise ValueError(f"{quoted(name)} claims the shape {value.shape}, more than the file holds")
    # Twice, for what has two names.
    if sum(value.nbytes for value in found.values()) > 2 * len(data):
        raise ValueError("its tensors claim more than the file holds")
    result: dict[str, Tensor] = {}
    for name, value in found.items():
        short = re.sub(r"(^|\.)_orig_mod\.", r"\1", name)
        if short in result:
            raise ValueError(f"{quoted(short)} is in the file twice, with and without _orig_mod")
        result[short] = value.tensor(data)
    # AveragedModel keeps the number of averaged models with the weights.
    result.pop("n_averaged", None)
    return result, state, ".".join(where)


def _may_hold(value: Any, depth: int) -> bool:
    """Whether `value` is a module, or a dict with tensors or with such a dict under one of `_KEYS`."""
    if is_module(value):
        return True
    if not isinstance(value, dict) or depth <= 0 or len(value) > MOST_TENSORS:
        return False
    return any(isinstance(v, Stored) for v in value.values()) or any(
        _may_hold(value[key], depth - 1) for key in _KEYS if key in value
    )


def _unwrapped(module: Any) -> Any:
    """The module that DataParallel or torch.compile was put around."""
    for _ in range(4):
        inside = attributes(module).get("_modules")
        if not isinstance(inside, dict) or len(inside) != 1:
            break
        ((name, child),) = inside.items()
        if name not in ("module", "_orig_mod") or not is_module(child):
            break
        module = child
    return module


def without_prefix(found: Mapping[str, Tensor], wanted: Mapping[str, Any] | set[str]) -> dict[str, Tensor]:
    """The tensors called as `wanted`, where all of these have one and the same prefix in `found`; else `found`.

    DataParallel puts "module." in front of all names, Lightning the attribute that holds the network, say "model.".
    Raises `ValueError` where several prefixes fit and none of them is usual.
    """
    anchor = min(wanted, default="")
    if anchor in found:
        return dict(found)
    prefixes = {name.removesuffix(anchor) for name in found if name.endswith(f".{anchor}")}
    fitting = sorted(prefix for prefix in prefixes if all(prefix + name in found for name in wanted))
    chosen = next((prefix for prefix in _PREFIXES if prefix in fitting), fitting[0] if len(fitting) == 1 else None)
    if fitting and chosen is None:
        named = ", ".join(map(quoted, fitting[:4]))
        raise ValueError(f"it holds {len(fitting)} networks, under {named} …; save one of them alone")
    if len(fitting) > 1:
        log.warning("the checkpoint has networks under %s; the one under %r is used", fitting[:8], chosen)
    return dict(found) if chosen is None else _under(found, chosen)


_PREFIXES = ("module.", "model.", "model.module.", "module.model.", "net.", "network.")


def _under(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
