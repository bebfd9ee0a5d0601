"""A network and what was measured of it → README.md of its repository: accuracy, cost, exit rule, data, limits."""

from __future__ import annotations

from ..model import EarlyExitNet
from ..thresholds.evaluation import Evaluation

FRONT = """---
library_name: eefast
pipeline_tag: image-classification
tags:
- early-exit
- image-classification
---
"""


def card(net: EarlyExitNet, repo_id: str, evaluation: Evaluation | None, evaluated_on: str | None) -> str:
    """Markdown. evaluation: of answers under the network's thresholds; evaluated_on: on which images, in words."""
    parts = [
        f"# {repo_id.partition('/')[2] or repo_id}",
        f"{net.name} with {net.num_exits} early exits, {net.num_classes} classes: each image is answered by the first "
        "exit that is sure enough, so that easy images cost less. Cost is the share of the arithmetic of the network "
        "without exits.",
        _measured(net, evaluation, evaluated_on),
        _rule(net),
        _data(net),
        _use(net, repo_id),
        _limits(net, evaluation),
    ]
    return FRONT + "\n" + "\n\n".join(parts) + "\n"


def _measured(net: EarlyExitNet, found: Evaluation | None, where: str | None) -> str:
    if found is None:
        return "## Accuracy and cost\n\nNot measured for this card."
    images = [right + wrong for right, wrong in zip(found.right, found.wrong, strict=True)]
    rows = [
        f"| {i} | {n / found.images:.1%} | {right / n:.2%} | {cost:.3f} |"
        for i, (n, right, cost) in enumerate(zip(images, found.right, net.cost.tolist(), strict=True))
        if n
    ]
    title = f"On {found.images:,} images of {where}" if where else f"On {found.images:,} images"
    return "\n".join([
        "## Accuracy and cost",
        "",
        f"{title}: accuracy **{found.accuracy:.2%}** at a mean cost of **{found.mean_cost:.3f}**.",
        "",
        "| exit | images | accuracy of these | cost |",
        "|---|---|---|---|",
        *rows,
    ])  # fmt: skip


def _rule(net: EarlyExitNet) -> str:
    limits = ", ".join(f"{value:.6g}" for value in net.thresholds.tolist()) or "none"
    side = "above" if net.criterion.comparison == ">" else "below"
    return (
        f"## Exit rule\n\nCriterion `{net.criterion.name}`: an image exits {side} the threshold. "
        f"Thresholds of exits 0 … {net.num_exits - 1}: {limits}. `net.thresholds` may be changed at any time."
    )


def _data(net: EarlyExitNet) -> str:
    shape = "×".join(map(str, net.input_shape))
    lines = [f"## Data\n\nImages of {shape}."]
    if net.normalization is None:
        lines.append("They must be normalised as in training; the network does not say how.")
    else:
        mean, std = ([f"{value:.4g}" for value in part] for part in net.normalization)
        lines.append(f"It takes uint8 pixels, or floats normalised by mean {', '.join(mean)}, std {', '.join(std)}.")
    if net.record is None:
        lines.append("It is not recorded which images it was trained on.")
    else:
        record = net.record
        lines.append(
            f"Trained on {record.images - record.held_out:,} images of {record.dataset}; {record.held_out:,} others "
            f"were held out (seed {record.seed})."
        )
    if net.classes is not None:
        lines.append(f"Classes: {', '.join(net.classes[:100])}{' …' if len(net.classes) > 100 else ''}.")
    return " ".join(lines)


def _use(net: EarlyExitNet, repo_id: str) -> str:
    return f"""## Use

```python
import eefast

net = eefast.EarlyExitNet.from_pretrained("{repo_id}")
fast = eefast.accelerate(net)
result = fast(images)  # result.labels, result.exit_index, result.cost
```"""


def _limits(net: EarlyExitNet, found: Evaluation | None) -> str:
    lines = [
        "## Limits",
        "",
        "- Accuracy and cost hold for images like those that were measured; on others more images may exit early and "
        "wrong, and confidences are not probabilities.",
        "- Thresholds were chosen for one balance of accuracy and cost; `eefast calibrate` chooses others.",
    ]
    if found is not None and (worst := [value for value in found.class_accuracy if value is not None]):
        lines.append(f"- The worst class has an accuracy of {min(worst):.2%}.")
    return "\n".join(lines)
