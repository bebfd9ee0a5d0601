"""Options that several commands have, with one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Network = Annotated[Path, Argument(help="A folder of net.save(), or a checkpoint of the reference repository.")]
Dataset = Annotated[
    str | None,
    Option(
        help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet, folder; the one that it was trained on.",
        show_default=False,
    ),
]
OtherData = Annotated[
    bool,
    Option("--other-data", help="Take the data set, seed and held-out images named, though training had others."),
]
FewImages = Annotated[
    bool, Option("--few-images", help="Choose thresholds on fewer images than tell the accuracies apart.")
]
DataRoot = Annotated[
    Path | None, Option(help="Folder with the data set's published files; data, or for MNIST's test images none.")
]
Download = Annotated[bool, Option(help="Fetch missing files into the data folder, where torchvision can.")]
Split = Annotated[str, Option(help="test, or train.")]
Images = Annotated[int | None, Option(help="Use only the first so many images.", min=1)]
HeldOut = Annotated[
    int | None,
    Option(
        help="Number of held-out training images; by default all that training kept aside.", min=1, show_default=False
    ),
]
Seed = Annotated[int | None, Option(help="Of the held-out images; that of eefast train.", show_default=False)]
Cache = Annotated[
    Path | None, Option(help="File (.safetensors) that keeps all exits' outputs on the held-out images for next time.")
]
BatchSize = Annotated[int, Option(help="Images per call.", min=1)]
Workers = Annotated[int, Option(help="Processes that decode images.", min=0)]
Device = Annotated[str, Option(help="auto, cpu, cuda.")]
CriterionName = Annotated[str, Option(help="learned, max_probability, entropy, margin, or all; the network's own.")]
MinAccuracy = Annotated[float | None, Option(help="Cheapest with at least this accuracy, 0 … 1.")]
MaxAccuracyDrop = Annotated[
    float | None, Option(help="Cheapest with at most this drop below the final exit's accuracy; 0.005.")
]
MaxCost = Annotated[float | None, Option(help="Most accurate with at most this mean cost.")]
Figure = Annotated[Path, Option(help="Where the picture goes.")]
Json = Annotated[str, Option("--json", help="Write the figures as JSON to this file, or - for stdout.")]
