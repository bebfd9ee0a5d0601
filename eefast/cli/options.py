"""Options that several commands have, with one help text each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..criteria import CARRYING, CRITERIA

data_option, network_option, training_option, thresholds_option, machine_option, run_option = (
    partial(Option, rich_help_panel=title)
    for title in ("Data", "Network", "Training", "Thresholds", "Machine", "Run and output")
)
CRITERION_NAMES = ", ".join(CRITERIA)

Network = Annotated[Path, Argument(help="A folder that net.save() wrote, or a checkpoint of the reference repository.")]
Dataset = Annotated[
    str | None,
    data_option(
        help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet, folder; by default that of training.",
        show_default=False,
    ),
]
OtherData = Annotated[
    bool,
    data_option("--other-data", help="Use the data set, seed and held-out images named, even if training used others."),
]
FewImages = Annotated[
    bool, data_option("--few-images", help="Choose thresholds even on too few images to resolve the budget.")
]
DataRoot = Annotated[
    Path | None,
    data_option(help="Folder with the data set's published files, by default data; MNIST's test images need none."),
]
Download = Annotated[bool, data_option(help="Fetch missing files into the data folder, where torchvision can.")]
Split = Annotated[str, data_option(help="test or train.")]
Images = Annotated[int | None, data_option(help="Number of images to use, the first ones.", min=1)]
HeldOut = Annotated[
    int | None,
    data_option(
        help="Number of held-out training images; by default all that training kept aside.", min=1, show_default=False
    ),
]
Seed = Annotated[
    int | None,
    data_option(help="Seed that selects the held-out images; by default that of training.", show_default=False),
]
Cache = Annotated[
    Path | None, data_option(help="File (.safetensors) that caches the outputs of all exits on the held-out images.")
]
BatchSize = Annotated[int, machine_option(help="Images per call.", min=1)]
Workers = Annotated[int, machine_option(help="Number of processes that decode images.", min=0)]
Device = Annotated[str, machine_option(help="auto, cpu, cuda.")]
Engine = Annotated[str, machine_option(help="auto, resident, compact, reference.")]
Stages = Annotated[
    str, machine_option(help="What runs the compact engine's stages: auto, pytorch, onnxruntime, openvino, compile.")
]
CropFraction = Annotated[
    float | None,
    data_option(
        "--crop-fraction",
        "--crop-pct",
        help="Share of an image's shorter side in the centre that is looked at; by default as in training.",
        show_default=False,
    ),
]
CriterionName = Annotated[str, thresholds_option(help=f"{CRITERION_NAMES}, or all; default: the network's.")]
AnyCriterionName = Annotated[
    str,
    thresholds_option(
        help=f"{CRITERION_NAMES}, {', '.join(CARRYING)}, or all, which are then compared at equal cost; default: the "
        "network's."
    ),
]
MinAccuracy = Annotated[float | None, thresholds_option(help="Budget: lowest cost with at least this accuracy, 0 … 1.")]
MaxAccuracyDrop = Annotated[
    float | None,
    thresholds_option(help="Budget: lowest cost with at most this drop below the final exit's accuracy; 0.005."),
]
MaxCost = Annotated[
    float | None, thresholds_option(help="Budget: most accurate thresholds with at most this mean cost, 0 … 1.")
]
ASSURANCE = 0.9
Assurance = Annotated[
    float | None,
    thresholds_option(
        help="Probability, below 1, with which the budget holds on new images like the held-out ones.",
        show_default=str(ASSURANCE),
    ),
]
NoAssurance = Annotated[
    bool,
    thresholds_option(
        "--no-assurance", help="Keep the budget on the held-out images only, which new ones often break."
    ),
]
ProfileTexts = Annotated[
    list[str] | None,
    thresholds_option(
        "--profile",
        help="A named row of thresholds, NAME:BOUND=VALUE[,BOUND=VALUE][@ASSURANCE], such as normal:drop=0.005@0.9 or "
        "eco:cost=0.1; may be repeated; --save saves them as the network's profiles.",
        show_default=False,
    ),
]
Figure = Annotated[Path, run_option(help="File of the picture; its ending is its type.")]
Json = Annotated[str, run_option("--json", help="Write the figures as JSON to this file, or - for stdout.")]
