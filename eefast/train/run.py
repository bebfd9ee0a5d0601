"""The whole way from a data set's name to a folder with a trained, calibrated network."""

from __future__ import annotations

import csv
import json
import logging
import pickle
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import Subset

from .. import zoo
from ..checkpoint.record import RECORD_FILE
from ..criteria import CRITERIA, get
from ..data import datasets
from ..data.loading import batches, default_held_out, split
from ..model import ATTACHED_FILE, CONFIG_FILE, WEIGHTS_FILE
from ..result import ExitOutput
from ..surgery import backbone as backbones
from ..surgery.attachment import attach
from ..system import files
from ..thresholds.calibration import THRESHOLDS_FILE, Calibration, calibrate, least_images
from ..thresholds.outputs import collect, exits_taken, outcome
from . import losses
from .batches import EpochSeeds, training_batches
from .module import DivergedError, EarlyExitModule

REPORT_FILE, LOGS_FOLDER = "report.json", "logs"
BEST_FILE, LAST_FILE = "best.ckpt", "last.ckpt"
# The arguments of a run that is not done; the report has them afterwards.
STARTED_FILE = "started.json"
CHECKPOINT_FORMAT = 1
_WRITTEN = (
    BEST_FILE, LAST_FILE, STARTED_FILE, WEIGHTS_FILE, CONFIG_FILE, ATTACHED_FILE, RECORD_FILE,
    THRESHOLDS_FILE, REPORT_FILE, f"{LOGS_FOLDER}/*/metrics.csv",
)  # fmt: skip
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
# Where and how fast a run goes on may change when it is resumed; what it learns may not.
_FREE_TO_CHANGE = ("download", "device", "devices", "nodes", "strategy", "workers", "tensorboard", "resume", "test")


@dataclass(frozen=True)
class TrainReport:
    """What a training run measured; `report.json` holds the same.

    best_epoch: 1 …, the epoch whose weights were saved: the one with the least held-out loss, `best_held_out_loss`.
    exit_accuracy: held-out accuracy of every exit for all images.
    exit_agreement: share of the held-out images for which an exit gives the final exit's answer.
    held_out, test: per criterion in `eefast.criteria`, its thresholds and their accuracy and mean cost; `test` is None
        unless it was asked for. The thresholds always come from the held-out images.
    held_out_agreement, test_agreement: per criterion, share of the images that are answered as by the final exit.
    seconds_per_epoch: wall clock, one number per epoch, validation included.
    """

    arguments: dict[str, Any]
    best_epoch: int
    best_held_out_loss: float
    exit_accuracy: list[float]
    exit_agreement: list[float]
    held_out: dict[str, Calibration]
    held_out_agreement: dict[str, float]
    test: dict[str, Calibration] | None
    test_agreement: dict[str, float] | None
    seconds_per_epoch: list[float]


def train(
    net: str = "eenet20",
    *,
    dataset: str = "mnist",
    data_root: str | Path = "data",
    output: str | Path = "trained",
    download: bool = False,
    image_size: int | None = None,
    num_exits: int = 3,
    placement: str | Sequence[int] = "fine",
    head: str = "pool",
    backbone: str | None = None,
    exits: Sequence[str] = (),
    weights: str | Path | None = None,
    freeze_backbone: bool = False,
    self_labelled: bool = False,
    epochs: int = 12,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    optimizer: str = "adamw",
    schedule: str = "one-cycle",
    weight_decay: float = 1e-4,
    loss: str = "deep_supervision+correctness",
    two_stage: int = 0,
    cost_weight: float = 1.0,
    shift: int | None = None,
    flip: bool | None = None,
    held_out: int | None = None,
    max_accuracy_drop: float = 0.005,
    max_cost: float | None = None,
    seed: int = 1,
    precision: str = "32-true",
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    workers: int = 0,
    tensorboard: bool = False,
    resume: bool = False,
    test: bool = False,
) -> TrainReport:
    """Train an early-exit network, choose its thresholds on held-out training images, save it to a folder.

    net: name of the network, "eenet8" … "eenet152".
    dataset: name of the data set, see `eefast.data.datasets.DATASETS`.
    data_root: folder with the data set's published files.
    output: folder for config.json, model.safetensors (weights of the epoch with the least held-out loss),
        training.json (which images it was trained on, see `checkpoint.record`), thresholds.json (for every criterion),
        report.json, best.ckpt and last.ckpt (Lightning's checkpoints with the optimiser's state) and
        logs/version_0/metrics.csv.
    download: fetch missing files into `data_root` where torchvision can.
    image_size: height and width of photographs, for "imagenet" and "folder", by default 224.
    num_exits: number of early exits.
    placement: where they stand: fine, pareto, linear, gold_ratio, or numbers of residual blocks.
    head: kind of the early exits' heads: pool, bnpool, plain, conv1, conv2, conv3.
    backbone: instead of `net`, "torchvision:NAME" or "timm:NAME"; `output` then has attached.json instead of
        config.json, for `eefast.train.backbone.load_attached`.
    exits: names of the backbone's modules behind which its early exits stand, see `eefast.surgery.attach`.
    weights: file or folder with the backbone's weights to start from, or with those of the whole `net`, whose early
        exits start anew where their heads are of another kind there.
    freeze_backbone: train the early heads only; weights and BatchNorm statistics of the backbone stay (PTEENet).
    self_labelled: the backbone's own answers stand for the labels (PTEENet); only with `freeze_backbone`.
    epochs: passes over the training images.
    batch_size: images per step and device.
    learning_rate: at the peak of the schedule.
    optimizer: adamw, adam, or sgd with Nesterov momentum.
    schedule: one-cycle, cosine, step (÷ 10 after 1/2 and 3/4 of the run), constant.
    weight_decay: of the optimiser.
    loss: weighted sum of terms, such as "v0+0.5*correctness", see `eefast.train.losses`.
    two_stage: so many epochs minimise "deep_supervision" (v0) before `loss`; EENets take 25, then v1.
    cost_weight: λ, the price of cost in all losses that know cost.
    shift: training images are moved at random by at most so many pixels; by default as in the papers: 4 for CIFAR-10.
    flip: training images are mirrored at random; by default as in the papers: not for MNIST, Fashion-MNIST, SVHN.
    held_out: training images that are not trained on, drawn by the seed; thresholds and accuracies come from them;
        by default 5,000, of small data sets a fifth.
    max_accuracy_drop: thresholds give the least cost with at most this drop below the final exit's held-out accuracy.
    max_cost: instead, thresholds give the most accuracy with at most this mean cost.
    seed: of weights, order, held-out images and the first exit tags.
    precision: 32-true, 16-mixed, bf16-mixed.
    device: auto, cpu, cuda, or what else Lightning calls an accelerator.
    devices, nodes, strategy: how many, and how they share the work, as Lightning's Trainer takes them; -1 = all.
    workers: processes that decode images; in-memory data sets need none.
    tensorboard: write logs for TensorBoard beside the CSV file.
    resume: go on from last.ckpt in `output`, with the arguments of that run; on the CPU to the same bits as without a
        break. A run that was broken off in its first epoch, which started.json in `output` tells, starts again.
    test: measure the test split once at the end.
    Raises `ValueError` for arguments and checkpoints that do not fit and `FileNotFoundError` for missing files, before
    anything is written; `RuntimeError` if the loss is no number or if images cannot be read any more;
    `system.files.WriteError` on a full disk and the like. What these, `KeyboardInterrupt` or a killed process break
    off, `resume` takes up.
    """
    # Where the files lie is no part of what made the network.
    arguments = {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in locals().items()
        if name not in ("data_root", "output", "weights")
    }
    arguments["weights"] = None if weights is None else Path(weights).name
    output = Path(output)
    for name, value, least in (
        ("epochs", epochs, 1), ("batch_size", batch_size, 2), ("held_out", 1 if held_out is None else held_out, 1),
        ("devices", devices, -1), ("nodes", nodes, 1),
    ):  # fmt: skip
        if value < least or value == 0:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop} must lie in 0 … 1")
    if not 0 <= two_stage < epochs:
        raise ValueError(f"two_stage={two_stage} must lie in 0 … epochs - 1 = {epochs - 1}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if bool(backbone) != bool(exits):
        raise ValueError(f"backbone={backbone!r}, exits={list(exits)}: give both, or none of them with net")
    criterion_loss = losses.parse(loss, cost_weight)
    checkpoint = _to_resume(output, arguments) if resume else None
    everything = datasets.dataset(dataset, data_root, "train", download, image_size)
    found = datasets.info(dataset, data_root, image_size)
    count = len(everything)  # type: ignore[arg-type]
    if held_out is None:
        held_out = default_held_out(count)
        if held_out < 5000:
            print(f"{held_out} of {count:,} training images, a fifth, are kept aside for thresholds", file=sys.stderr)
    if held_out < (least := least_images(max_accuracy_drop if max_cost is None else None)):
        print(
            f"held_out={held_out} images are few to choose thresholds on; {least} would tell more: one is "
            f"{1 / held_out:.4f} of their accuracy",
            file=sys.stderr,
        )
    if count - held_out < batch_size:
        raise ValueError(
            f"held_out={held_out} of {count} training images leaves no batch of batch_size={batch_size}; "
            "make one of them smaller"
        )
    test_images = datasets.dataset(dataset, data_root, "test", download, image_size) if test else None

    lightning.seed_everything(seed, workers=True, verbose=False)
    unchanged_images, held_out_images = split(everything, held_out, seed)
    changed = everything.for_training() if isinstance(everything, datasets.ImageFiles) else everything
    normalization = (list(found.mean), list(found.std))
    if backbone:
        body = backbones.backbone(backbone, found.num_classes, found.shape[0], weights)
        network = attach(body, exits, head=head, input_shape=found.shape, normalization=normalization)
    else:
        network = zoo.eenet(
            net, num_exits, placement, head, found.num_classes, found.shape, normalization=normalization
        )
        if weights is not None:
            anew = backbones.load_network(network, weights)
            if anew:
                print(f"weights={str(weights)!r} has other heads: exits {anew} start anew", file=sys.stderr)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.record = datasets.record(
        backbone or net, network.num_classes, found.shape, dataset, everything, held_out, seed
    )
    if max_cost is not None and not max_cost >= network.cost[0]:
        raise ValueError(f"max_cost={max_cost} is less than the first exit costs, {network.cost[0]:.4f}")
    module = EarlyExitModule(
        network,
        criterion_loss,
        first_epochs=two_stage,
        optimizer=optimizer,
        schedule=schedule,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        shift=found.shift if shift is None else shift,
        flip=found.flip if flip is None else flip,
        frozen=freeze_backbone,
        self_labelled=self_labelled,
        tag_batches=batches(unchanged_images, 500, workers) if criterion_loss.uses_tags else None,
        seed=seed,
    )
    train_batches = training_batches(Subset(changed, unchanged_images.indices), batch_size, seed, workers)
    held_out_batches = batches(held_out_images, 500, workers)
    lines, writer = _EpochLines(arguments, network.record.fingerprint), _Writer()
    kept: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
    best = _Checkpoint(output, BEST_FILE.removesuffix(".ckpt"), monitor="held_out_loss", **kept)
    last = _Checkpoint(output, LAST_FILE.removesuffix(".ckpt"), **kept)
    several = strategy == "auto" and (devices, nodes) != (1, 1)
    without_onednn = torch.backends.mkldnn.flags(enabled=False)
    logs = _Curves(output, LOGS_FOLDER)
    with (
        _quiet(),
        _explained(lines, writer, checkpoint),
        without_onednn if _too_narrow_for_onednn(network) else nullcontext(),
    ):
        trainer = lightning.Trainer(
            accelerator=device,
            devices=devices,
            num_nodes=nodes,
            # Some losses leave rows of confidence out, for which plain "ddp" would wait for ever.
            strategy="ddp_find_unused_parameters_true" if several else strategy,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=epochs,
            logger=[logs, *([TensorBoardLogger(output, LOGS_FOLDER, logs.version)] if tensorboard else [])],
            log_every_n_steps=1,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            plugins=[writer],
            callbacks=[
                EpochSeeds(seed, train_batches),
                lines,
                best,
                last,  # behind best, whose score it saves too
                *([RichProgressBar(console_kwargs={"stderr": True})] if sys.stderr.isatty() else []),
            ],
        )
        if trainer.is_global_zero:
            _start(output, arguments)
        trainer.fit(module, train_batches, held_out_batches, ckpt_path=checkpoint, weights_only=True)
    if best.best_model_score is None or not best.best_model_score.isfinite():
        raise RuntimeError(f"training diverged: the loss is no number; lower learning_rate={learning_rate}")

    saved = _read(Path(best.best_model_path))
    module.load_state_dict(saved["state_dict"])
    network.eval().to(trainer.strategy.root_device)
    outputs, labels = collect(network, held_out_batches)
    answers = outputs[-1].logits.argmax(dim=1)
    exit_accuracy = [(out.logits.argmax(dim=1) == labels).double().mean().item() for out in outputs]
    bound = {"max_cost": max_cost} if max_cost is not None else {"min_accuracy": exit_accuracy[-1] - max_accuracy_drop}
    chosen = {name: calibrate(outputs, labels, network.cost, name, **bound) for name in CRITERIA}
    network.thresholds.copy_(torch.tensor(chosen[network.criterion.name].thresholds))
    held_out_agreement = {name: _agreement(outputs, c) for name, c in chosen.items()}
    exit_agreement = [(out.logits.argmax(dim=1) == answers).double().mean().item() for out in outputs]
    tested, test_agreement = None, None
    if test_images is not None:
        outputs, labels = collect(network, batches(test_images, 500, workers))
        tested = {
            name: Calibration(name, c.thresholds, *outcome(outputs, labels, network.cost, name, c.thresholds))
            for name, c in chosen.items()
        }
        test_agreement = {name: _agreement(outputs, c) for name, c in chosen.items()}
    report = TrainReport(
        {**arguments, "held_out": held_out},
        saved["epoch"] + 1,
        float(best.best_model_score),
        exit_accuracy,
        exit_agreement,
        chosen,
        held_out_agreement,
        tested,
        test_agreement,
        lines.seconds,
    )
    if trainer.is_global_zero:
        with files.together():
            if backbone:
                backbones.save_attached(network, output, backbone, exits, head)
            else:
                network.save(output)
            _write(output / THRESHOLDS_FILE, {name: list(c.thresholds) for name, c in chosen.items()})
            _write(output / REPORT_FILE, asdict(report))
        (output / STARTED_FILE).unlink(missing_ok=True)
    return report


def _to_resume(output: Path, arguments: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, or None for a run that has none yet; `ValueError` if it is of another run."""
    path, started = output / LAST_FILE, output / STARTED_FILE
    of_this_run = False
    if started.is_file():
        try:
            _same(json.loads(started.read_text())["arguments"], arguments)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"resume=True: {started} is damaged; delete it, or start again without resume") from error
        of_this_run = True
    if path.exists():
        way_out = "delete it, or start again without --resume (resume=False)"
        try:
            found = _read(path)
        except ValueError as error:
            raise ValueError(f"resume=True: {error}; {_older(output / BEST_FILE, path, arguments)}{way_out}") from error
        if found["format"] > CHECKPOINT_FORMAT:
            raise ValueError(f"resume=True: {path} was written by a newer eefast; install that, or {way_out}")
        try:
            _same(found["arguments"], arguments)
        except ValueError:
            # What an earlier run left here, unless this one has written it.
            if not of_this_run:
                raise
        else:
            try:
                _read(output / BEST_FILE)
            except ValueError as error:
                raise ValueError(f"resume=True: {error}; start again without --resume (resume=False)") from error
            return path
    if not of_this_run:
        raise FileNotFoundError(f"resume=True: there is no {path}; name the folder of the broken run, or start anew")
    print(f"resume: no epoch of the run in {output} was finished, it starts again", file=sys.stderr, flush=True)
    return None


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint of `train`; no code in it is run. `ValueError` for anything else, saying what is wrong with it."""
    try:
        if not path.is_file():
            raise ValueError("it is no regular file" if path.exists() else "it is gone")
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        with ZipFile(path) as archive:
            # PyTorch does not look at the check sums, and never compresses.
            if any(part.compress_type != ZIP_STORED for part in archive.infolist()) or archive.testzip():
                raise ValueError("its check sums are wrong")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's text recommends to load it all the same.
        raise ValueError(f"{path} is no checkpoint of eefast train: it is damaged, or holds code") from error
    except Exception as error:  # reading raises whatever the bytes lead to
        raise ValueError(f"{path} is no intact checkpoint: {_first_line(error)}") from error
    parts = {"arguments": dict, "state_dict": dict, "seconds_per_epoch": list, "epoch": int}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"{path} is no checkpoint of eefast train")
    found.setdefault("format", 1)
    if not isinstance(found["format"], int):
        raise ValueError(f"{path} is no checkpoint of eefast train")
    return found


def _first_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


def _older(best: Path, path: Path, arguments: dict[str, Any]) -> str:
    """The way out that another checkpoint of the same run offers, if there is one."""
    try:
        found = _read(best)
        _same(found["arguments"], arguments)
    except ValueError:
        return ""
    return f"copy {best}, of epoch {found['epoch'] + 1}, over it, "


def _same(before: dict[str, Any], arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in _FREE_TO_CHANGE and before.get(name) != value:
            raise ValueError(
                f"{name}={value!r}, but the run to resume has {before.get(name)!r}; give the same or start anew"
            )


def _start(output: Path, arguments: dict[str, Any]) -> None:
    """Make the folder, found to be writable, and note what runs there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={str(output)!r} cannot be made: {error.strerror}; name another folder") from error
    files.check(output / LAST_FILE)
    files.remove_partial(output, *_WRITTEN)
    _write(output / STARTED_FILE, {"arguments": arguments})


@contextmanager
def _explained(lines: _EpochLines, writer: _Writer, checkpoint: Path | None) -> Iterator[None]:
    """Whatever breaks training off says in one line what remains of it."""

    def finished() -> int:
        return writer.epochs or (_read(checkpoint)["epoch"] + 1 if checkpoint else 0)

    def more() -> str:
        return f"--resume (resume=True) goes on after epoch {finished()}" if finished() else "no epoch was finished"

    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes a SystemExit of Ctrl-C, and another one of SIGTERM, which stays.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt(more()) from stop
        raise
    except DivergedError as error:
        raise DivergedError(f"{error}; {LAST_FILE} has epoch {finished()}" if finished() else str(error)) from error
    except files.WriteError as error:
        raise files.WriteError(f"{error}; {more()}") from error
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        if checkpoint is not None and not lines.started:
            raise ValueError(
                f"resume=True: {checkpoint} does not fit this run ({_first_line(error)}); "
                "start again without --resume (resume=False)"
            ) from error
        if lines.started and isinstance(error, (OSError, RuntimeError)):
            raise RuntimeError(f"{error}; {more()}") from error
        raise


def _agreement(outputs: Sequence[ExitOutput], chosen: Calibration) -> float:
    """Share of the images that are answered as by the final exit."""
    answers = torch.stack([out.logits.argmax(dim=1) for out in outputs])
    taken: Tensor = answers.gather(0, exits_taken(outputs, get(chosen.criterion), chosen.thresholds)[None])[0]
    return (taken == answers[-1]).double().mean().item()


class _EpochLines(Callback):
    """One line on stderr per epoch, so that a log without a terminal shows the progress too.

    Arguments, seconds and the fingerprint of the training images go into every checkpoint.
    """

    def __init__(self, arguments: dict[str, Any], images: str) -> None:
        self.arguments, self.images, self.seconds, self.started = arguments, images, list[float](), False

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["format"] = CHECKPOINT_FORMAT
        checkpoint["arguments"], checkpoint["seconds_per_epoch"] = self.arguments, list(self.seconds)
        checkpoint["images"] = self.images

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if checkpoint.get("images", self.images) != self.images:
            # Held-out images would be others, so some of them would have been trained on.
            raise ValueError("the training images have changed since")
        self.seconds = list(checkpoint["seconds_per_epoch"])

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.started = True

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        accuracy = " ".join(f"{100 * v:.2f}" for name, v in metrics.items() if name.startswith("accuracy_exit_"))
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: loss {metrics['loss']:.4f}, "
            f"held-out loss {metrics['held_out_loss']:.4f}, accuracy % by exit {accuracy}, {self.seconds[-1]:.0f} s",
            file=sys.stderr,
            flush=True,
        )


class _Checkpoint(ModelCheckpoint):
    """Knows its best epoch also where the folder was moved or is called otherwise since."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = Path(self.dirpath or "")

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else path

        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: here(state_dict[name]) for name in names if name in state_dict}
        models = {here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})


class _Writer(TorchCheckpointIO):
    """Writes checkpoints as `eefast.system.files` does; `epochs`: how many are in the last one."""

    epochs = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = BytesIO()
        torch.save(checkpoint, content)
        files.write(path, content.getbuffer())
        if Path(path).name == LAST_FILE:
            self.epochs = checkpoint["epoch"] + 1


class _CurvesWriter(ExperimentWriter):
    def save(self) -> None:
        """All rows anew: a row per epoch is little, and half of one would be no CSV file."""
        text = StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=sorted({name for row in self.metrics for name in row}))
        writer.writeheader()
        writer.writerows(self.metrics)
        files.write(self.metrics_file_path, text.getvalue())


class _Curves(CSVLogger):
    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _CurvesWriter(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """The report has them."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints about hardware and worker processes, which do not fit data in memory."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*in eval mode at the start of training.*",
            ):
                warnings.filterwarnings("ignore", message=message)
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module="lightning")
            yield
    finally:
        logger.setLevel(level)


def _too_narrow_for_onednn(network: nn.Module) -> bool:
    """Whether PyTorch's oneDNN must not train it: on AVX2 the backward pass of two channels never ends, or aborts.

    Seen with torch 2.14.1; with AVX-512 and from four channels on it works.
    """
    narrow = any(isinstance(m, nn.Conv2d) and m.out_channels < 4 for m in network.modules())
    return narrow and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def _write(path: Path, value: Any) -> None:
    files.write(path, json.dumps(value, indent=2) + "\n")
