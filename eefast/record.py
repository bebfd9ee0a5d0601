"""What a network was trained on: the value of `EarlyExitNet.record`, saved with the network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRecord:
    """The images that a network was trained on, and which of them were held out.

    network: name of the network or, with its library, of the backbone.
    num_classes, input_shape: as `EarlyExitNet` has them; input_shape is (C, H, W).
    dataset: a name in `eefast.data.datasets.DATASETS`.
    classes: names of the classes in the order of the labels, where folders give them names.
    resize: pixels of the shorter side to which photographs are scaled before the centre is cropped to H × W; None where
        images are not resized.
    images, fingerprint: number of all training images, including those held out, and a hash of their order, see
        `eefast.data.image_sets.fingerprint`.
    held_out, seed: number of images that were held out to choose thresholds on, drawn with this seed, see
        `eefast.data.loaders.split`.
    """

    network: str
    num_classes: int
    input_shape: tuple[int, ...]
    dataset: str
    classes: tuple[str, ...] | None
    resize: int | None
    images: int
    fingerprint: str
    held_out: int
    seed: int
