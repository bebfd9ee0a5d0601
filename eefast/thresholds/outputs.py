"""A network and labelled images → outputs of all exits, cached, and what any thresholds would answer on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import criteria, rules
from ..model import EarlyExitNet
from ..modules.contexts import mode
from ..result import ExitOutput, ExitResult, concatenated
from ..system import files

PARTS = ExitOutput._fields


@torch.no_grad()
def collect(net: EarlyExitNet, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[ExitOutput], Tensor]:
    """Outputs of every exit for every sample, on the CPU in float32, and the labels [N] int64.

    batches: (images as the network takes them, labels [N]); the network runs in eval mode and is left as it was.
    Raises `ValueError` without batches, and for labels of another shape.
    """
    device = next(net.parameters()).device
    collected: list[list[ExitOutput]] = [[] for _ in net.heads]
    labels = [torch.empty(0, dtype=torch.int64)]
    with mode(net, training=False):
        for images, target in batches:
            check_labels(target, len(images))
            for column, out in zip(collected, net.all_exits(net.prepare(images.to(device))), strict=True):
                column.append(ExitOutput(*(part.float().cpu() for part in out)))
            labels.append(target.cpu())
    if not collected[0]:
        raise ValueError("batches is empty; thresholds need held-out data")
    outputs = [ExitOutput(*(torch.cat(part) for part in zip(*column, strict=True))) for column in collected]
    return outputs, torch.cat(labels)


@torch.no_grad()
def collect_answers(
    run: Callable[[Tensor], ExitResult], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[ExitResult, Tensor]:
    """All answers of `run` (a network in eval mode or an accelerated one), and the labels [N], on the CPU.

    batches: (images as `run` takes them, labels [n]); device: where `run` wants them.
    Raises `ValueError` without images, and for labels of another shape.
    """
    results, labels = [], []
    for images, target in batches:
        check_labels(target, len(images))
        results.append(ExitResult(*(part.cpu() for part in run(images.to(device)))))
        labels.append(target.cpu())
    if not results:
        raise ValueError("batches is empty; there is nothing to evaluate")
    return concatenated(results), torch.cat(labels)


def check_labels(labels: Tensor, count: int) -> None:
    """`ValueError` unless `labels` is one class for each of `count` samples; others would be broadcast."""
    if labels.shape != (count,):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} for {count} samples; give the class of each, ({count},)"
        )


def save_outputs(path: str | Path, outputs: Sequence[ExitOutput], labels: Tensor, source: Mapping[str, str]) -> None:
    """Write the result of `collect` to a safetensors file, so that the next search needs no pass through the network.

    source: descriptions of the network and of the images; `load_outputs` checks them.
    """
    from safetensors.torch import save

    tensors = {f"exit{i}.{part}": getattr(out, part) for i, out in enumerate(outputs) for part in PARTS}
    files.write(path, save({"labels": labels, **{k: v.contiguous() for k, v in tensors.items()}}, dict(source)))


def load_outputs(path: str | Path, source: Mapping[str, str]) -> tuple[list[ExitOutput], Tensor]:
    """What `save_outputs` wrote; `ValueError` if the file is damaged or has another `source`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            found, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        exits = range((len(tensors) - 1) // len(PARTS))
        outputs = [ExitOutput(*(tensors[f"exit{i}.{part}"] for part in PARTS)) for i in exits]
        labels = tensors["labels"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a complete file of cached outputs ({error}); delete it or name another"
        ) from error
    for key in sorted(source.keys() | found.keys()):
        if source.get(key) != found.get(key):
            raise ValueError(
                f"{path} was collected with {key}={found.get(key)}, not {source.get(key)}; delete it or name another"
            )
    return outputs, labels


def exits_taken(
    outputs: Sequence[ExitOutput], criterion: criteria.Criterion, thresholds: Sequence[float] | Tensor
) -> Tensor:
    """The exit that each sample takes, [N] int64, for n thresholds and outputs of n + 1 exits for all samples.

    For M rows of thresholds [M, n]: [M, N].
    """
    rows = torch.as_tensor(thresholds, dtype=torch.float32)
    taken = torch.full((*rows.shape[:-1], len(outputs[0].logits)), len(outputs) - 1)
    for i in reversed(range(len(outputs) - 1)):
        confidence = criterion.confidence(outputs[i].logits, outputs[i].confidence_logit)
        taken.masked_fill_(criterion.leaves(confidence, rows[..., i : i + 1]), i)
    return taken


def some(outputs: Sequence[ExitOutput], samples: Tensor) -> list[ExitOutput]:
    """The outputs for some samples, indices [M] or [N] bool."""
    return [ExitOutput(*(part[samples] for part in out)) for out in outputs]


def carried(outputs: Sequence[ExitOutput], rule: rules.Rule | rules.PythonRule) -> list[ExitOutput]:
    """The outputs with the answer so far in place of each exit's own: logits are L, confidence and its row are s.

    Thresholds, accuracy and cost follow from these as those of other criteria from `outputs`, by the name of the
    rule, or by "carried" for one in Python: s and L of an exit depend on the exits before it, never on thresholds.
    Raises `ValueError` for a rule of another number of exits.
    """
    if isinstance(rule, rules.Rule) and rule.num_exits != len(outputs) - 1:
        raise ValueError(f"the rule is of {rule.num_exits} early exits, the outputs are of {len(outputs) - 1}")
    step = rule.table() if isinstance(rule, rules.Rule) else rule.step
    made: list[ExitOutput] = []
    before, confidence = torch.full_like(outputs[0].logits, torch.nan), torch.full((len(outputs[0].logits),), torch.nan)
    for i, out in enumerate(outputs):
        before, confidence = criteria.carry_on(step, i, out.logits, out.confidence_logit, before, confidence)
        made.append(ExitOutput(before, confidence, confidence))
    return made


def answered(outputs: Sequence[ExitOutput], net: EarlyExitNet) -> list[ExitOutput]:
    """The outputs as the network's criterion sees them: with the answer so far where it carries that."""
    rule = net.exit_rule
    return list(outputs) if isinstance(rule, str) else carried(outputs, rule)


def outcome(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: str, thresholds: Sequence[float]
) -> tuple[float, float]:
    """Accuracy and mean cost of n `thresholds` on outputs of n + 1 exits; labels: [N]; cost: [n + 1]."""
    check_labels(labels, len(outputs[0].logits))
    taken = exits_taken(outputs, criteria.get(criterion), thresholds)
    answers = torch.stack([out.logits.argmax(dim=1) for out in outputs]).gather(0, taken[None])[0]
    return (answers == labels).double().mean().item(), cost.double().cpu()[taken].mean().item()


def by_thresholds(
    outputs: Sequence[ExitOutput], net: EarlyExitNet, criterion: str, thresholds: Sequence[float]
) -> ExitResult:
    """The answers that a criterion and thresholds give on cached outputs, without running the network.

    criterion: one that carries nothing, or the network's.
    """
    own = criterion == net.criterion.name
    rule, outputs = (net.criterion, answered(outputs, net)) if own else (criteria.get(criterion), outputs)
    taken = exits_taken(outputs, rule, thresholds)
    rows = torch.arange(len(taken))
    confidence = torch.stack([rule.confidence(out.logits, out.confidence_logit) for out in outputs])
    logits = torch.stack([out.logits for out in outputs])
    return ExitResult(logits[taken, rows], taken, confidence[taken, rows], net.cost.cpu()[taken])


def flip_distances(taken: Tensor, expected: Tensor, outputs: Sequence[ExitOutput], net: EarlyExitNet) -> Tensor:
    """|confidence - threshold| at the earlier of the two exits, for the images that took another one: [flips] float32.

    taken, expected: [N] int64 exits of the same N images; outputs: of all exits for these images, on the CPU.
    """
    flipped = taken != expected
    if not flipped.any():
        return torch.empty(0)
    outputs = answered(outputs, net)
    earlier = torch.minimum(taken, expected)[flipped]
    confidence = torch.stack([net.criterion.confidence(out.logits, out.confidence_logit) for out in outputs[:-1]])
    return (confidence[:, flipped].T - net.thresholds.cpu()).abs().gather(1, earlier[:, None]).squeeze(1)
