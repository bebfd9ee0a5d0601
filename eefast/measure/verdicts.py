"""The rows of one batch size → a verdict on early exit, as figures, as a sentence and as the code that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model import EarlyExitNet
from .comparison import Row

LOOP = "masked loop, PyTorch"
IN_INT8 = {engine: f"INT8, {engine}" for engine in ("resident", "compact")}
"""Names of rows, by engine."""

ENGINES = ("resident", "compact")
EXITS_OFF = {engine: f"{engine}, exits off" for engine in ENGINES}
"""Names of rows by engine: no image exits early, which shows what the engine gains without exits."""

LITTLE = 1.05
"""Speed with exits ÷ speed without, up to which exits bring too little to be worth their accuracy."""


@dataclass(frozen=True)
class Verdict:
    """Whether early exit is worth it at one batch size.

    worth: the speed-up is above 1, or below, in four of five rounds; None where it is neither.
    static, engine: the fastest way without early exits, and the fastest of eefast's engines.
    speedup: time of the former ÷ time of the latter, in the same rounds: 20 %, 50 % and 80 % quantile.
    over_loop: median time of PyTorch's masked loop ÷ median time of the engine.
    realised_ratio: median of mean cost × speed-up.
    by_engine: time of `static` ÷ time of the engine where no image exits early; by_exits: median time of that ÷ median
        time of the engine; their product is about the speed-up. None where that was not measured.
    """

    batch_size: int
    worth: bool | None
    static: str
    engine: str
    speedup: tuple[float, float, float]
    over_loop: float
    realised_ratio: float
    by_engine: float | None = None
    by_exits: float | None = None


def judge(rows: Sequence[Row], static: str) -> Verdict:
    """rows: of one batch size, all measured against `static`, the fastest of them without early exits."""
    loop = next(row for row in rows if row.name == LOOP)
    # Where neither engine can run, the reference engine is the masked loop.
    engines = [row for row in rows if row.name in ENGINES] or [loop]
    best = max(engines, key=lambda row: row.images_per_s)
    low, high = best.speedup_quantiles
    off = next((row for row in rows if row.name == EXITS_OFF.get(best.name)), None)
    return Verdict(
        batch_size=best.batch_size,
        worth=True if low > 1 else False if high < 1 else None,
        static=static,
        engine="reference" if best is loop else best.name,
        speedup=(low, best.speedup, high),
        over_loop=best.images_per_s / loop.images_per_s,
        realised_ratio=best.realised_ratio,
        by_engine=None if off is None else off.speedup,
        by_exits=None if off is None else best.images_per_s / off.images_per_s,
    )


def sentence(verdict: Verdict, accuracy_change: float) -> str:
    """The verdict as a sentence; accuracy_change: of early exit, in -1 … 1."""
    low, middle, high = verdict.speedup
    judged = {True: "worth it", False: "not worth it", None: "no clear difference"}[verdict.worth]
    times = f"{low:.2f} … {high:.2f}" if verdict.worth is None else f"{middle:.2f}"
    split = ""
    if verdict.by_engine is not None and verdict.by_exits is not None:
        split = f" ({verdict.by_engine:.2f} by the engine, {verdict.by_exits:.2f} by the exits)"
        if verdict.worth and verdict.by_exits < LITTLE:
            judged = "the engine is worth it, the exits are not"
    return (
        f"{judged}: {verdict.engine} is {times} × as fast as {verdict.static}{split}, accuracy "
        f"{100 * accuracy_change:+.2f} points; realised ratio {verdict.realised_ratio:.2f}, "
        f"{verdict.over_loop:.2f} × the masked loop"
    )


def int8_sentence(rows: Sequence[Row]) -> str:
    """Of eefast in INT8 and the fastest way in INT8 without early exits; rows: of one batch size; "" without both."""
    ours = [row for row in rows if row.name in IN_INT8.values()]
    static = [row for row in rows if row.other_classes is not None and row.criterion is None]
    if not ours or not static:
        return ""
    best = max(static, key=lambda row: row.images_per_s)
    times = ours[0].images_per_s / best.images_per_s
    accuracies = f"accuracy {ours[0].accuracy:.2%} and {best.accuracy:.2%}"
    return f"{ours[0].name}, is {times:.2f} × as fast as {best.name}, {accuracies}"


def code(
    path: str, net: EarlyExitNet, verdicts: Sequence[Verdict], dtype: torch.dtype, saved: bool, stages: str = "auto"
) -> str:
    """The lines of Python that run what was found, for the batch sizes at which it is worth it; empty if at none.

    path: what `eefast.load` reads; saved: that this holds the criterion and the thresholds. stages: see `accelerate`.
    """
    sizes: dict[str, list[int]] = {}
    for verdict in verdicts:
        if verdict.worth:
            sizes.setdefault(verdict.engine, []).append(verdict.batch_size)
    if not sizes:
        return ""
    load = f"net = eefast.load({path!r})"
    if not saved:
        # Nine digits give every float32 back.
        load += f".with_criterion({net.criterion.name!r}, [{', '.join(f'{t:.9g}' for t in net.thresholds.tolist())}])"
    device = "" if net.cost.device.type == "cpu" else f".to({str(net.cost.device)!r})"
    kind = "" if dtype == torch.float32 else f", dtype={dtype}"
    named = "" if stages == "auto" else f", stages={stages!r}"
    lines = [
        f"fast = eefast.accelerate(net, engine={engine!r}{kind}{named if engine == 'compact' else ''}, frozen=True)"
        + (
            f"  # batches of {', '.join(map(str, batch_sizes))}"
            if len(sizes) > 1 or len(batch_sizes) < len(verdicts)
            else ""
        )
        for engine, batch_sizes in sizes.items()
    ]
    return "\n".join([load + device, *lines])
