"""Losses against the papers' formulas in plain Python, sample by sample, and against finite differences."""

import math
from functools import partial

import pytest
import torch

from eefast import ExitOutput
from eefast.train import losses

COST = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)


def make_outputs(n: int, classes: int, scale: float = 1.0) -> tuple[list[ExitOutput], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    outputs = []
    for _ in COST:
        logits = scale * torch.randn(n, classes, generator=random, dtype=torch.float64)
        z = scale * torch.randn(n, generator=random, dtype=torch.float64)
        outputs.append(ExitOutput(logits, torch.sigmoid(z), z))
    return outputs, torch.randint(classes, (n,), generator=random)


def make_tags(n: int) -> torch.Tensor:
    return torch.randint(len(COST), (n,), generator=torch.Generator().manual_seed(1))


def softmax(row: torch.Tensor) -> list[float]:
    powers = [math.exp(v) for v in row.tolist()]
    return [p / sum(powers) for p in powers]


def mixed(p: list[float], h: list[float], cost: list[float]) -> list[float]:
    """-log P_i + C_i of exits 0 … n for one sample."""
    mixture, mixed_cost = p[-1], cost[-1]
    terms = [-math.log(mixture) + mixed_cost]
    for i in reversed(range(len(p) - 1)):
        mixture = h[i] * p[i] + (1 - h[i]) * mixture
        mixed_cost = h[i] * cost[i] + (1 - h[i]) * mixed_cost
        terms.insert(0, -math.log(mixture) + mixed_cost)
    return terms


def looped(name: str, outputs: list[ExitOutput], labels: torch.Tensor, cost: torch.Tensor, tags: torch.Tensor) -> float:
    """The losses as the papers write them, one exit of one sample after the other."""
    n, exits, c = len(labels), len(outputs), cost.tolist()
    p = [[softmax(out.logits[row])[label] for out in outputs] for row, label in enumerate(labels.tolist())]
    h = [[1 / (1 + math.exp(-out.confidence_logit[row].item())) for out in outputs] for row in range(n)]
    if name == "confidence_weighted":
        mean_h = [sum(row[i] for row in h) / n for i in range(exits)]
        nll = [sum(-math.log(row[i]) for row in p) / n for i in range(exits)]
        return sum(mean_h[i] / sum(mean_h) * (nll[i] + c[i]) for i in range(exits))
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        nll = [-math.log(v) for v in p[row]]
        if name == "deep_supervision":
            total += sum(nll)
        elif name == "early_supervision":
            total += sum(nll[:-1]) / (exits - 1)
        elif name == "final_supervision":
            total += nll[-1]
        elif name == "mixture":
            total += mixed(p[row], h[row], c)[0]
        elif name == "mixtures":
            total += sum(mixed(p[row], h[row], c))
        elif name == "mean_mixtures":
            total += sum(mixed(p[row], h[row], c)) / (exits - 1)
        elif name == "early_mixtures":
            total += sum(mixed(p[row], h[row], c)[:-1]) / (exits - 1)
        elif name == "exit_tagged":
            tag = tags[row].item()
            total += nll[tag] + c[tag]
            for i in range(exits):
                share = sum(t == i for t in tags.tolist()) / n
                total += (1 - share) * -math.log(h[row][i]) if tag == i else share * -math.log(1 - h[row][i])
        elif name == "correctness":
            for i, out in enumerate(outputs):
                values = out.logits[row].tolist()
                total += -math.log(h[row][i] if values.index(max(values)) == label else 1 - h[row][i])
        elif name == "distillation":
            taught, *learned = (softmax(out.logits[row] / 3) for out in (outputs[-1], *outputs[:-1]))
            total += 9 * sum(p * math.log(p / q) for early in learned for p, q in zip(taught, early, strict=True))
        else:
            raise AssertionError(f"{name} has no formula here")
    return total / n


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (3, 10), (31, 7)])
def test_losses_equal_loops(name: str, n: int, classes: int) -> None:
    outputs, labels = make_outputs(n, classes)
    tags = make_tags(n)
    found = losses.LOSSES[name](outputs, labels, COST, tags)
    assert found.item() == pytest.approx(looped(name, outputs, labels, COST, tags), rel=1e-12)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_have_the_right_gradient(name: str) -> None:
    outputs, labels = make_outputs(3, 5)
    last = outputs[-1]
    if name == "distillation":
        del outputs[-1]
    leaves = [tensor.requires_grad_() for out in outputs for tensor in (out.logits, out.confidence_logit)]

    def of_leaves(*tensors: torch.Tensor) -> torch.Tensor:
        exits = [ExitOutput(a, torch.sigmoid(b), b) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        exits += [last] * (name == "distillation")
        return losses.LOSSES[name](exits, labels, COST, make_tags(3))

    assert torch.autograd.gradcheck(of_leaves, leaves)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("confidence", [None, -400.0, 400.0])
def test_losses_survive_what_underflows(name: str, confidence: float | None) -> None:
    outputs, labels = make_outputs(31, 10, scale=400.0)
    if confidence is not None:
        outputs = [out._replace(confidence_logit=torch.full_like(out.confidence_logit, confidence)) for out in outputs]
    outputs = [ExitOutput(*(part.float().requires_grad_() for part in out)) for out in outputs]
    naive = outputs[0].logits.softmax(dim=1)[range(31), labels].log()
    assert naive.isinf().any()
    found = losses.LOSSES[name](outputs, labels, COST.float(), make_tags(31))
    found.backward()
    assert found.isfinite()
    parts = [grad for out in outputs for grad in (out.logits.grad, out.confidence_logit.grad) if grad is not None]
    assert parts
    assert all(grad.isfinite().all() for grad in parts)


def test_correctness_teaches_the_confidence_only() -> None:
    outputs, labels = make_outputs(31, 10)
    for out in outputs:
        out.logits.requires_grad_()
        out.confidence_logit.requires_grad_()
    losses.correctness(outputs, labels, COST).backward()
    for out in outputs:
        assert out.logits.grad is None
        right = out.logits.argmax(dim=1) == labels
        # Downhill raises the confidence of right answers and lowers that of wrong ones.
        assert torch.equal(out.confidence_logit.grad < 0, right)


def test_distillation_teaches_early_exits_only() -> None:
    outputs, labels = make_outputs(31, 10)
    for out in outputs:
        out.logits.requires_grad_()
    losses.distillation(outputs, labels, COST).backward()
    assert outputs[-1].logits.grad is None
    for out in outputs[:-1]:
        # ∂/∂z of T²·KL is T·(softmax(z / T) - taught).
        difference = (out.logits / 3).softmax(1) - (outputs[-1].logits / 3).softmax(1)
        torch.testing.assert_close(out.logits.grad, 3 * difference.detach() / 31)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (31, 7)])
def test_a_teacher_teaches_all_exits(n: int, classes: int) -> None:
    outputs, labels = make_outputs(n, classes)
    teacher = 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = 0.0
    for row in range(n):
        wanted = softmax(teacher[row] / 3)
        for out in outputs:
            found = softmax(out.logits[row] / 3)
            total += 9 * sum(p * math.log(p / q) for p, q in zip(wanted, found, strict=True)) / n
    parsed = losses.parse("0.5*taught")
    assert parsed.uses_teacher
    assert parsed(outputs, labels, COST, teacher=teacher).item() == pytest.approx(total / 2, rel=1e-12)
    for out in outputs:
        out.logits.requires_grad_()
    losses.taught(outputs, teacher.requires_grad_()).backward()
    assert teacher.grad is None
    for out in outputs:
        difference = (out.logits / 3).softmax(1) - (teacher / 3).softmax(1)
        torch.testing.assert_close(out.logits.grad, 3 * difference.detach() / n)
    last = losses.parse("final_taught")(outputs, labels, COST, teacher=teacher)
    assert last.item() == losses.taught(outputs[-1:], teacher).item()
    assert losses.taught(outputs, teacher).item() > last.item() > 0


def test_tagged_loss_without_tags_takes_the_cheapest_exit() -> None:
    outputs, labels = make_outputs(31, 10)
    tags = []
    for row, label in enumerate(labels.tolist()):
        prices = [-math.log(softmax(out.logits[row])[label]) + c for out, c in zip(outputs, COST.tolist(), strict=True)]
        tags.append(prices.index(min(prices)))
    assert len(set(tags)) > 1
    expected = looped("exit_tagged", outputs, labels, COST, torch.tensor(tags))
    assert losses.exit_tagged(outputs, labels, COST).item() == pytest.approx(expected, rel=1e-12)


def test_aliases_are_the_names_of_the_published_code() -> None:
    assert {name: losses.parse(name).terms for name in losses.ALIASES} == {
        "v0": ((1.0, "deep_supervision"),),
        "v1": ((1.0, "mixture"),),
        "v2": ((1.0, "mixtures"),),
        "v3": ((1.0, "confidence_weighted"),),
        "v4": ((1.0, "exit_tagged"),),
        "pteenet_v0": ((1.0, "early_supervision"),),
        "pteenet_v2": ((1.0, "mean_mixtures"),),
        "pteenet_v5": ((1.0, "early_mixtures"),),
        "pteenet_v6": ((1.0, "final_supervision"),),
    }


def test_loss_text() -> None:
    parsed = losses.parse("v0 + 0.5*correctness+2 * mixtures", cost_weight=3.0)
    assert parsed.terms == ((1.0, "deep_supervision"), (0.5, "correctness"), (2.0, "mixtures"))
    assert not parsed.uses_tags
    assert not parsed.uses_teacher
    assert losses.parse("v0+v4").uses_tags
    outputs, labels = make_outputs(3, 5)
    part = partial(looped, outputs=outputs, labels=labels, cost=3 * COST, tags=make_tags(3))
    expected = part("deep_supervision") + 0.5 * part("correctness") + 2 * part("mixtures")
    assert parsed(outputs, labels, COST).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    outputs, labels = make_outputs(257, 10)
    narrow = [ExitOutput(out.logits.to(dtype), out.confidence, out.confidence_logit.float()) for out in outputs]
    found = losses.parse("v2")(narrow, labels, COST.float())
    assert found.dtype == torch.float32
    exact = [ExitOutput(out.logits.double(), out.confidence, out.confidence_logit.double()) for out in narrow]
    assert found.item() == pytest.approx(looped("mixtures", exact, labels, COST, labels), rel=1e-5)


@pytest.mark.parametrize("text", ["", "v9", "v0+", "x*v0", "-1*v0", "0*v0", "nan*v0", "inf*v0", "v0*2"])
def test_loss_text_malformed(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no term; write name or weight\*name, name in deep_supervision"):
        losses.parse(text)
