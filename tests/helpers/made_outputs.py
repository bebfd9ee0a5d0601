"""Made outputs of exits, and thresholds on them tried one sample, or one combination, at a time."""

import itertools

import numpy as np
import torch

from eefast import ExitOutput, criteria


def make_outputs(
    n: int, exits: int, seed: int, rounded: bool = False, classes: int = 4
) -> tuple[list[ExitOutput], torch.Tensor]:
    """Exits that get better with depth, and confidences that know a little about it."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=random)
    outputs = []
    for i in range(exits):
        logits = torch.randn(n, classes, generator=random) + (1.0 + i) * torch.nn.functional.one_hot(labels, classes)
        z = torch.randn(n, generator=random) + 2 * (logits.argmax(1) == labels)
        logits, z = (logits.round(), z.round()) if rounded else (logits, z)
        outputs.append(ExitOutput(logits, torch.sigmoid(z), z))
    return outputs, labels


def looped(outputs, labels, cost, criterion, thresholds) -> tuple[float, float]:
    """Sample by sample: the first exit whose float32 confidence is beyond its threshold."""
    rule = criteria.get(criterion)
    values = [rule.confidence(o.logits, o.confidence_logit).numpy() for o in outputs]
    right = spent = 0.0
    for row in range(len(labels)):
        taken = len(outputs) - 1
        for i in reversed(range(len(outputs) - 1)):
            t = np.float32(thresholds[i])
            if values[i][row] > t if rule.comparison == ">" else values[i][row] < t:
                taken = i
        right += int(outputs[taken].logits[row].argmax()) == int(labels[row])
        spent += float(cost[taken])
    return right / len(labels), spent / len(labels)


def every_point(outputs, labels, cost, criterion) -> list[tuple[float, float]]:
    """Accuracy and cost for all combinations of distinguishable thresholds."""
    rule = criteria.get(criterion)
    grids = []
    for out in outputs[:-1]:
        seen = np.unique(rule.confidence(out.logits, out.confidence_logit).numpy())
        # Between two neighbours among float32 numbers there is no threshold that ties with neither.
        between = [(a + b) / 2 for a, b in itertools.pairwise(seen) if np.nextafter(a, b) < b]
        grids.append([seen[0] - 1, *between, seen[-1] + 1])
    values = [rule.confidence(o.logits, o.confidence_logit).double().numpy() for o in outputs[:-1]]
    right = np.stack([(o.logits.argmax(1) == labels).numpy() for o in outputs])
    points = []
    for thresholds in itertools.product(*grids):
        taken = np.full(len(labels), len(outputs) - 1)
        for i in reversed(range(len(grids))):
            beyond = values[i] > thresholds[i] if rule.comparison == ">" else values[i] < thresholds[i]
            taken[beyond] = i
        points.append((right[taken, np.arange(len(labels))].mean(), cost.double().numpy()[taken].mean()))
    return points


def costs_of(exits: int) -> torch.Tensor:
    # Powers of two add up exactly, whatever the order.
    return torch.tensor([0.125, 0.25, 0.5, 1.0])[-exits:]
