"""The early-exit network: images → stages and heads → answers; its plain forward pass defines the right ones."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import criteria, rules
from .cost import StageCost, merged, path_costs, stage_costs
from .heads import ExitHead, kinds_of, shortest
from .preprocessing import Preprocessing
from .profiles import Profile, Profiles, limits_of_call
from .qdq import QdqStage
from .record import TrainingRecord
from .result import ExitOutput, ExitResult

log = logging.getLogger("eefast")
WRITING = 2e-4
"""Seconds after which changed thresholds are read once more: a thread that writes them may be halted between two."""


class EarlyExitNet(nn.Module):
    """n + 1 stages, each followed by a head; exits 0 … n-1 are early, exit n is final and always taken.

    stages: modules that map features to features, the first one images [N, C, H, W] to features.
    heads: modules that map a stage's features to an `ExitOutput`; the last one is the final exit's.
    input_shape: (C, H, W) for which the costs are counted; (C, L) of a network on rows [N, C, L], as Conv1d takes them.
    criterion: name of the exit rule, see `eefast.criteria`, or a `Rule` or `PythonRule` of `eefast.rules`.
    thresholds: n numbers; by default the criterion's default at every exit.
    normalization: (mean, std), one number per channel on the scale 0 … 1; with it the network also takes uint8 images.
    config: its "kind", "eenet", "attached", "quantized" or "qdq", and the arguments with which `eefast.load` builds it
        again; `eefast.zoo`, `eefast.attach` and `eefast.quantize` give it, `save` needs it.
    costs: of every stage and head; counted if None. A quantised network has those of the network that it was made of.

    Attributes that may be set:
    record: what it was trained on, which `save` writes too; None for what you trained on other images yourself.
    preprocessing: how image files become its pixels, see `eefast.Preprocessing`; None where that is not known.
    classes: names of the classes in the order of the labels; None where they have none.
    built_from: what it was made of, for the error of `save` where there is no config.
    profiles: an `eefast.Profiles`, or a mapping that becomes one: rows of thresholds and last exits by name, of which a
        call names one, or one per image; saved with the network. `None` removes them. Calls take the table of one
        moment. Raises `ValueError` where they do not fit the network.

    Buffers, always float32 whatever the parameters' dtype:
    thresholds: [n], may change at any time, also from another thread: a batch is answered by those of one moment.
        Several change together by one assignment of a new tensor or by one in-place operation, such as `copy_`.
    rule: [n + 1, 9], see `eefast.rules`, where the criterion carries the answer so far, else there is none; may change
        at any time, as thresholds do.
    cost, path_cost: [n + 1], see `eefast.cost.path_costs`.

    In training mode `net(x)` returns all exits, a list of n + 1 `ExitOutput`; in eval mode an `ExitResult`: every
    sample answered by the first exit whose criterion it meets, as if it had been run alone.
    """

    thresholds: Tensor
    cost: Tensor
    path_cost: Tensor
    rule: Tensor
    record: TrainingRecord | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    built_from: str = "modules"
    rows_as_maps = False
    """Whether `prepare` makes maps [N, C, 1, L] of rows [N, C, L]; of networks that planning makes."""
    _limits: tuple[list[float], Tensor] | None = None
    _checked: tuple[Tensor, int] | None = None
    _rule: tuple[Tensor, object, Tensor] | None = None
    _profiles = Profiles()
    _warned = _warned_of_size = False

    def __init__(
        self,
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        *,
        input_shape: Sequence[int],
        criterion: str | rules.Rule | rules.PythonRule = "learned",
        thresholds: Sequence[float] | None = None,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        config: Mapping[str, Any] | None = None,
        costs: Sequence[StageCost] | None = None,
    ) -> None:
        super().__init__()
        if len(stages) != len(heads) or not stages:
            raise ValueError(f"{len(stages)} stages and {len(heads)} heads: every stage needs exactly one head")
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        self.input_shape = tuple(input_shape)
        if isinstance(criterion, rules.PythonRule):
            self.criterion = criterion.criterion
        else:
            self.criterion = criteria.get(criterion.name if isinstance(criterion, rules.Rule) else criterion)
        rule = criterion if isinstance(criterion, rules.Rule) else None
        if self.criterion.carries and not self.criterion.step and rule is None:
            rule = rules.named(self.criterion.name, len(stages) - 1)
        self.config = dict(config) if config is not None else None
        self._given_costs = costs
        costs = stage_costs(self.stages, self.heads, self.input_shape) if costs is None else tuple(costs)
        self.stage_costs = costs
        if len({c.num_classes for c in costs}) != 1:
            raise ValueError(
                f"heads answer with {[c.num_classes for c in costs]} classes; all must have the same number"
            )
        self.num_classes, self.num_exits = costs[-1].num_classes, len(stages) - 1
        cost, path_cost = path_costs(costs)
        values = [self.criterion.default_threshold] * self.num_exits if thresholds is None else thresholds
        weight = next(self.parameters(), cost)
        # A network that is built without memory still has its costs.
        device = torch.device("cpu") if weight.is_meta else weight.device
        # What is made in inference mode nothing outside of it may write to.
        with torch.inference_mode(False):
            given = torch.as_tensor(values, dtype=torch.float32, device=device)
            self.register_buffer("thresholds", given.detach().clone())
            if rule is not None:
                self.register_buffer("rule", rules.read(rule.name, rule.table(), self.num_exits).table().to(device))
            self.register_buffer("cost", cost.to(device, copy=True), persistent=False)
            self.register_buffer("path_cost", path_cost.to(device, copy=True), persistent=False)
        if normalization is not None and {len(part) for part in normalization} != {self.input_shape[0]}:
            raise ValueError(f"normalization={normalization} needs {self.input_shape[0]} means and as many deviations")
        self.normalization = normalization
        self._pixels, self._scale = PixelCheck(), PixelScale()
        self._built = self.layers() if config is not None else ""
        self.check_thresholds()

    @property
    def name(self) -> str:
        """Of the network of `eefast.zoo`, or of the backbone, with its library; "network" if it has none."""
        config = self.config or {}
        return str(config.get("name") or config.get("backbone") or "network")

    @property
    def profiles(self) -> Profiles:
        return self._profiles

    @profiles.setter
    def profiles(self, profiles: Mapping[str, Any] | None) -> None:
        made = profiles if isinstance(profiles, Profiles) else Profiles(profiles)
        made.check_fit(self.num_exits, self.criterion.name)
        self._profiles = made.of(self.criterion.name)

    def forward(
        self,
        x: Tensor,
        profile: str | Tensor | None = None,
        thresholds: Tensor | Sequence[float] | None = None,
        exit_limit: int | Tensor | Sequence[int] | None = None,
    ) -> list[ExitOutput] | ExitResult:
        """Images [N, C, H, W] → their answers; in training mode all exits, and `x` is the only argument.

        profile: the name of one of `profiles`, or [N] int32 or int64 on the images' device, the place of one for each
            image; None: the network's thresholds.
        thresholds: instead of a profile, n numbers for all images, or [N, n], those of each; none of them NaN.
        exit_limit: an exit 0 … n, or [N], one for each image, at which an image exits at the latest, whatever its
            confidence, also where that is NaN.
        Raises `TypeError` or `ValueError` that names the argument. What is on a GPU is not looked at by the host: a
        kernel stops at what is out of range.
        """
        x = self.prepare(x)
        asked = not (profile is None and thresholds is None and exit_limit is None)
        if self.training:
            if asked:
                raise ValueError("profile, thresholds and exit_limit are for eval mode; call .eval() first")
            return self.all_exits(x)
        if not asked:
            return self.first_exits(x)
        criterion, current = self._criterion_and_limits()
        limits, _ = limits_of_call(
            self.profiles, self.num_exits, criterion.name, current, x.device, len(x), profile, thresholds, exit_limit
        )
        return self.first_exits(x, limits, criterion)

    def all_exits(self, x: Tensor) -> list[ExitOutput]:
        """What every head returns for all of the prepared images [N, C, H, W]."""
        outputs = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            outputs.append(head(x))
        return outputs

    def _criterion_and_limits(self) -> tuple[criteria.Criterion, tuple[Tensor, object]]:
        """Of one moment: another thread may change both."""
        while True:
            criterion, limits = self.criterion, self.limits()
            if criterion is self.criterion:
                return criterion, limits

    def first_exits(
        self,
        x: Tensor,
        limits: Tensor | None = None,
        criterion: criteria.Criterion | None = None,
        rule: Tensor | criteria.Step | None = None,
    ) -> ExitResult:
        """Stage by stage: samples that exit are written to their rows, the others go on; a rule writes theirs, too.

        limits: [n] float32 thresholds of `criterion`, or [n, N], see `eefast.profiles`; by default both are the current
            ones of the network. rule: as of `current_rule`, by default the current one.
        """
        check_not_traced()
        if limits is None or criterion is None:
            criterion, (limits, _) = self._criterion_and_limits()
        if criterion.carries and rule is None:
            rule = self.current_rule()
        n = len(x)
        logits = torch.empty(n, self.num_classes, dtype=torch.float32, device=x.device)
        confidence = torch.empty(n, dtype=torch.float32, device=x.device)
        exit_index = torch.empty(n, dtype=torch.int64, device=x.device)
        position = torch.arange(n, device=x.device)
        for i, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if len(position) == 0:
                break
            x = stage(x)
            out = head(x)
            self.check_classes(i, out.logits.shape[1])
            if rule is None:
                answer, value = out.logits, criterion.confidence(out.logits, out.confidence_logit)
            else:
                before = logits[position], confidence[position]
                answer, value = criteria.carry_on(rule, i, out.logits, out.confidence_logit, *before)
                logits[position], confidence[position] = answer, value
            if i < self.num_exits:
                limit = limits[i] if limits.dim() == 1 else limits[i, position]
                leaves = criteria.exits_by(criterion, value, limit)
            else:
                leaves = torch.ones_like(value, dtype=torch.bool)
            left = position[leaves]
            logits[left], confidence[left], exit_index[left] = answer[leaves].float(), value[leaves], i
            x, position = x[~leaves], position[~leaves]
        return ExitResult(logits, exit_index, confidence, self.cost[exit_index])

    def check_classes(self, exit_index: int, found: int) -> None:
        """`ValueError` where a head was given another number of classes than the network was built for."""
        if found != self.num_classes:
            raise ValueError(
                f"the head of exit {exit_index} answers with {found} classes, the network was built for "
                f"{self.num_classes}; give all heads the same number and rebuild the network: "
                "net.with_criterion(net.criterion.name)"
            )

    def plain(self, exit_index: int | None = None) -> nn.Sequential:
        """The same network without early exits, sharing its modules: images → logits [N, K] of the final classifier.

        exit_index: of an exit at which it ends instead of the final one.
        Raises `ValueError` for a head there that is no `eefast.heads.ExitHead`, and where there is no such exit.
        """
        last = self.num_exits if exit_index is None else exit_index
        if not 0 <= last <= self.num_exits:
            raise ValueError(f"exit_index={exit_index} must be one of 0 … {self.num_exits}")
        head, which = self.heads[last], "final head" if last == self.num_exits else f"head of exit {last}"
        if not isinstance(head, ExitHead):
            raise ValueError(f"the {which} is a {type(head).__name__}, not an eefast.heads.ExitHead with a classifier")
        before = [m for m in (head.convs, head.norm) if not _does_nothing(m)]
        made = nn.Sequential(*self.stages[: last + 1], *before, head.pool, head.classifier)
        made.training = self.training
        return made

    @property
    def exit_rule(self) -> str | rules.Rule | rules.PythonRule:
        """What `with_criterion` takes to make a network of this exit rule."""
        name, rule = self.criterion.name, self.current_rule()
        if isinstance(rule, Tensor):
            return rules.read(name, rule.cpu(), self.num_exits)
        return name if rule is None else rules.PythonRule(name, rule, self.criterion.default_threshold)

    def with_criterion(
        self, criterion: str | rules.Rule | rules.PythonRule, thresholds: Sequence[float] | None = None
    ) -> EarlyExitNet:
        """The same network, sharing its modules, under another exit rule with its thresholds.

        criterion: a name, or a `Rule` or `PythonRule` of `eefast.rules`; the network's name keeps its rule.
        """
        if criterion == self.criterion.name:
            criterion = self.exit_rule
        net = EarlyExitNet(
            list(self.stages),
            list(self.heads),
            input_shape=self.input_shape,
            criterion=criterion,
            thresholds=thresholds,
            normalization=self.normalization,
            config=self.config,
            costs=self._given_costs,
        )
        for made in (net, net.stages, net.heads):
            made.training = self.training
        net.built_from, net.record, net._built = self.built_from, self.record, self._built
        net.preprocessing, net.classes = self.preprocessing, self.classes
        return net

    def without_exits(self, exits: Sequence[int]) -> EarlyExitNet:
        """The same network, sharing its modules, without some of its early exits, whose heads then cost nothing.

        Stages between remaining exits are joined; thresholds and profiles keep what belongs to these, and a last exit
        that is gone becomes the next one. A network of `eefast.zoo` can be saved. Raises `ValueError` for exits that
        there are not, and for quantised networks, which `eefast.quantize` makes of a network without the exits.
        """
        gone = sorted(set(exits))
        if len(gone) != len(exits) or not set(gone) <= set(range(self.num_exits)):
            raise ValueError(f"exits={list(exits)} must be different early exits, of 0 … {self.num_exits - 1}")
        if self.criterion.carries:
            raise ValueError(
                f"criterion={self.criterion.name!r} reads the exits before; leave exits out of "
                'net.with_criterion("max_probability") and choose its rule again'
            )
        if (self.config or {}).get("kind") == "quantized" or any(isinstance(stage, QdqStage) for stage in self.stages):
            raise ValueError("a quantised network keeps its exits; take them from the float network and quantise that")
        kept = [i for i in range(self.num_exits + 1) if i not in gone]
        stages: list[nn.Module] = []
        for first, last in zip([0, *(i + 1 for i in kept)], kept, strict=False):
            between = list(self.stages[first : last + 1])
            layers = [layer for stage in between for layer in _opened(stage)]
            stages.append(between[0] if len(between) == 1 else nn.Sequential(*layers))
        net = EarlyExitNet(
            stages,
            [self.heads[i] for i in kept],
            input_shape=self.input_shape,
            criterion=self.criterion.name,
            thresholds=[self.thresholds.tolist()[i] for i in kept[:-1]],
            normalization=self.normalization,
            config=self._config_of(kept),
            costs=merged(self.stage_costs, gone),
        )
        theirs = set(self.modules())  # which may be frozen
        for made in net.modules():
            if made not in theirs:
                made.training = self.training
        net.built_from = f"{self.name} without its exits {gone}" if net.config is None else self.built_from
        net.record = self.record
        net.preprocessing, net.classes = self.preprocessing, self.classes
        net.profiles = {
            name: Profile(
                tuple(p.thresholds[i] for i in kept[:-1]),
                None if p.last_exit is None else sum(i < p.last_exit for i in kept),
            )
            for name, p in self.profiles.items()
        }
        return net

    def _config_of(self, kept: Sequence[int]) -> dict[str, Any] | None:
        """The config of the network with these exits only, where it can say so."""
        config = None if self.changed else self.config
        if len(kept) == self.num_exits + 1:
            return config
        if config is None or config.get("kind") != "eenet" or "filters" in config or len(kept) == 1:
            return None
        if "carry" in config and self.num_exits - 1 not in kept:
            return None
        kinds = kinds_of(config["head"], self.num_exits)
        return {
            **config,
            "num_exits": len(kept) - 1,
            "placement": [config["placement"][i] for i in kept[:-1]],
            "head": shortest([kinds[i] for i in kept[:-1]]),
        }

    def prepare(self, x: Tensor, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> Tensor:
        """Check images before any work starts; uint8 images are scaled to 0 … 1 and normalised.

        Arguments and errors as `check_images`.
        """
        self.check_images(x, dtype, weight)
        if self.rows_as_maps:
            x = x.unsqueeze(2)
        if x.dtype != torch.uint8 or self.normalization is None:
            if self.normalization is not None and self.looks_at_pixels(x):
                self._pixels.look(x, self.normalization)
            return x
        mean, std = (part.view(1, -1, *[1] * (x.dim() - 2)) for part in self._scale.of(self.normalization, x.device))
        weight = next(self.parameters()) if weight is None else weight
        return ((x.float() / 255 - mean) / std).to(weight.dtype)

    def looks_at_pixels(self, x: Tensor) -> bool:
        """Whether `prepare` compares these floats with the normalization."""
        return self._pixels.left > 0 and self.normalization is not None and not x.is_cuda

    def check_images(self, x: Tensor, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> None:
        """Check images [N, C, H, W] before any work starts.

        dtype: accepted as well as the parameters'. weight: one of the parameters, since looking for it takes time.
        Raises `TypeError` or `ValueError` naming the rank, channels, size, dtype or device that does not fit.
        """
        if not isinstance(x, Tensor):
            if isinstance(x, fx.Proxy):
                raise RuntimeError(TRACED)
            raise TypeError(f"x is a {type(x).__name__}; give a tensor of images [N, C, H, W]")
        channels, *size = self.input_shape
        if self.rows_as_maps:
            size = size[1:]
        rank = len(size) + 2
        if x.dim() != rank or x.shape[1] != channels:
            single = x.dim() == rank - 1 and x.shape[0] == channels
            advice = "; x[None] makes a batch of one image" if single else ""
            sides = "L" if len(size) == 1 else "H, W"
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [N, {channels}, {sides}]{advice}")
        if list(x.shape[2:]) != size:
            self._check_size(tuple(x.shape[2:]), tuple(size))
        weight = next(self.parameters()) if weight is None else weight
        if x.device != weight.device:
            raise ValueError(f"x is on {x.device}, the network on {weight.device}; move one of them with .to(device)")
        if x.dtype == torch.uint8:
            if self.normalization is None:
                raise ValueError("x is uint8, but this network has no normalization; build it with one, (mean, std)")
        elif not x.is_floating_point():
            uint8 = "pixels 0 … 255 as uint8, by x.to(torch.uint8)" if self.normalization is not None else ""
            floats = f"normalised images as {weight.dtype}"
            raise TypeError(f"x is {x.dtype}; give {' or '.join(filter(None, (uint8, floats)))}")
        elif x.dtype not in (weight.dtype, dtype) and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x is {x.dtype}, the network {weight.dtype}; convert one of them with .to(dtype)")

    def _check_size(self, found: tuple[int, ...], made_for: tuple[int, ...]) -> None:
        """`ValueError` for another size than a network with plain heads takes; else a warning, once."""
        if any(getattr(head, "kind", None) == "plain" for head in self.heads):
            raise ValueError(f"x has images of {found}; a network with plain heads takes {made_for} only")
        if not self._warned_of_size and not torch.compiler.is_compiling():
            self._warned_of_size = True
            log.warning(
                "images of %s, the network was made for %s: it answers, but accuracy, cost and thresholds are those of "
                "its own size; resize them unless you mean it", found, made_for,
            )  # fmt: skip

    def limits(self) -> tuple[Tensor, object]:
        """The thresholds of this moment [n] float32, checked, and an object that stays the same for as long as they do.

        Later changes do not reach them. On the CPU half of an in-place change is read only where the thread that writes
        is halted between two numbers for longer than WRITING; a new tensor is never read half. On a GPU they are copied
        in the order of the current stream, and looked at only where they have changed: that waits for all work before.
        Raises `ValueError` as `check_thresholds`.
        """
        while True:
            t = self._buffers["thresholds"]  # as an attribute it takes as long as half of all this
            assert t is not None
            if not t.is_cpu:
                values = t.clone()
                version = 0 if t.is_inference() else t._version
                known = self._checked
                if known is None or known[0] is not t or known[1] != version:
                    self.check_thresholds(values)
                    self._check_origin(values.tolist())
                    known = self._checked = t, version
                return values, known
            written = None if t.is_inference() else t._version
            numbers, limits = t.tolist(), self._limits
            if limits is None or limits[0] != numbers or t.dtype != torch.float32:
                time.sleep(WRITING)
                self.check_thresholds(t)
                self._check_origin(numbers)
                # Made in inference mode it could not be used outside of it.
                with torch.inference_mode(False):
                    limits = numbers, torch.tensor(numbers, dtype=torch.float32, device="cpu")
            # What another thread was writing meanwhile reads differently the second time, or has another version.
            if t.tolist() == numbers and (written is None or t._version == written):
                if limits is not self._limits:
                    self._limits = limits
                return limits[1], limits[1]

    def current_rule(self) -> Tensor | criteria.Step | None:
        """The rule of this moment [n + 1, 9] float32, checked; the same tensor for as long as it does not change.

        None where the criterion carries nothing; of a rule in Python its step. Later changes do not reach it; on a GPU
        see `limits`.
        Raises `ValueError` as `eefast.rules.read`, and where the criterion carries but there is no rule.
        """
        if not self.criterion.carries or self.criterion.step:
            return self.criterion.step
        while True:
            t = self._buffers.get("rule")
            if t is None:
                raise ValueError(f"criterion={self.criterion.name!r} has no rule; use net.with_criterion(rule)")
            known, on_cpu = self._rule, t.device.type == "cpu"
            version = None if t.is_inference() else t._version
            state: object = t.tolist() if on_cpu else version
            if known is not None and known[1] == state and (known[0] is t or (on_cpu and not known[2].is_cuda)):
                return known[2]
            if on_cpu:
                time.sleep(WRITING)
            rules.read(self.criterion.name, t.cpu(), self.num_exits)
            with torch.inference_mode(False):
                copied = t.detach().clone()
            # What another thread was writing meanwhile reads differently the second time, or has another version.
            same = not on_cpu or t.tolist() == copied.tolist() == state
            if same and (version is None or t._version == version):
                self._rule = t, state, copied
                return copied

    def check_thresholds(self, t: Tensor | None = None) -> None:
        """`ValueError` unless `thresholds`, or another tensor, holds n float32 numbers, none of them NaN."""
        t = self.thresholds if t is None else t
        if t.shape != (self.num_exits,) or t.dtype != torch.float32 or any(map(isnan, t.tolist())):
            raise ValueError(
                f"thresholds={t.tolist()}, {t.numel()} of {t.dtype}, must be {self.num_exits} float32 numbers, none of "
                "them NaN"
            )

    def _check_origin(self, numbers: list[float]) -> None:
        """Warn, once, where a quantised network answers with the thresholds of the float network it was made of."""
        copied = (self.config or {}).get("float_thresholds")
        if self._warned or not numbers or not copied or copied.get(self.criterion.name) != numbers:
            return
        self._warned = True
        log.warning(
            "the thresholds are those of the float network: the quantised one has slightly other confidences, so that "
            "some images take other exits; choose them again on held-out images, by labels= of eefast.quantize or by "
            "`eefast calibrate`, or set net.thresholds"
        )

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and, with a `record`, `training.json`; `eefast.load` reads them.

        All are replaced together, see `system.files`, so that an interrupted save leaves the old ones readable; the
        record of an earlier network in the folder is removed.
        Raises `ValueError` as `check_saving`, `eefast.system.files.WriteError` for a full disk and the like.
        """
        from .checkpoint.folder import save

        save(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        evaluation: Any = None,
        evaluated_on: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        message: str = "Upload a network of eefast",
    ) -> str:
        """Write what `save` writes, and a model card, to a repository of the Hugging Face Hub; its commit's address.

        repo_id: "owner/name"; made where there is none. evaluation: an `eefast.thresholds.evaluation.Evaluation` of
            answers under these thresholds, for the card; evaluated_on: of which images, such as "MNIST (test)".
        revision: a branch, made where there is none. token: by default that of `hf auth login`.
        Raises `ValueError` as `check_saving`, `ModuleNotFoundError` without huggingface_hub, and what that raises.
        """
        from .hub.repository import push

        return push(
            self,
            repo_id,
            evaluation=evaluation,
            evaluated_on=evaluated_on,
            private=private,
            revision=revision,
            token=token,
            message=message,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
    ) -> EarlyExitNet:
        """The network in a folder, as `eefast.load`, or in a repository "owner/name" of the Hub, which is downloaded.

        Only JSON and safetensors are fetched, and no code of the repository is run. revision: a branch, tag or commit.
        cache_dir: where downloads are kept, by default huggingface_hub's.
        Raises `ValueError` where there is no such folder or repository, `eefast.checkpoint.loading.CheckpointError`
        for files that are no network, `ModuleNotFoundError` without huggingface_hub, and what that raises.
        """
        from .hub.repository import pull

        return pull(source, revision=revision, cache_dir=cache_dir, token=token)

    def check_saving(self) -> None:
        """`ValueError` unless `eefast.load` could build this network again."""
        if self.criterion.step:
            raise ValueError(
                f"criterion={self.criterion.name!r} is a rule in Python, which no folder holds; save "
                'net.with_criterion("max_probability"), and give it the rule after eefast.load'
            )
        if self.config is None:
            raise ValueError(
                f"this network was built from {self.built_from}, so that eefast.load could not build it again; make it "
                'by eefast.zoo.eenet or by eefast.attach(eefast.surgery.backbone("torchvision:NAME", num_classes), …) '
                "and give it these weights, or save its state_dict() by torch.save and build it yourself"
            )
        if self.changed:
            raise ValueError(
                f"layers were changed since {self.name} was built, and eefast.load would build those it had; save its "
                "state_dict() by torch.save and build it yourself"
            )

    def layers(self) -> str:
        """16 hexadecimal digits: modules and names of weights, others where a layer is replaced or set otherwise.

        What changes no answer is left out: operations in place, numbers that matter in training alone.
        """
        parts = (self.stages, self.heads)
        names = [f"{p} {name}" for p, m in enumerate(parts) for name, _ in (*m.named_parameters(), *m.named_buffers())]
        text = re.sub(r"(Sync)?BatchNorm(1d|2d|3d)?\(", "BatchNorm(", f"{self.stages}{self.heads}")
        text = re.sub(r"(, )?(inplace|momentum|p|drop_prob)=[\w.+-]+", "", text)
        return hashlib.sha256(f"{text}{sorted(names)}".encode()).hexdigest()[:16]

    @property
    def changed(self) -> bool:
        """Whether layers are others than when it was built, so that `config` does not describe them."""
        return self.__dict__.get("_built", "") not in ("", self.layers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EarlyExitNet:
        # Thresholds decide exits exactly, so .half() must not round them; only their device follows.
        exact = {"thresholds": self.thresholds, "cost": self.cost, "path_cost": self.path_cost}
        if "rule" in self._buffers:
            exact["rule"] = self.rule
        super()._apply(fn, recurse)
        for name, value in exact.items():
            self._buffers[name] = value.to(getattr(self, name).device)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not is_property(self, name):
                raise
        return getattr(type(self), name).__get__(self)

    def __prepare_scriptable__(self) -> EarlyExitNet:
        raise RuntimeError(TRACED)

    def extra_repr(self) -> str:
        thresholds = ", ".join(f"{t:.4g}" for t in self.thresholds.tolist())
        return f"criterion={self.criterion.name!r}, thresholds=[{thresholds}], input_shape={self.input_shape}"


MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
"""The mode of what it traces with."""

TRACED = (
    "torch.jit, torch.export, ONNX and torch.fx would keep the exits that one example takes, so a network that answers "
    "image by image cannot be traced; take net.plain(), the network without early exits, or a module around "
    "net.all_exits, the output of every exit; to run it faster, use torch.compile"
)


def is_property(module: nn.Module, name: str) -> bool:
    """Whether Python calls `__getattr__` because a property raised `AttributeError`; calling it again says why."""
    return isinstance(getattr(type(module), name, None), property)


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Sequential) and not len(module))


def check_not_traced() -> None:
    """`RuntimeError` where the calling code is being traced, other than by torch.compile."""
    if torch.compiler.is_exporting() or (_is_traced() and not torch.compiler.is_compiling()):
        raise RuntimeError(TRACED)


def _is_traced() -> bool:
    return torch._C._is_tracing() or torch._C._get_dispatch_mode(MAKE_FX) is not None


class PixelScale:
    """Keeps mean and deviation on the device where images are, since copying numbers there waits for all its work."""

    def __init__(self) -> None:
        self._known: tuple[Any, Tensor, Tensor] | None = None

    def of(self, normalization: tuple[Sequence[float], Sequence[float]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the channels, [1, C, 1, 1] float32."""
        wanted, known = (*map(tuple, normalization), device), self._known
        if known is not None and known[0] == wanted and not torch.compiler.is_compiling():
            return known[1], known[2]
        # Made in inference mode they could not be used outside of it.
        with torch.inference_mode(False):
            mean, std = (
                torch.tensor(part, dtype=torch.float32, device=device).view(1, -1, 1, 1) for part in normalization
            )
        # Not where the calling code is being traced.
        if type(mean) is Tensor and not torch.compiler.is_compiling():
            self._known = wanted, mean, std
        return mean, std

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": None}


class PixelCheck:
    """Checks the first float images on the CPU; warns once if they are on another scale than the normalization's."""

    def __init__(self) -> None:
        self.left = 3

    def look(self, x: Tensor, normalization: tuple[Sequence[float], Sequence[float]]) -> None:
        """x: floats [N, C, H, W]; normalization: (mean, std), of which black and white pixels follow."""
        if torch.compiler.is_compiling() or not x.numel() or x.is_meta or not all(normalization[1]):
            return
        self.left -= 1
        low, high = (float(v) for v in torch.aminmax(x.detach()[:4].float()))
        ends = [(v - m) / s for m, s in zip(*normalization, strict=True) for v in (0, 1)]
        black, white = min(ends), max(ends)
        far = 4 * (white - black)
        outside = isfinite(low) and isfinite(high) and (low < black - far or high > white + far)
        # A constant image says nothing. Where the normalization keeps nearly 0 … 1, images in 0 … 1 are right.
        unscaled = 0 <= low < high - 0.5 and high <= 1 and black < -0.2
        if outside or unscaled:
            self.left = 0
            log.warning(
                "images reach from %.4g to %.4g, but normalised ones from %.4g to %.4g; give pixels 0 … 255 as uint8, "
                "or floats (pixel / 255 - mean) / std with this network's normalization",
                low, high, black, white,
            )  # fmt: skip


def _opened(stage: nn.Module) -> list[nn.Module]:
    """Layers that compute what it does one after another."""
    if type(stage) is nn.Sequential and not (stage._forward_hooks or stage._forward_pre_hooks):
        return list(stage)
    return [stage]
