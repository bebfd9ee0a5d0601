"""Features of a stage → class logits and confidence of an exit."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from .result import ExitOutput

STRIDED = ("strided1", "strided2", "strided3")
DEEP = ("deep1", "deep2", "deep3")
HEADS = ("pool", "bnpool", "plain", "conv1", "conv2", "conv3", "depthwise", *STRIDED, *DEEP)
TOKEN_HEADS = ("pool", "bnpool", "token")


def kinds_of(head: str | Sequence[str], exits: int) -> list[str]:
    """The kind of each early exit's head; head: one for all, or a list; `ValueError` for a list of another length."""
    kinds = [head] * exits if isinstance(head, str) else list(head)
    if len(kinds) != exits:
        raise ValueError(f"head={kinds} has {len(kinds)} kinds for {exits} early exits; give one for each, or one name")
    return kinds


def shortest(kinds: Sequence[str]) -> str | list[str]:
    """What `kinds_of` takes for these kinds: one name where all are the same."""
    return kinds[0] if len(set(kinds)) == 1 else list(kinds)


def channels_read(kind: str, channels: int) -> int:
    """Channels of the map that a head pools, where the features have `channels`."""
    for kinds in (STRIDED, DEEP):
        if kind in kinds:
            return channels << kinds.index(kind) + 1
    return 2 * channels if kind == "depthwise" else channels


class FirstToken(nn.Module):
    """A map of tokens [N, C, 1, T] → the first of them, [N, C, 1, 1]."""

    def forward(self, features: Tensor) -> Tensor:
        return features[..., :1]


class ExitHead(nn.Module):
    """(Convolutions) → (BatchNorm) → pooling or flattening → one linear for the classes, one for the confidence.

    kind: "pool", "bnpool" and "plain" as in EENets (Demir & Akbas 2024); "conv1" … "conv3" as in PTEENet (Lahiany &
        Aperstein 2022): k × [conv3x3 C→C without bias, BatchNorm, ReLU] before the pooling; "depthwise" as in T-RecX
        (Ghanathe & Wilton 2023): conv1x1 C→2C, depthwise conv2x2 of stride 2, ReLU, for maps of at least 2×2.
        "strided1" … "strided3": k × [conv3x3 of stride 2 C→2C without bias, BatchNorm, ReLU], which see as much of the
        image as the rest of a ResNet would; "deep1" … "deep3": with a conv3x3 2C→2C, BatchNorm, ReLU after each, as a
        block of a ResNet has it. "token" reads the first of T tokens, which are a map [C, 1, T].
    feature_shape: (C, H, W) of the features, or (C, L) of rows.
    input_shape: of the network's input; "plain" is defined only where the features still have its H×W, or its L.

    forward: features [N, C, H, W] or [N, C, L] → `ExitOutput`(logits [N, K], confidence [N], confidence_logit [N]).
    """

    def __init__(self, kind: str, feature_shape: Sequence[int], num_classes: int, input_shape: Sequence[int]) -> None:
        super().__init__()
        if kind not in (*HEADS, *TOKEN_HEADS):
            raise ValueError(f"head={kind!r} is unknown; choose one of {', '.join(HEADS)}")
        channels, *size = feature_shape
        rows = len(size) == 1
        if kind == "token" and (rows or size[0] > 1):
            raise ValueError(f"head='token' reads tokens, but here the map is {tuple(size)}; choose head='pool'")
        if kind == "plain" and size != list(input_shape[1:]):
            raise ValueError(
                f"head='plain' flattens a map of the input's size {tuple(input_shape[1:])}, but here the map is "
                f"{tuple(size)}; place the exits earlier or choose head='pool'"
            )
        if kind == "depthwise" and (rows or min(size) < 2):
            raise ValueError(
                f"head='depthwise' halves a map of at least 2×2, but here the map is {tuple(size)}; place the exits "
                "earlier or choose head='pool'"
            )
        self.kind, self.feature_shape = kind, (channels, *size)
        self.num_features = prod(self.feature_shape) if kind == "plain" else channels_read(kind, channels)
        self.convs = nn.Sequential(*_convolutions(kind, channels, rows))
        norm, pool = (nn.BatchNorm1d, nn.AdaptiveAvgPool1d) if rows else (nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
        self.norm = norm(channels) if kind == "bnpool" else nn.Identity()
        self.pool = nn.Flatten() if kind == "plain" else nn.Sequential(pool(1), nn.Flatten())
        self.classifier = nn.Linear(self.num_features, num_classes)
        self.confidence = nn.Linear(self.num_features, 1)

    def forward(self, features: Tensor) -> ExitOutput:
        pooled = self.pool(self.norm(self.convs(features)))
        confidence_logit = self.confidence(pooled).squeeze(1).float()
        return ExitOutput(self.classifier(pooled), torch.sigmoid(confidence_logit), confidence_logit)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


def _convolutions(kind: str, channels: int, rows: bool) -> list[nn.Module]:
    if kind == "depthwise":
        width = channels_read(kind, channels)  # as where the maps of a ResNet are halved
        return [nn.Conv2d(channels, width, 1), nn.Conv2d(width, width, 2, 2, groups=width), nn.ReLU(inplace=True)]
    if kind == "token":
        return [FirstToken()]
    if kind in STRIDED:
        return [_conv_bn_relu(width, 2 * width, 2, rows) for width in _halved(channels, STRIDED.index(kind))]
    if kind in DEEP:
        return [
            _conv_bn_relu(*shape, rows)
            for width in _halved(channels, DEEP.index(kind))
            for shape in ((width, 2 * width, 2), (2 * width, 2 * width, 1))
        ]
    count = int(kind.removeprefix("conv")) if kind.startswith("conv") else 0
    return [_conv_bn_relu(channels, channels, 1, rows) for _ in range(count)]


def _halved(channels: int, last: int) -> list[int]:
    """Channels of the maps that are halved, one after the other."""
    return [channels << i for i in range(last + 1)]


def _conv_bn_relu(channels: int, outputs: int, stride: int, rows: bool) -> nn.Sequential:
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if rows else (nn.Conv2d, nn.BatchNorm2d)
    convolution = conv(channels, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, norm(outputs), nn.ReLU(inplace=True))
