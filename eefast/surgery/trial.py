"""Parts of a cut backbone → whether they answer as the whole does, tried on noise of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from .calls import run

_WAY_OUT = (
    "it computes something that torch.fx does not see; build eefast.EarlyExitNet(stages, heads, ...) from its modules"
)


def averages(pool: nn.Module, like: Tensor) -> bool:
    """Whether `pool` maps [N, C, H, W], or [N, C, L], to the mean [N, C]; tried, since it can be written in many ways.

    A window of fixed size averages the maps of one size only, and a squeeze drops the dimension of a single image.
    """
    n, channels, *sides = like.shape
    h, w = sides[0], sides[-1]
    if like.is_meta:  # tried on the CPU, on maps that take little memory
        h, w = min(h, 16), min(w, 16)
    for shape in ((n, h, w), (1, 2 * h + 1, w + 3), (3, 1, 1), (2, 41, 37)):
        # Large, so that an activation after the pooling shows, and float64, so that rounding does not.
        generator = torch.Generator("cpu").manual_seed(0)
        size = shape[1:][-len(sides) :]
        x = torch.randn(shape[0], channels, *size, dtype=torch.float64, generator=generator, device="cpu")
        x = 100 * (x if like.is_meta else x.to(like.device))
        try:
            out = run(pool, x.clone())
        except Exception:  # whatever the backbone raises for maps of another size
            return False
        if out.shape != x.shape[:2] or not torch.allclose(out.double(), x.flatten(2).mean(2), rtol=0, atol=1e-3):
            return False
    return True


def check_answers(cut: nn.Module, backbone: nn.Module, answers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`ValueError` where the answers differ, as with a branch on the images or their size, which tracing cannot see.

    answers: batches of different sizes and the backbone's logits. `cut` and `backbone` share their weights, which are
    changed for the last check: what was computed from them while tracing does not follow.
    """

    def check(images: Tensor, expected: Tensor, when: str) -> None:
        try:
            got = run(cut, images.clone())
        except Exception as error:  # whatever shapes that do not fit raise
            raise ValueError(
                f"the cut backbone fails {when} ({error}), and the whole one does not; {_WAY_OUT}"
            ) from error
        expected = expected.view_as(got) if expected.numel() == got.numel() else expected
        scale = float(expected.abs().nan_to_num(0, 0).max())
        if got.shape != expected.shape or not torch.allclose(
            got, expected, rtol=0.01, atol=0.01 * scale, equal_nan=True
        ):
            off = (
                f"{(got - expected).abs().max():.3g} off"
                if got.shape == expected.shape
                else f"of shape {tuple(got.shape)}, unlike"
            )
            raise ValueError(f"{when} the cut backbone's logits are {off} the whole one's; {_WAY_OUT}")

    for images, expected in answers:
        check(images, expected, f"for images of {tuple(images.shape[2:])}")
    generator = torch.Generator("cpu").manual_seed(0)
    for t in chain(backbone.parameters(), backbone.buffers()):
        if t.is_floating_point():
            factor = 0.5 + torch.rand(t.shape, generator=generator, device="cpu", dtype=torch.float32).to(t)
            t.copy_(torch.where(t == 0, 0.1 * factor, t * factor))
    images = answers[0][0]
    check(images, run(backbone, images.clone()), "with other weights")
