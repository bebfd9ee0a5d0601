"""A backbone from images to logits and names of its modules → an `EarlyExitNet` with an exit after each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice

import torch
from torch import nn

from ..carrying import JoinedStage, carry_on
from ..heads import TOKEN_HEADS, ExitHead, kinds_of, shortest
from ..model import EarlyExitNet
from .backbones import origin
from .cutting import cut_at
from .graph import module_of
from .layouts import TOKENS
from .obstacles import check_backbone, check_names


def attach(
    backbone: nn.Module,
    exits: Sequence[str],
    *,
    head: str | Sequence[str] = "pool",
    num_classes: int | None = None,
    input_shape: Sequence[int] = (3, 224, 224),
    criterion: str = "learned",
    thresholds: Sequence[float] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    carry: str | None = None,
) -> EarlyExitNet:
    """The backbone with early exits; shares its modules, so that training either trains both.

    backbone: images [N, C, H, W] → logits [N, K], the last layer an `nn.Linear`; from torchvision, timm or your own.
    exits: names of modules, as in `backbone.named_modules()` and in the order in which they run; each returns one map
        [N, C, H, W] or [N, H, W, C], or tokens [N, T, C], that is all the rest of the backbone needs. An exit is placed
        after each; features there are maps, those of tokens [N, C, 1, T].
    head: kind of the early exits' heads, see `eefast.heads.ExitHead`; one for all, or one for each. After tokens "pool"
        reads their mean, "bnpool" that of their BatchNorm, "token" the first one, in most networks the class token.
    num_classes: by default that of the backbone; another number is an error.
    input_shape: (C, H, W) of the images, for which the costs are counted; (C, L) of a backbone on rows [N, C, L].
    criterion, thresholds, normalization: see `EarlyExitNet`.
    carry: "features": the final exit also reads the pooled features of the last early one (T-RecX), see
        `eefast.carrying`; its linear is a copy of the backbone's, with weights 0 for them. None: its own only.

    The backbone's own pooling and last linear are the final exit, so that without early exits the answers are the
    backbone's, at every image size that it takes. All trials run on a copy of the backbone, which takes its memory once
    more; its tensors, flags and hooks do not change. The network is in training mode if the backbone is.
    `net.save` needs a backbone of `eefast.surgery.backbone`, which knows its name.
    Raises `ValueError` for names, cuts and backbones that do not fit, saying which would.
    """
    check_backbone(backbone)
    return rebuild(
        backbone,
        exits,
        head=head,
        num_classes=num_classes,
        input_shape=input_shape,
        criterion=criterion,
        thresholds=thresholds,
        normalization=normalization,
        carry=carry,
    )


def rebuild(
    backbone: nn.Module,
    exits: Sequence[str],
    *,
    head: str | Sequence[str],
    num_classes: int | None,
    input_shape: Sequence[int],
    criterion: str,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
    thresholds: Sequence[float] | None = None,
    carry: str | None = None,
) -> EarlyExitNet:
    """As `attach`, also for a backbone on the meta device, where it takes no memory and no answers are compared."""
    exits = check_names(backbone, exits)
    kinds = kinds_of(head, len(exits))
    cut = cut_at(backbone, exits, num_classes, input_shape)
    # Layers made in inference mode could not be trained, and those on another default device not be used.
    with torch.inference_mode(False), torch.device("cpu"):
        stages: list[nn.Module] = [module_of(backbone, graph) for graph in cut.stages]
        linear = backbone.get_submodule(cut.classifier)
        assert isinstance(linear, nn.Linear)
        heads: list[ExitHead] = []
        for i, features in enumerate(cut.features):
            kind, like = (kinds[i], features) if i < len(exits) else ("pool", linear.weight)
            if i < len(exits) and cut.layouts[i] == TOKENS and kind not in TOKEN_HEADS:
                raise ValueError(
                    f"head={kind!r} reads maps, but {exits[i]!r} returns tokens; choose one of {', '.join(TOKEN_HEADS)}"
                )
            with features.device if features.is_meta else nullcontext():
                heads.append(ExitHead(kind, features.shape[1:], linear.out_features, input_shape).to(like))
        heads[-1].classifier = linear
        if cut.pool is not None:
            heads[-1].pool = nn.Sequential(module_of(backbone, cut.pool))
        carry_on(carry, stages, heads, input_shape)
        _check_dtype(stages)
        net = EarlyExitNet(
            stages,
            heads,
            input_shape=input_shape,
            criterion=criterion,
            thresholds=thresholds,
            normalization=normalization,
        )
    theirs = set(backbone.modules())
    for made in net.modules():
        if made not in theirs:
            made.training = backbone.training
    _describe(net, backbone, exits, shortest(kinds) if kinds else "pool", carry)
    return net


def _check_dtype(stages: Sequence[nn.Module]) -> None:
    for name, first in islice(nn.ModuleList(stages).named_parameters(prefix="stages"), 1):
        if not first.is_floating_point():
            raise ValueError(
                f"{name} is {first.dtype}; images have the dtype of the first parameter, so make it a float"
            )


def _describe(
    net: EarlyExitNet, backbone: nn.Module, exits: Sequence[str], head: str | list[str], carry: str | None
) -> None:
    """Tell `net` how `eefast.load` builds it again, or why that is impossible."""
    name = origin(backbone)
    if name is None:
        net.built_from = f"a {type(backbone).__name__} that eefast.surgery.backbone did not make, or that was changed"
        return
    net.config = {
        "kind": "attached",
        "backbone": name,
        "exits": list(exits),
        "head": head,
        "num_classes": net.num_classes,
        "input_shape": list(net.input_shape),
        **({"carry": carry} if carry else {}),
    }


def new_parameters(net: EarlyExitNet) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that `attach` made: the early heads and the final exit's confidence row."""
    confidence = f"heads.{net.num_exits}.confidence."
    early = tuple(f"heads.{i}." for i in range(net.num_exits))
    if net.num_exits and isinstance(net.stages[-1], JoinedStage):  # its linear was made here, too
        confidence = f"heads.{net.num_exits}."
    named = net.named_parameters(remove_duplicate=False)  # a stage may share those of a head
    return [(name, value) for name, value in named if name.startswith((*early, confidence))]
