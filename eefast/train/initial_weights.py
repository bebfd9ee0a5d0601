"""A file, or the name of published weights → a backbone that starts from them, its last linear perhaps at random."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from ..checkpoint.weights import load_backbone
from ..surgery.pretrained import weights_file


def initialise(body: nn.Module, backbone: str, weights: str | Path, download: bool, frozen: bool) -> None:
    """Put weights into the backbone called `backbone`.

    weights: a file or folder, or a name as `surgery.pretrained.weights_file` takes it. Where they are for another
        number of classes, the last linear keeps its random weights, which is said on stderr.
    frozen: whether the backbone will not be trained. Raises `ValueError` where its last linear would stay random, and
        for weights that do not fit; `FileNotFoundError` for those that are not there.
    """
    path = Path(weights).expanduser()
    if not path.exists() and path.name == str(weights) and not path.suffix:
        path = weights_file(backbone, path.name, download)
    last = load_backbone(body, path)
    if last is None:
        return
    classes = body.get_submodule(last).out_features
    if frozen:
        raise ValueError(
            f"freeze_backbone=True keeps the last linear {last!r}, but weights={str(weights)!r} are for another number "
            f"of classes than {classes}; leave it out, or give weights for {classes} classes"
        )
    print(
        f"weights={str(weights)!r} are for another number of classes: the last linear {last!r} starts from random "
        f"weights, for {classes}",
        file=sys.stderr,
    )
