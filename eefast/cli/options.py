"""Options that several commands have, with one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..criteria import CARRYING, CRITERIA

CRITERION_NAMES = ", ".join(CRITERIA)

Network = Annotated[Path, Argument(help="A folder that net.save() wrote, or a checkpoint of the reference repository.")]
Dataset = Annotated[
    str | None,
    Option(
        help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet, folder; by default that of training.",
        show_default=False,
    ),
]
OtherData = Annotated[
    bool,
    Option("--other-data", help="Use the data set, seed and held-out images named, even if training used others."),
]
FewImages = Annotated[
    bool, Option("--few-images", help="Choose thresholds even on too few images to resolve the budget.")
]
DataRoot = Annotated[
    Path | None,
    Option(help="Folder with the data set's published files, by default data; MNIST's test images need none."),
]
Download = Annotated[bool, Option(help="Fetch missing files into the data folder, where torchvision can.")]
Split = Annotated[str, Option(help="test or train.")]
Images = Annotated[int | None, Option(help="Number of images to use, the first ones.", min=1)]
HeldOut = Annotated[
    int | None,
    Option(
        help="Number of held-out training images; by default all that training kept aside.", min=1, show_default=False
    ),
]
Seed = Annotated[
    int | None, Option(help="Seed that selects the held-out images; by default that of training.", show_default=False)
]
Cache = Annotated[
    Path | None, Option(help="File (.safetensors) that caches the outputs of all exits on the held-out images.")
]
BatchSize = Annotated[int, Option(help="Images per call.", min=1)]
Workers = Annotated[int, Option(help="Number of processes that decode images.", min=0)]
Device = Annotated[str, Option(help="auto, cpu, cuda.")]
Engine = Annotated[str, Option(help="auto, resident, compact, reference.")]
Stages = Annotated[
    str, Option(help="What runs the compact engine's stages: auto, pytorch, onnxruntime, openvino, compile.")
]
CropFraction = Annotated[
    float | None,
    Option(
        "--crop-fraction",
        "--crop-pct",
        help="Share of an image's shorter side in the centre that is looked at; by default as in training.",
        show_default=False,
    ),
]
CriterionName = Annotated[str, Option(help=f"{CRITERION_NAMES}, or all; default: the network's.")]
AnyCriterionName = Annotated[
    str,
    Option(
        help=f"{CRITERION_NAMES}, {', '.join(CARRYING)}, or all, which are then compared at equal cost; default: the "
        "network's."
    ),
]
MinAccuracy = Annotated[float | None, Option(help="Budget: lowest cost with at least this accuracy, 0 … 1.")]
MaxAccuracyDrop = Annotated[
    float | None, Option(help="Budget: lowest cost with at most this drop below the final exit's accuracy; 0.005.")
]
MaxCost = Annotated[float | None, Option(help="Budget: most accurate thresholds with at most this mean cost, 0 … 1.")]
Assurance = Annotated[
    float, Option(help="Probability, below 1, with which the budget holds on new images like the held-out ones.")
]
NoAssurance = Annotated[
    bool, Option("--no-assurance", help="Keep the budget on the held-out images only, which new ones often break.")
]
ProfileTexts = Annotated[
    list[str] | None,
    Option(
        "--profile",
        help="A named row of thresholds, NAME:BOUND=VALUE[,BOUND=VALUE][@ASSURANCE], such as normal:drop=0.005@0.9 or "
        "eco:cost=0.1; may be repeated; --save saves them as the network's profiles.",
        show_default=False,
    ),
]
Figure = Annotated[Path, Option(help="File of the picture; its ending is its type.")]
Json = Annotated[str, Option("--json", help="Write the figures as JSON to this file, or - for stdout.")]
