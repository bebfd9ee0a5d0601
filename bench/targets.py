"""Rows of measurements → what must be reached and is, or is not, and every case in which another way is faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rows import Record
from selection import (
    AUTO,
    COMPACT,
    COMPILED,
    NO_EXITS,
    OPENVINO_INT8,
    OTHER_WORK,
    OURS,
    OWN_THRESHOLDS,
    PER_STAGE,
    PLAIN,
    RESIDENT,
    RESIDENT_INT8,
    Cases,
    op_case,
    op_name,
    speed,
)
from workloads import on_backbones

# From here on, inputs are several times as large as any cache.
MEMORY_BOUND = {"gpu": 2**28, "cpu": 2**27}


@dataclass(frozen=True)
class Target:
    """What a way must reach in all of its cases.

    least: realised ratio; with `against` images/s ÷ those of the fastest way in the same dtype whose name begins so.
    batch_sizes, costs: from … to, both included; costs as asked for, 1: no image exits early, None: own thresholds.
    times_cost: with `against`, times the mean cost, which makes it a realised ratio against that way.
    gpu: whether it is to be reached on a GPU, else on a CPU.
    """

    text: str
    least: float
    provider: str = RESIDENT
    networks: tuple[str, ...] = ("eenet20", "eenet110")
    batch_sizes: tuple[int, float] = (256, float("inf"))
    costs: tuple[float, float] | None = (0.2, 0.35)
    against: str = ""
    times_cost: bool = False
    gpu: bool = False

    def concerns(self, row: Record) -> bool:
        here = row["network"] in self.networks and row["provider"] == self.provider
        cost = _cost_asked_for(row["setting"])
        asked = cost == self.costs if self.costs is None or cost is None else self.costs[0] <= cost <= self.costs[1]
        return here and asked and self.batch_sizes[0] <= row["batch_size"] <= self.batch_sizes[1]


def _cost_asked_for(setting: str) -> float | None:
    if setting == OWN_THRESHOLDS:
        return None
    return 1.0 if setting == NO_EXITS else float(setting.removeprefix("cost "))


BACKBONES = tuple(work.network.name for work in on_backbones([1]))
TARGETS = (
    Target("resident: realised ratio ≥ 2.2 at N ≥ 256, cost .2–.35", 2.2),
    Target("resident: realised ratio ≥ 1.9 at N = 16, cost .2–.35", 1.9, batch_sizes=(16, 16)),
    Target("resident: realised ratio ≥ 1.5 at N = 1, cost .2–.35", 1.5, batch_sizes=(1, 1)),
    Target("resident: ≥ 2.0 × the best static way at N ≥ 256 where no image leaves early", 2.0, costs=(1, 1)),
    Target("resident restricted to AVX2: realised ratio ≥ 1.4 at N ≥ 256, cost .2–.35", 1.4, f"{RESIDENT}, avx2"),
    Target(f"resident: ≥ 2.2 × {PER_STAGE} at N ≥ 256, cost .2–.35", 2.2, against=PER_STAGE),
    Target(
        "resident: realised ratio ≥ 1.9 on MNIST at N ≥ 256, the network's own thresholds",
        1.9,
        networks=("eenet32 on MNIST",),
        costs=None,
    ),
    *(
        Target(
            f"resident, int8: {network}, N = {n}, no image leaves early: ≥ {least} × {OPENVINO_INT8}",
            least,
            RESIDENT_INT8,
            (network.split(" ")[0],),
            (n, n),
            (1, 1),
            OPENVINO_INT8,
        )
        for network, n, least in (
            *(("eenet20", 256, 1.8), ("eenet110", 256, 1.6)),
            *((network, n, 1.0) for network in ("eenet18 at 64", "eenet50 at 224") for n in (16, 1)),
        )
    ),
    *(
        Target(
            f"resident, int8: realised ratio ≥ {least} over the best static way in int8 at N = {n}, cost .25–.3",
            least,
            RESIDENT_INT8,
            batch_sizes=(n, n),
            costs=(0.25, 0.3),
        )
        for n, least in ((256, 1.7), (16, 1.5), (1, 1.2))
    ),
    *(
        Target(
            f"compact: {network}, N = {n}, {what} ≥ {least} × torch.compile, with or without CUDA graph",
            least,
            COMPACT,
            (network.split(" ")[0],),
            (n, n),
            (cost, cost),
            COMPILED,
            times_cost=True,
            gpu=True,
        )
        for network, n, cost, what, least in (
            ("eenet50 at 224", 256, 0.4, "cost .4: realised ratio", 0.95),
            ("eenet50 at 224", 256, 1.0, "no image leaves early:", 1.2),
            ("eenet50 at 224", 32, 0.4, "cost .4: realised ratio", 0.8),
            ("eenet18 at 64", 1024, 0.3, "cost .3: realised ratio", 0.9),
        )
    ),
    Target("backbones: no image exits: ≥ 0.95 × the best static way", 0.95, AUTO, BACKBONES, (1, 64), (1, 1)),
    *(
        Target(f"backbones: realised ratio ≥ {least} at N = {n}, cost .5", least, AUTO, BACKBONES, (n, n), (0.5, 0.5))
        for n, least in ((1, 0.85), (8, 0.95), (64, 0.95))
    ),
)


# Points of accuracy, 0 … 1, that eight bits may cost: the last exit alone, by data set; recalibrated at equal cost.
LAST_EXIT_LOSS, OTHER_LOSS, RECALIBRATED_LOSS = {"mnist": 0.001}, 0.003, 0.002


def int8_checks(rows: list[Record]) -> list[str]:
    """What eight bits cost in accuracy, way by way, within its bound or not; rows: the newest ones."""
    found = []
    float32 = {(r["quantized"], r["criterion"], r["origin"]): r for r in rows if r["way"] == "float32"}
    for row in rows:
        before = float32.get((row["quantized"], row["criterion"], row["origin"]))
        if row["way"] == "float32" or before is None or row["origin"] != "recalibrated":
            continue
        bound = LAST_EXIT_LOSS.get(row["quantized"].split(" on ")[-1], OTHER_LOSS)
        for what, name, most in (
            (f"last exit loses ≤ {100 * bound:.1f} points", "last_accuracy", bound),
            (f"recalibrated, ≤ {100 * RECALIBRATED_LOSS:.1f} points less", "accuracy", RECALIBRATED_LOSS),
        ):
            lost = before[name] - row[name]
            cost = f", at mean cost {row['mean_cost']:.2%} instead of {before['mean_cost']:.2%}" * (name == "accuracy")
            text = f"{row['quantized']}, {row['way']}: {what}"
            found.append(_verdict(text, lost <= most + 1e-9, f"{100 * lost:+.2f}{cost}"))
    return found


def op_checks(rows: list[Record], gpu: bool, lines: int) -> list[str]:
    """What the design asks of the ops, reached or not, and every case in which another way is faster."""
    ours = [r for r in rows if r["provider"] == OURS and r["microseconds"]]
    target = {"op": "exit_head", "channels": 64, "height": 8, "width": 8, "classes": 10, "layout": "channels_last"}
    target |= {"criterion": "learned", "exit_rate": 0.5}
    target |= {"samples": 4096, "dtype": "float16"} if gpu else {"samples": 256, "dtype": "float32"}
    at_target = {r["timing"]: r for r in ours if all(r[name] == value for name, value in target.items())}
    graph, launch = at_target.get("graph"), at_target.get("launch")
    found = []
    if gpu:
        text = "≤ 10 µs at N = 4096, C = 64, 8×8, float16 (in a graph, workspace cleared in it; inputs in the L2 cache)"
        found.append(_verdict(text, graph and graph["typical"] <= 10, f"{graph['typical']:.1f} µs" if graph else None))
        if launch:
            found[-1] += f"; launched from the host with the caches flushed {launch['typical']:.1f} µs"
    else:
        text = "≥ 5× the eager chain at N = 256, C = 64, 8×8, float32"
        found.append(_verdict(text, launch and launch["speedup"] >= 5, f"{launch['speedup']:.1f}×" if launch else None))
        same = [r for r in rows if launch and r["microseconds"] and op_case(r) == op_case(launch)]
        read = next((r for r in same if r["provider"] == "plain read"), None)
        if read:
            found[-1] += f"; a sum of the map by PyTorch, {read['typical']:.1f} µs, would be {read['speedup']:.1f}×"
    share = 0.8 if gpu else 0.7
    large = [r for r in ours if r["bytes"] >= MEMORY_BOUND["gpu" if gpu else "cpu"] and "conv" not in r["op"]]
    large = [r for r in large if r["timing"] == ("graph" if gpu else "launch") and (gpu or r["op"] == "exit_head")]
    worst = min(large, key=lambda r: r["copy_share"], default=None)
    text = f"≥ {share:.0%} of copy bandwidth where maps are larger than the caches"
    reached = sum(r["copy_share"] >= share for r in large)
    seen = (
        f"{reached} of {len(large)} cases; the lowest {worst['copy_share']:.0%} at {op_name(worst)}" if worst else None
    )
    found.append(_verdict(text, worst and reached == len(large), seen))
    return [*found, *op_losses(rows, ours, lines)]


def network_checks(cases: Cases, gpu: bool, lines: int) -> list[str]:
    """What the design asks of whole networks, reached or not, and every case in which another way is faster."""
    found = []
    for target in (t for t in TARGETS if t.gpu == gpu):
        values = []
        for (network, batch_size, setting), ways in cases.items():
            row = ways.get(target.provider)
            if row is None or not target.concerns(row):
                continue
            value = row["realised_ratio"]
            if target.against:
                others = [
                    speed(r)
                    for r in ways.values()
                    if r["provider"].startswith(target.against) and r["dtype"] == row["dtype"]
                ]
                times = row["mean_cost"] if target.times_cost else 1
                value = times * speed(row) / max(others) if others else None
            if value is not None:
                values.append((value, f"{network}, batch {batch_size}, {setting}"))
        reached, worst = sum(v >= target.least for v, _ in values), min(values, default=None)
        seen = worst and f"{reached} of {len(values)} cases; the lowest {worst[0]:.2f} at {worst[1]}"
        found.append(_verdict(target.text, worst and reached == len(values), seen))
    for engine in (COMPACT,) if gpu else (RESIDENT, RESIDENT_INT8, AUTO):
        if any(engine in ways for ways in cases.values()):
            found += network_losses(cases, engine, lines)
    return found


def network_losses(cases: Cases, engine: str, lines: int) -> list[str]:
    """Against all other ways at the same setting, and those without exits."""
    lost, ours = [], 0
    for (network, batch_size, setting), ways in cases.items():
        if engine not in ways:
            continue
        ours += 1
        same = {**cases.get((network, batch_size, NO_EXITS), {}), **ways}
        # Another network, other exits than those asked for, or another dtype would be another comparison.
        fair = {name: row for name, row in same.items() if row["dtype"] == ways[engine]["dtype"]}
        others = {name: row for name, row in fair.items() if not name.startswith((OURS, *OTHER_WORK))}
        best = max(others.values(), key=speed, default=None)
        if best and speed(best) > speed(ways[engine]):
            ratio = speed(best) / speed(ways[engine])
            lost.append((ratio, f"  {network}, batch {batch_size}, {setting}: {best['provider']} is {ratio:.2f}×"))
    found = [f"{engine} is slower than another way in {len(lost)} of {ours} cases{':' if lost else ''}"]
    return [*found, *(text for _, text in sorted(lost, reverse=True)[:lines])]


def _verdict(text: str, reached: Any, seen: str | None) -> str:
    return f"{'not measured' if seen is None else 'reached' if reached else 'NOT REACHED'}: {text}: {seen or '-'}"


def op_losses(rows: list[Record], ours: list[Record], lines: int) -> list[str]:
    """Within the same timing, the worst first."""
    lost = []
    for row in ours:
        same = [r for r in rows if r["microseconds"] and (*op_case(r), r["timing"]) == (*op_case(row), row["timing"])]
        best = min((r for r in same if r["provider"] not in PLAIN), key=lambda r: r["typical"])
        if best["provider"] != OURS:
            where = ", in graph" if row["timing"] == "graph" else ""
            ratio = row["typical"] / best["typical"]
            lost.append((ratio, f"  {op_name(row)}{where}: {ratio:.2f}× the time of {best['provider']}"))
    found = [f"eefast is slower than another way in {len(lost)} of {len(ours)} measurements{':' if lost else ''}"]
    found += [text for _, text in sorted(lost, reverse=True)[:lines]]
    return [*found, f"  … and in {len(lost) - lines} more"] if len(lost) > lines else found
