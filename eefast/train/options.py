"""The options of a training run → one frozen value, checked, that is recorded and compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from .. import zoo
from . import losses
from .optimizers import OPTIMIZERS, SCHEDULES

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
# Where and how fast a resumed run continues may differ; what it learns may not.
FREE_TO_CHANGE = ("download", "device", "devices", "nodes", "strategy", "workers", "tensorboard", "resume", "test")


@dataclass(frozen=True)
class TrainOptions:
    """What `eefast.train.run.train` is told; `eefast train` has an option for each.

    net: name of the network, "eenet8" … "eenet152" or "resnet8".
    dataset: name of the data set, see `eefast.data.datasets.DATASETS`.
    data_root: folder with the data set's published files.
    output: folder for config.json, model.safetensors (weights of the epoch with the lowest held-out loss),
        training.json (which images it was trained on, see `eefast.record`), thresholds.json (for every
        criterion), report.json, best.ckpt and last.ckpt (Lightning's checkpoints with the optimiser's state) and
        logs/version_0/metrics.csv.
    download: fetch missing files into `data_root` where torchvision can, and published weights into its cache.
    image_size: height and width of photographs, for "imagenet" and "folder"; None: 224.
    crop_fraction: share of a photograph's shorter side in the centre that is measured, timm's crop_pct; for "imagenet"
        and "folder"; None: 224/256, or 1 for a folder of images that already have this size.
    num_exits: number of early exits.
    placement: which residual blocks the early exits follow: fine, pareto, linear, gold_ratio, or numbers of blocks, 0:
        the stem.
    head: kind of the early exits' heads, see `eefast.heads.ExitHead`; one for all, or one for each.
    carry: "features": the final exit also reads the pooled features of the last early one, see `eefast.carrying`.
    backbone: instead of `net`, "torchvision:NAME" or "timm:NAME".
    exits: names of the backbone's modules after which its early exits are attached, see
        `eefast.attach`.
    weights: file or folder with initial weights: of the backbone, whose last linear keeps random weights where those in
        the file are for another number of classes, or of the whole `net`, whose early exits do where those are of
        another kind of head. With `backbone` also the name of published weights, such as "IMAGENET1K_V1" of torchvision
        or "a1_in1k" of timm, in the library's cache or, with `download`, fetched there.
    freeze_backbone: train the early heads only; weights and BatchNorm statistics of the backbone stay (PTEENet), except
        its last linear under `carry`, which is made anew.
    self_labelled: the frozen backbone's answers replace the labels (PTEENet).
    other_data: take seed and held-out images as they are given, even if `weights` learned from some that are held out.
    teacher: for a loss with "taught", the folder of a trained network for the same images, whose final exit all exits
        learn from (Hinton et al. 2015), or with "final_taught" the final one.
    train_images: number of training images to train on, drawn by the seed; None: all that are not held out.
    epochs: passes over the training images.
    batch_size: images per step and device.
    learning_rate: at the peak of the schedule.
    optimizer: adamw, adam, or sgd with Nesterov momentum 0.9.
    schedule: one-cycle (which varies momentum, too, as PyTorch's `OneCycleLR` does), cosine, step (÷ 10 after 1/2 and
        3/4 of the run), constant.
    weight_decay: of the optimiser.
    loss: weighted sum of terms, such as "v0+0.5*correctness", see `eefast.train.losses`.
    two_stage: number of first epochs that minimise "deep_supervision" (v0) instead of `loss`; EENets take 25, then v1.
    balance_gradients: the trunk learns from the mean of the exits' gradients instead of their sum, see
        `eefast.train.balanced_gradients`.
    cost_weight: λ, the price of cost in all losses that include it.
    shift: largest random shift of training images, in pixels; None: as in the papers, 4 for CIFAR-10, an
        eighth of the size for small images of "folder" that already have `image_size`.
    flip: mirror training images at random; None: as in the papers, not for MNIST, Fashion-MNIST, SVHN.
    held_out: number of training images, drawn by the seed, that are not trained on; thresholds and accuracies come from
        them; None: 5,000, at most a fifth of the images.
    max_accuracy_drop: thresholds give the lowest cost with at most this drop below the final exit's held-out accuracy.
    max_cost: instead, thresholds give the highest accuracy with at most this mean cost.
    seed: of weights, order, held-out images and the first exit tags.
    precision: 32-true, 16-mixed, bf16-mixed.
    device: auto, cpu, cuda, or another of Lightning's accelerators.
    devices, nodes, strategy: how many, and how they share the work, as Lightning's Trainer takes them; -1: all.
    workers: number of processes that decode images; in-memory data sets need none.
    tensorboard: write logs for TensorBoard beside the CSV file.
    resume: continue from last.ckpt in `output`, with the options of that run; on the CPU the result is bit for bit that
        of an uninterrupted run. A run that ended in its first epoch, recorded by started.json in `output`, starts
        again.
    test: measure the test split once at the end.
    Raises `ValueError`, naming the option, for values that no data set and network could fit.
    """

    free_to_change: ClassVar[Sequence[str]] = FREE_TO_CHANGE

    net: str = "eenet20"
    dataset: str = "mnist"
    data_root: str | Path = "data"
    output: str | Path = "runs/trained"
    download: bool = False
    image_size: int | None = None
    crop_fraction: float | None = None
    num_exits: int = 3
    placement: str | Sequence[int] = "fine"
    head: str | Sequence[str] = "pool"
    carry: str | None = None
    backbone: str | None = None
    exits: Sequence[str] = ()
    weights: str | Path | None = None
    freeze_backbone: bool = False
    self_labelled: bool = False
    other_data: bool = False
    teacher: str | Path | None = None
    train_images: int | None = None
    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 0.01
    optimizer: str = "adamw"
    schedule: str = "one-cycle"
    weight_decay: float = 1e-4
    loss: str = "deep_supervision+correctness"
    two_stage: int = 0
    balance_gradients: bool = False
    cost_weight: float = 1.0
    shift: int | None = None
    flip: bool | None = None
    held_out: int | None = None
    max_accuracy_drop: float = 0.005
    max_cost: float | None = None
    seed: int = 1
    precision: str = "32-true"
    device: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    workers: int = 0
    tensorboard: bool = False
    resume: bool = False
    test: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
        self._check_network()
        loss = losses.parse(self.loss, self.cost_weight)
        self._check_frozen(loss)
        self._check_teacher(loss)

    def _check_frozen(self, loss: losses.WeightedSum) -> None:
        if self.self_labelled and not self.freeze_backbone:
            raise ValueError(
                "self_labelled=True needs a frozen backbone, since labels that are trained too teach nothing; "
                "add freeze_backbone=True"
            )
        if self.freeze_backbone and self.weights is None and not self.resume:
            raise ValueError(
                "freeze_backbone=True keeps random weights, from which early exits learn little; give weights of the "
                "backbone or of the whole network: --weights (weights=)"
            )
        if self.freeze_backbone and loss.trains_final_alone:
            raise ValueError(
                f"loss={self.loss!r} trains the final exit alone, which freeze_backbone=True keeps; add a term for the "
                "early exits, such as deep_supervision"
            )

    def _check_teacher(self, loss: losses.WeightedSum) -> None:
        if loss.uses_teacher != (self.teacher is not None):
            raise ValueError(
                f"teacher={self.teacher!r}, loss={self.loss!r}: a teacher and a loss with a term taught need each "
                "other; give both, or none of them"
            )

    def _check_network(self) -> None:
        if bool(self.backbone) != bool(self.exits):
            raise ValueError(
                f"backbone={self.backbone!r}, exits={list(self.exits)}: give both, or none of them with net"
            )
        if self.backbone and not self.backbone.startswith(("torchvision:", "timm:")):
            raise ValueError(
                f"backbone={self.backbone!r} must be torchvision:NAME or timm:NAME, such as torchvision:resnet18"
            )
        if not self.backbone and self.net.removesuffix("-1d") not in zoo.names():
            raise ValueError(
                f"net={self.net!r} is unknown; choose one of {', '.join(zoo.names())}, or a network of torchvision or "
                "timm with backbone and exits: --backbone torchvision:resnet18 --exits layer1,layer2"
            )

    def _check_numbers(self) -> None:
        for name, least in (
            ("epochs", 1), ("batch_size", 2), ("train_images", 1), ("held_out", 1), ("devices", -1), ("nodes", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value < least or value == 0):
                raise ValueError(f"{name}={value} must be at least {least}" + " and not 0" * (least < 0))
        if self.crop_fraction is not None and self.dataset not in ("imagenet", "folder"):
            raise ValueError(
                f"crop_fraction={self.crop_fraction}: images of {self.dataset} are not cropped; leave it out"
            )
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction={self.crop_fraction} must be above 0 and at most 1")
        for name, fits, range_ in (
            ("learning_rate", 0 < self.learning_rate < inf, "above 0 and finite"),
            ("weight_decay", 0 <= self.weight_decay < inf, "at least 0 and finite"),
            ("cost_weight", -inf < self.cost_weight < inf, "finite"),
            ("shift", self.shift is None or self.shift >= 0, "at least 0"),
            ("seed", 0 <= self.seed < 2**32, "in 0 … 4294967295"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must be {range_}")
        if not 0 <= self.max_accuracy_drop <= 1:
            raise ValueError(f"max_accuracy_drop={self.max_accuracy_drop} must be in 0 … 1")
        if not 0 <= self.two_stage < self.epochs:
            raise ValueError(f"two_stage={self.two_stage} must be in 0 … epochs - 1 = {self.epochs - 1}")

    def record(self) -> dict[str, Any]:
        """What determined the network, as JSON takes it: no folders, of weights and teacher the last part of a path."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        del found["data_root"], found["output"]
        for name in ("weights", "teacher"):
            found[name] = None if found[name] is None else Path(found[name]).name
        return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in found.items()}

    def check_same_run(self, before: dict[str, Any]) -> None:
        """`ValueError`, naming the first difference, unless a run of the record `before` may be resumed with these."""
        for name, value in self.record().items():
            # An option that the run did not have yet was at its default.
            found = before.get(name, getattr(TrainOptions, name, None))
            if name not in self.free_to_change and found != value:
                raise ValueError(
                    f"{name}={value!r}, but the run to resume has {found!r}; give the same, or start again "
                    "without --resume (resume=False)"
                )
