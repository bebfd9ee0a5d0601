"""A backbone, run on noise → the calls of its modules: which is the classifier, and which return maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.contexts import mode
from .layouts import layout_of


@dataclass(frozen=True)
class Call:
    """One call of a module: what it received by position and what it returned.

    versions: of the first tensor received as the call began, and of the one returned as it ended; whatever writes to a
        tensor raises its version.
    """

    name: str
    module: nn.Module
    received: tuple[Any, ...]
    returned: Any
    versions: tuple[int, int] = (0, 0)


def noise_images(backbone: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Two images of noise, on the device and in the dtype of the weights; 17 without values on the meta device."""
    if len(input_shape) not in (2, 3) or min(input_shape) < 1:
        raise ValueError(f"input_shape={tuple(input_shape)} must be (C, H, W) or, of rows, (C, L), each at least 1")
    weights = (p for p in backbone.parameters() if p.is_floating_point())
    like = next(weights, torch.empty(0, device="cpu"))
    # On the meta device the batch size is known by its value alone, so it is a number that no other size has.
    return _noise(17 if like.is_meta else 2, input_shape, like)


def _noise(n: int, shape: Sequence[int], like: Tensor) -> Tensor:
    if like.is_meta:
        return like.new_empty(n, *shape)
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(n, *shape, generator=generator, device="cpu", dtype=torch.float32).to(like)


def other_sizes(backbone: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One larger image and three smaller ones, none of them square, each batch with the backbone's logits.

    Where it takes no such images, theirs is the size of `images`.
    """
    channels, *sides = images.shape[1:]
    # Of rows, which have one side, the last number holds.
    h, w = sides[0], sides[-1]
    found = []
    for n, sizes in (
        (1, [(h + h // 2 + 1, w + w // 4 + 2), (2 * h, 3 * w), (h, w)]),
        (3, [(h - h // 4, w // 2 + 1), (h, max(w // 2, 1)), (h, w)]),
    ):
        for size in sizes:
            x = _noise(n, (channels, *size[-len(sides) :]), images)
            try:
                found.append((x, run(backbone, x.clone())))
                break
            except Exception as error:  # whatever the backbone raises
                failed = error
        else:
            raise ValueError(f"the backbone takes a batch of 2 images, but not of {n} ({failed})")
    return found


def run(module: nn.Module, x: Tensor, training: bool = False) -> Any:
    """What the module returns in this mode; its flags are as before afterwards."""
    with mode(module, training):
        return module(x)


def watch(backbone: nn.Module, images: Tensor, training: bool = False) -> list[Call]:
    """All calls of modules in the order in which they end; the last is that of the backbone itself, called ""."""
    calls, begun = list[Call](), list[int]()

    def note(name: str) -> Any:
        def ended(module: nn.Module, received: tuple[Any, ...], returned: Any) -> None:
            versions = begun.pop(), _version(returned)
            calls.append(Call(name, module, received, returned, versions))

        return ended

    def begins(module: nn.Module, received: tuple[Any, ...]) -> None:
        begun.append(_version(*received[:1]))

    hooks = [module.register_forward_hook(note(name)) for name, module in backbone.named_modules()]
    hooks += [module.register_forward_pre_hook(begins) for module in backbone.modules()]
    try:
        run(backbone, images.clone(), training)
    except Exception as error:
        shape = tuple(images.shape[1:])
        raise ValueError(f"input_shape={shape}: the backbone cannot take such images ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _version(value: Any = None) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def find_classifier(calls: Sequence[Call], num_classes: int | None) -> tuple[str, nn.Linear]:
    """Name and module of the linear that returned the backbone's logits; `ValueError` where there is none."""
    logits = calls[-1].returned
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"the backbone returns {what}; wrap it in a module that returns logits [N, K]")
    found = [call for call in calls if isinstance(call.module, nn.Linear) and call.returned is logits]
    if not found:
        last = [call for call in calls if not any(call.module.children())][-1]
        raise ValueError(
            f"the backbone's logits come from {last.name!r}, {last.module}; they must be the output of an nn.Linear"
        )
    name, linear = found[-1].name, found[-1].module
    assert isinstance(linear, nn.Linear)
    if linear.bias is None:
        raise ValueError(
            f"the backbone's last layer {name!r} has no bias; give it one: "
            f"backbone.{name}.bias = nn.Parameter(torch.zeros({linear.out_features}))"
        )
    if len(logits) != len(calls[-1].received[0]):
        raise ValueError(f"the backbone returns {len(logits)} rows for 2 images; it must return logits [N, K]")
    if num_classes not in (None, linear.out_features):
        raise ValueError(
            f"num_classes={num_classes}, but the backbone has {linear.out_features}; first replace its last "
            f"layer {name!r} by nn.Linear({linear.in_features}, {num_classes})"
        )
    return name, linear


def layouts_of(exits: Sequence[str], calls: Sequence[Call], images: Tensor) -> list[str]:
    """How what each exit returned is a map, see `layouts.layout_of`.

    `ValueError` unless each is called once and returns one map [N, C, H, W] or [N, H, W, C] or tokens [N, T, C]; of a
    backbone on rows a map [N, C, L].
    """
    rows = images.dim() == 3
    maps = "[N, C, L]" if rows else "[N, C, H, W]"
    found = []
    for name in exits:
        returned = [call.returned for call in calls if call.name == name]
        where = f"exits={list(exits)}: {name!r}"
        if len(returned) != 1:
            raise ValueError(f"{where} is called {len(returned)} times; take a module that is called once")
        (value,) = returned
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} returns a {type(value).__name__}; take a module that returns one map {maps}")
        layout = layout_of(value, images)
        if layout is None:
            shape, tokens = ", ".join(["N", *map(str, value.shape[1:])]), "" if rows else " or tokens [N, T, C]"
            raise ValueError(f"{where} returns shape [{shape}], but an exit needs maps {maps}{tokens}")
        found.append(layout)
    return found
