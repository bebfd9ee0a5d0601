"""What INT8 changes, counted from outputs that are written down here."""

import torch
from torch import fx, nn

from eefast import EarlyExitNet, zoo
from eefast.heads import ExitHead
from eefast.measure import precisions
from eefast.qdq import QdqConvolution, QdqStage
from eefast.quantized import QuantizedConvolution, QuantizedStage
from eefast.result import ExitOutput


def net_at(threshold: float) -> EarlyExitNet:
    stages = [nn.Conv2d(1, 2, 3), nn.ReLU()]
    heads = [ExitHead("pool", (2, 3, 3), 3, (1, 5, 5)) for _ in stages]
    return EarlyExitNet(stages, heads, input_shape=(1, 5, 5), thresholds=[threshold], costs=None).eval()


def outputs(classes: list[list[int]], confidences: list[float]) -> list[ExitOutput]:
    """Of two exits."""
    logits = [torch.nn.functional.one_hot(torch.tensor(found), 3).float() for found in classes]
    return [
        ExitOutput(logits[0], torch.tensor(confidences), torch.logit(torch.tensor(confidences))),
        ExitOutput(logits[1], torch.zeros(4), torch.zeros(4)),
    ]


def test_compare() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    net, quantized = net_at(0.5), net_at(0.25)
    # Exits 0 1 0 1 with classes 0 1 2 2, then exits 0 0 0 1 with classes 0 0 2 0.
    before = outputs([[0, 0, 2, 1], [1, 1, 1, 2]], [0.9, 0.4, 0.8, 0.1])
    after = outputs([[0, 0, 2, 1], [1, 1, 2, 0]], [0.9, 0.3, 0.8, 0.2])
    found = precisions.compare(net, before, quantized, after, labels)
    cost = float(net.cost[0])
    assert (found.float32.accuracy, found.int8.accuracy) == (0.75, 0.75)
    assert (found.float32.last_exit_accuracy, found.int8.last_exit_accuracy) == (0.25, 0.75)
    assert abs(found.float32.mean_cost - (2 * cost + 2) / 4) < 1e-6
    assert abs(found.int8.mean_cost - (3 * cost + 1) / 4) < 1e-6
    assert (found.other_exits, found.other_classes) == (0.25, 0.5)


def test_megabytes() -> None:
    net = zoo.eenet("eenet8", input_shape=(1, 28, 28))
    numbers = sum(v.numel() * {torch.float32: 4, torch.int64: 8}[v.dtype] for v in net.state_dict().values())
    assert precisions.megabytes(net) == numbers / 1e6


def test_what_modules_share_counts_once() -> None:
    net = zoo.eenet("eenet20", 2, input_shape=(1, 28, 28), head="conv3", carry="features")
    tensors = {v.data_ptr(): v for v in net.state_dict().values()}
    assert len(tensors) < len(net.state_dict())
    assert precisions.megabytes(net) == sum(v.numel() * v.element_size() for v in tensors.values()) / 1e6
    stage, head = nn.Conv2d(2, 2, 1), ExitHead("pool", (2, 5, 5), 3, (2, 5, 5))
    shared = EarlyExitNet([stage, stage], [head, head], input_shape=(2, 5, 5))
    alone = EarlyExitNet([stage], [head], input_shape=(2, 5, 5))
    assert precisions.megabytes(shared) == precisions.megabytes(alone) + 4 / 1e6  # one threshold more


def test_convolutions_are_counted_by_algorithm() -> None:
    def convolution(*sides: int, winograd: int) -> QuantizedConvolution:
        weight, bias = torch.ones(1, 1, *sides), torch.zeros(max(2, 2 * winograd), 1)
        return QuantizedConvolution(0, weight, bias, torch.ones(1), kernel=3, padding=1, winograd=winograd)

    sides = [(3, 3), (3, 4), (4, 4)]
    steps = [convolution(*sides[winograd], winograd=winograd) for winograd in (1, 0, 1, 2)]
    stage = QuantizedStage(steps, [1.0] * 5, [0] * 5, output=4)
    head = ExitHead("pool", (1, 5, 5), 3, (1, 5, 5))
    net = EarlyExitNet([stage], [head], input_shape=(1, 5, 5), thresholds=[])
    assert precisions.algorithms(net) == {"direct": 1, "F(2,3)": 2, "F(2×2)": 1}


def test_convolutions_of_other_libraries_are_counted_apart() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)))
    graph.set_submodule("0", QdqConvolution(graph.get_submodule("0")))
    head = ExitHead("pool", (2, 3, 3), 3, (1, 5, 5))
    net = EarlyExitNet([QdqStage(graph)], [head], input_shape=(1, 5, 5), thresholds=[])
    assert precisions.algorithms(net) == {"INT8 by other libraries": 1, "float32": 1}
