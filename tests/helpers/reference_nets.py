"""Networks with the names, attributes and quirks of those in eksuas/eenets.pytorch, to write checkpoints from."""

import copy
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from networks import lived_in
from torch import nn

# head: the repository's last version. forked: exits in a ModuleList. pteenet: the fork spokV/PTEENET.
# fully_connected, fc: older versions, without a confidence at the final exit.
VERSIONS = ("head", "forked", "pteenet", "fully_connected", "fc")
REPETITIONS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

MODULE, STATE = "module", "state_dict"
"""What of a network a file holds."""


class BasicBlock(nn.Module):
    __module__ = "eenet"
    expansion = 1

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut(inplanes, planes, stride)
        self.stride = stride

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (self.downsample(x) if self.downsample else x))


class Bottleneck(nn.Module):
    __module__ = "eenet"
    expansion = 4

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inplanes, planes * 4, stride)
        self.stride = stride

    def forward(self, x):
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


def shortcut(inplanes, planes, stride):
    if stride == 1 and inplanes == planes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def linear(features, outputs, activation):
    return nn.Sequential(nn.Linear(features, outputs), activation)


class ExitBlock(nn.Module):
    __module__ = "eenet"

    def __init__(self, planes, num_classes, input_shape, exit_type, version):
        super().__init__()
        layers, features = [], planes
        if exit_type == "bnpool":
            norm = nn.BatchNorm2d(planes)
            layers.append(nn.Sequential(norm, nn.ReLU()) if version == "pteenet" else norm)
        elif "conv" in exit_type:
            parts = []
            for _ in range(int(exit_type[4:] or 1)):
                parts += [nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
            layers.append(nn.Sequential(*parts))
        if exit_type == "plain":
            features = planes * input_shape[1] * input_shape[2]
        else:
            layers.append(nn.AdaptiveAvgPool2d(1))
        if version in ("fully_connected", "fc"):
            (self.pool,) = layers
        else:
            self.layers = layers if version == "head" else nn.ModuleList(layers)
        self.confidence = linear(features, 1, nn.Sigmoid())
        self.classifier = linear(features, num_classes, nn.Softmax(dim=1))

    def forward(self, x):
        for layer in [self.pool] if hasattr(self, "pool") else self.layers:
            x = layer(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x), self.confidence(x)


class EENet(nn.Module):
    __module__ = "eenet"

    def __init__(
        self,
        depth,
        placement,
        exit_type="pool",
        num_classes=10,
        input_shape=(3, 32, 32),
        loss_func="v2",
        version="head",
    ):
        super().__init__()
        small = depth not in REPETITIONS
        self.inplanes = 16 if small else 64
        repetitions = ((depth - 2) // 6,) * 3 if small else REPETITIONS[depth]
        block = Bottleneck if depth in (50, 101, 152) else BasicBlock
        self.stages, self.exits, layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        conv = nn.Conv2d(input_shape[0], self.inplanes, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        pool = [] if small else [nn.MaxPool2d(3, 2, 1)]
        layers.append(nn.Sequential(conv, nn.BatchNorm2d(self.inplanes), nn.ReLU(inplace=True), *pool))
        blocks, planes = 0, self.inplanes
        for group, repetition in enumerate(repetitions):
            for i in range(repetition):
                layers.append(block(self.inplanes, planes, 2 if group and i == 0 else 1))
                self.inplanes, blocks = planes * block.expansion, blocks + 1
                if blocks in placement:
                    self.stages.append(nn.Sequential(*layers))
                    self.exits.append(ExitBlock(self.inplanes, num_classes, input_shape, exit_type, version))
                    layers = nn.ModuleList()
            planes *= 2
        layers.append(nn.AvgPool2d(8) if version == "fc" and small else nn.AdaptiveAvgPool2d(1))
        self.stages.append(nn.Sequential(*layers))
        if version in ("fully_connected", "fc"):
            setattr(self, version, nn.Linear(self.inplanes, num_classes))
        else:
            self.classifier = linear(self.inplanes, num_classes, nn.Softmax(dim=1))
            self.confidence = linear(self.inplanes, 1, nn.Sigmoid())
            self.total_layers, self.distribution, self.exit_type = depth, "fine", exit_type
            self.exit_threshold = 1.0 / len(placement) if loss_func == "v3" else 0.5
        if version != "fc":
            self.layers = layers
            self.num_ee, self.num_classes, self.input_shape = len(placement), num_classes, input_shape
            self.threshold = [np.float64(4.1e7) * (1 - 0.95 ** (i + 1)) for i in range(len(placement))]
        self.softmax = nn.Softmax(dim=1)
        # The FLOP counter works with numpy, and every training step appends a tensor to the costs.
        self.cost = [np.float64(0.1 * (i + 1)) for i in range(len(placement))] + [torch.tensor(1.0)] * 3
        self.complexity = [(np.int64(1000 * (i + 1)), 10) for i in range(len(placement) + 1)]
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.Conv2d)):
                module.__flops__, module.__mask__ = np.int64(4096), None

    def forward(self, x):
        for i, exit_block in enumerate(self.exits):
            x = self.stages[i](x)
            prediction, confidence = exit_block(x)
            if confidence.item() > getattr(self, "exit_threshold", 0.5):
                return prediction, i, self.cost[i]
        x = self.stages[-1](x).view(x.size(0), -1)
        for name in ("fc", "fully_connected"):
            if hasattr(self, name):
                return self.softmax(getattr(self, name)(x)), len(self.exits), 1.0
        return self.classifier(x), len(self.exits), 1.0

    def set_multiple_gpus(self):
        for modules in (self.stages, self.exits):
            for i, module in enumerate(modules):
                modules[i] = nn.DataParallel(module)


class CustomEENet(nn.Module):
    __module__ = "custom_eenet"

    def __init__(self, input_shape, num_classes, filters):
        super().__init__()
        f = self.filter = filters
        self.initblock = nn.Sequential(nn.Conv2d(input_shape[0], f, 3, 1, 1), nn.BatchNorm2d(f), nn.ReLU(inplace=True))
        self.basicblock1 = nn.Sequential(
            nn.Conv2d(f, f, 3, 1, 1), nn.BatchNorm2d(f), nn.ReLU(inplace=True), nn.Conv2d(f, f, 3, 1, 1)
        )
        self.basicblock2, self.basicblock3 = self.widening(f), self.widening(f * 2)
        self.finalblock = nn.Sequential(nn.BatchNorm2d(f * 4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
        self.conv2d_6, self.conv2d_9 = nn.Conv2d(f, f * 2, 1, 2), nn.Conv2d(f * 2, f * 4, 1, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.exit0_classifier, self.exit1_classifier, self.classifier = (
            linear(f * k, num_classes, nn.Softmax(dim=1)) for k in (1, 2, 4)
        )
        self.exit0_confidence, self.exit1_confidence = (linear(f * k, 1, nn.Sigmoid()) for k in (1, 2))
        self.complexity = [(546, 137), (1844, 407), (6982, 1490)]

    @staticmethod
    def widening(planes):
        return nn.Sequential(
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            nn.Conv2d(planes, planes * 2, 3, 2, 1),
            nn.BatchNorm2d(planes * 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes * 2, planes * 2, 3, 1, 1),
        )

    def forward(self, x):
        x = self.initblock(x)
        x = self.basicblock1(x) + x
        pooled = self.pool(x).flatten(1)
        if self.exit0_confidence(pooled).item() > 0.5:
            return self.exit0_classifier(pooled), 0, 0.08
        x = self.basicblock2(x) + self.conv2d_6(x)
        pooled = self.pool(x).flatten(1)
        if self.exit1_confidence(pooled).item() > 0.5:
            return self.exit1_classifier(pooled), 1, 0.26
        x = self.basicblock3(x) + self.conv2d_9(x)
        return self.classifier(self.finalblock(x).flatten(1)), 2, 1.0


def unregistered(model: nn.Module) -> list[nn.Module]:
    """Modules in plain lists, which `eval`, `double` and `state_dict` of the reference pass by."""
    lists = (m.layers for m in model.modules() if isinstance(m, ExitBlock) and type(getattr(m, "layers", 0)) is list)
    return [module for modules in lists for module in modules]


@torch.no_grad()
def trained(model: nn.Module, x: torch.Tensor, seed: int = 0) -> nn.Module:
    """`model` in eval mode with lived-in weights and confidences that send about half of `x` out at every exit."""
    lived_in(model, seed)
    for i, module in enumerate(unregistered(model)):
        lived_in(module, seed + i + 1)
    exits = getattr(model, "exits", None)
    confidences = [e.confidence[0] for e in exits] if exits else [model.exit0_confidence[0], model.exit1_confidence[0]]
    threshold = torch.tensor(getattr(model, "exit_threshold", 0.5)).logit()
    for layer in confidences:
        layer.weight *= 20
        layer.bias.fill_(-1e4)
    for layer in confidences:
        rows = []
        hook = layer.register_forward_hook(lambda _module, _args, out, rows=rows: rows.append(out.item() + 1e4))
        # In double, because 1e4 swallows the digits of a float32 row.
        answers(model, x, torch.float64)
        hook.remove()
        ordered = torch.tensor(sorted(rows), dtype=torch.float64)
        if len(ordered) > 1:
            low, high = len(ordered) // 3, max(len(ordered) * 2 // 3, len(ordered) // 3 + 1)
            k = low + int(ordered.diff()[low:high].argmax())
            layer.bias.fill_(threshold - (ordered[k] + ordered[k + 1]) / 2)
    return model


@torch.no_grad()
def answers(model: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities [N, K], exits [N]) of the images one by one, as the reference evaluates, computed in `dtype`."""
    convert = model.to(dtype), *(m.to(dtype) for m in unregistered(model))
    rows = [model(image) for image in x.to(dtype).split(1)]
    for module in convert:
        module.to(torch.float32)
    return torch.cat([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def _get_thnn_function_backend():
    raise AssertionError("code that no reader may run")


_get_thnn_function_backend.__module__ = "torch.nn.backends.thnn"


class Backend:
    def __reduce__(self):
        return _get_thnn_function_backend, ()


@contextmanager
def importable() -> Iterator[None]:
    """The classes under the module names that the reference has, sources included, within the context."""
    modules = {name: types.ModuleType(name) for name in ("eenet", "custom_eenet", "torch.nn.backends.thnn")}
    for module in modules.values():
        module.__file__ = __file__
        for thing in (EENet, ExitBlock, BasicBlock, Bottleneck, CustomEENet, _get_thnn_function_backend):
            setattr(module, thing.__name__, thing)
    with mock.patch.dict(sys.modules, modules):
        yield


def save(thing: object, path: Path, legacy: bool = False) -> Path:
    """`torch.save` as the reference calls it; legacy is what every torch before 1.6 wrote."""
    with importable():
        torch.save(thing, path, _use_new_zipfile_serialization=not legacy)
    return path


def save_as_in_2019(model: nn.Module, path: Path) -> Path:
    """The whole module as torch 1.0 wrote it from a GPU: cuda storages, old numpy names, a backend in every module."""
    model = copy.deepcopy(model)
    for module in [*model.modules(), *(m for top in unregistered(model) for m in top.modules())]:
        module.__dict__["_backend"] = Backend()
        for new in ("_backward_pre_hooks", "_non_persistent_buffers_set", "_state_dict_hooks", "_forward_pre_hooks"):
            module.__dict__.pop(new, None)
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        save(model, path, legacy=True)
    data = path.read_bytes()
    for now, then in (
        (b"ctorch\nFloatStorage\n", b"ctorch.cuda\nFloatStorage\n"),
        (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
    ):
        assert now in data
        data = data.replace(now, then)
    path.write_bytes(data)
    return path
