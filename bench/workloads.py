"""By device: the networks, batch sizes and mean costs to be measured, what matters most first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cases import setting_of
from subjects import LARGE, MIDDLE, ON_MNIST, Network


@dataclass(frozen=True)
class Workload:
    """One network at one batch size, at one or several mean costs.

    costs: that the thresholds are to give, 1: no image exits early, None: as the network has them, which are its
        thresholds or those for its mix of exits.
    seconds: a guess of what it takes, besides compilation; with less of the budget left it is skipped.
    On a CPU: thorough: with the early-exit peers where no image exits early, too; deep: without torch.compile's early
        exits, each of which takes minutes there.
    compile_seconds: a guess of what torch.compile takes, 0: on a GPU and of `on_backbones`, measure without it.
    On a GPU: stage_seconds: the same for
        torch.compile stage by stage; traced: also look for the gaps in which the GPU does nothing; metered: also
        measure what energy the work takes.
    """

    network: Network
    batch_size: int
    costs: tuple[float | None, ...] = (None,)
    seconds: float = 6
    thorough: bool = False
    deep: bool = False
    compile_seconds: float = 0
    stage_seconds: float = 0
    traced: bool = False
    metered: bool = False

    def __str__(self) -> str:
        cost = "" if len(self.costs) > 1 or self.costs[0] is None else f", {self.setting}"
        compiled = ", compiled" * bool(self.compile_seconds) + " by stage" * bool(self.stage_seconds)
        without = ", without compiled early exits" * self.deep
        return f"{self.network.name}, batch {self.batch_size}{cost}{compiled}{without}"

    @property
    def setting(self) -> str:
        """Empty where there are several."""
        return setting_of(self.costs[0], self.network.mix) if len(self.costs) == 1 else ""

    @property
    def guess(self) -> float:
        return self.seconds + self.compile_seconds + self.stage_seconds


def _without_exits(name: str, num_exits: int) -> Network:
    return Network(name, (3, 32, 32), 10, (0.0,) * num_exits + (1.0,))


EENET20, EENET32 = _without_exits("eenet20", 2), _without_exits("eenet32", 3)
EENET56, EENET110 = _without_exits("eenet56", 4), _without_exits("eenet110", 8)

KEY_COSTS, OTHER_COSTS, OWN = (1.0, 0.25), (0.5, 0.3, 0.2), (1.0, None)
KEY_ON_CPU = (
    *(Workload(EENET20, n, KEY_COSTS, seconds) for n, seconds in ((256, 190), (16, 100), (1, 70))),
    Workload(ON_MNIST, 256, OWN, 220),
    *(Workload(EENET110, n, KEY_COSTS, seconds, deep=True) for n, seconds in ((256, 240), (16, 110), (1, 80))),
)
ALL_ON_CPU = (
    *KEY_ON_CPU,
    *(Workload(ON_MNIST, n, OWN, 100) for n in (16, 1)),
    Workload(MIDDLE, 16, KEY_COSTS, 250),
    Workload(LARGE, 16, (1.0, 0.5), 700),
    Workload(EENET110, 256, KEY_COSTS, 600),
    *(Workload(EENET20, n, OTHER_COSTS, seconds, True) for n, seconds in ((256, 350), (16, 200), (1, 150))),
    *(Workload(EENET32, n, KEY_COSTS, seconds) for n, seconds in ((256, 260), (16, 150), (1, 100))),
    *(Workload(EENET56, n, KEY_COSTS, seconds) for n, seconds in ((256, 400), (16, 250), (1, 150))),
    *(Workload(EENET110, n, OTHER_COSTS, seconds, True) for n, seconds in ((256, 1000), (16, 600), (1, 400))),
    *(Workload(network, 1024, (*KEY_COSTS, *OTHER_COSTS), 800) for network in (EENET20, EENET32, EENET56)),
    *(Workload(EENET110, 1024, (*KEY_COSTS, *OTHER_COSTS), 2000), Workload(ON_MNIST, 1024, OWN, 300)),
)
# Eight bits beside float32; a guess is of one thread.
INT8_ON_CPU = (
    *(Workload(EENET20, n, KEY_COSTS, seconds) for n, seconds in ((256, 50), (16, 25), (1, 20))),
    *(Workload(EENET110, n, KEY_COSTS, seconds) for n, seconds in ((256, 130), (16, 40), (1, 25))),
    *(Workload(MIDDLE, n, (1.0,), seconds) for n, seconds in ((16, 30), (1, 10))),
    *(Workload(LARGE, n, (1.0,), seconds) for n, seconds in ((16, 120), (1, 40))),
)

# (modules after which exits are attached, a guess of milliseconds per image in one thread).
_BACKBONES = {
    "torchvision:resnet18": (("layer1", "layer2", "layer3"), 15),
    "torchvision:resnet50": (("layer1", "layer2", "layer3"), 30),
    "timm:convnext_pico": (("stages.0", "stages.1", "stages.2"), 16),
    "torchvision:densenet121": (("features.pool0", "features.transition1", "features.transition2"), 32),
    "torchvision:efficientnet_b0": (("features.3", "features.4", "features.5"), 9),
    "torchvision:mobilenet_v3_large": (("features.6", "features.10", "features.12"), 5),
    "timm:vit_tiny_patch16_224": (("blocks.3", "blocks.7"), 9),
}
BACKBONE_SIZES, BACKBONE_COSTS = (1, 8, 64), (1.0, 0.5)


def on_backbones(batch_sizes: Sequence[int], compile_seconds: float = 0) -> list[Workload]:
    """Networks of torchvision and timm with exits attached, one after the other; compile_seconds: see `Workload`."""
    return [
        Workload(
            Network(name, (3, 224, 224), 1000, (0.0,) * len(exits) + (1.0,), exits=exits),
            n,
            BACKBONE_COSTS,
            20 + 0.08 * max(n, 8) * each,
            compile_seconds=compile_seconds,
        )
        for name, (exits, each) in _BACKBONES.items()
        for n in batch_sizes
    ]


# Mixes of mean cost 0.20; the same networks without exits are above.
SMALL = Network("eenet20", (3, 32, 32), 10, (0.76, 0.18, 0.06))
DEEP = Network("eenet110", (3, 32, 32), 10, (0.29, 0.2, 0.15, 0.1, 0.075, 0.055, 0.04, 0.025, 0.065))
# Here the cost says how many images exit early; the mix only says how many exits there are.
ATTACHED = Network("regnety_008", (3, 224, 224), 1000, (0.0, 0.0, 0.0, 1.0), exits=("s1", "s2", "s3"))
COSTS = (0.4, 0.3, 1.0)
RESIDENT_ON_GPU = (
    *(Workload(SMALL, 4096, compile_seconds=15, seconds=10, metered=True), Workload(SMALL, 256, compile_seconds=15)),
    *(Workload(EENET20, 4096), Workload(EENET110, 4096, seconds=8)),
    *(Workload(DEEP, 4096, seconds=16, metered=True), Workload(DEEP, 256)),
    *(Workload(SMALL, 16), Workload(SMALL, 1), Workload(DEEP, 16), Workload(DEEP, 1)),
    *(Workload(DEEP, 4096, compile_seconds=90, seconds=12), Workload(DEEP, 256, compile_seconds=90)),
)
# Of one network and batch size in a row, torch.compile works once.
KEY_COMPACT_ON_GPU = (
    Workload(LARGE, 256, (0.4,), compile_seconds=25, seconds=23, traced=True, metered=True),
    Workload(LARGE, 256, (1.0,), compile_seconds=1, seconds=15, traced=True),
    Workload(LARGE, 32, (0.4,), compile_seconds=15, seconds=9, traced=True),
    Workload(MIDDLE, 1024, (0.3,), compile_seconds=12, seconds=15, traced=True, metered=True),
)
COMPACT_ON_GPU = (
    *KEY_COMPACT_ON_GPU,
    Workload(MIDDLE, 1024, (0.3,), compile_seconds=8, stage_seconds=25, seconds=12),
    Workload(LARGE, 256, (0.4,), compile_seconds=8, stage_seconds=45, seconds=20),
    Workload(ATTACHED, 256, (0.4,), compile_seconds=30, seconds=25),
    *(Workload(MIDDLE, 1024, (cost,), compile_seconds=8, seconds=12) for cost in (0.4, 1.0)),
    Workload(LARGE, 256, (0.3,), seconds=18),
    *(Workload(MIDDLE, n, (cost,), seconds=8) for n in (256, 128, 32, 8, 1) for cost in COSTS),
    *(Workload(LARGE, 32, (cost,), seconds=9) for cost in (0.3, 1.0)),
    *(Workload(LARGE, n, (cost,), seconds=9) for n in (128, 8, 1) for cost in COSTS),
    *(Workload(ATTACHED, n, (cost,), seconds=12) for n in (32, 1) for cost in COSTS),
)
# By engine.
ON_GPU = {"resident": RESIDENT_ON_GPU, "compact": COMPACT_ON_GPU}
