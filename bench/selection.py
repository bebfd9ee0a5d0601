"""Rows of measurements → those that count: the newest of each, by case; the names by which they are told apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rows import Record

OURS = "eefast"
# The names of ways to run a network without its exits begin so.
STATIC = "plain"
BASELINES = ("eager", "x[mask]")
PLAIN = ("plain copy", "plain read")
CASE = ("op", "samples", "channels", "height", "width", "classes", "dtype", "layout", "criterion", "exit_rate")
SETTING = ("network", "batch_size", "setting")
LATENCY = ("model", "setting", "most")
RESIDENT, COMPACT, PER_STAGE = "eefast resident", "eefast compact", "ONNX Runtime per stage"
AUTO = "eefast call"
"""As it is by default, with `engine="auto"`."""
COMPILED = "plain, torch.compile"
RESIDENT_INT8, OPENVINO_INT8 = "eefast resident, int8", "plain, OpenVINO int8"
OTHER_WORK = ("fewer blocks", "earlyon")
"""Another network, and one whose batches exit together or not at all: not compared with eefast."""
NO_EXITS, OWN_THRESHOLDS = "no exits", "own thresholds"
ORDER = (
    *("plain, eager", "plain, eager, memory kept", "plain, torch.compile", "plain, ONNX Runtime", "plain, OpenVINO"),
    *("plain, ONNX Runtime int8", OPENVINO_INT8),
    *("plain, eager NCHW", "plain, OpenVINO bfloat16", "fewer blocks, ONNX Runtime", "reference, one by one"),
    *("masked, PyTorch", "earlyon, batched", "masked, PyTorch folded", "masked, PyTorch folded, memory kept"),
    *(f"BatchCond, {mode}" for mode in ("padding", "splitting", "table")),
    *(f"torch.compile {how}" for how in ("on the loop", "per stage", "full graph")),
    *(PER_STAGE, "ONNX Runtime per stage, shared threads", "OpenVINO per stage"),
    *("ONNX Runtime per stage, int8", "OpenVINO per stage, int8"),
    *("ONNX Runtime, one graph", "OpenVINO, one graph", COMPACT, "eefast compact, memory kept", RESIDENT),
    *("eefast resident, bfloat16", "eefast resident, avx2", "eefast resident, direct", RESIDENT_INT8),
    "eefast call, int8",
)
"""Of the ways in a table, eefast's last."""

Cases = dict[tuple[Any, ...], dict[str, Record]]
"""(network, batch size, setting) → way → row."""


def in_one_thread(row: Record) -> bool:
    """On a CPU; such rows are beside those of several threads, not in their place."""
    around = row["environment"]
    return not around.get("cuda") and around.get("threads") == 1


def on_backbone(row: Record) -> bool:
    """Of a network of torchvision or timm, see `workloads.on_backbones`."""
    return ":" in row.get("network", "")


def newest(rows: Iterable[Record], key: Sequence[str]) -> list[Record]:
    """The last row of each measurement."""
    return list({tuple(str(row.get(name)) for name in key): row for row in rows}.values())


def newest_networks(rows: Iterable[Record]) -> list[Record]:
    """Of each network, batch size, way and setting; a retrained network has another mix of exits in the same one."""
    found: dict[tuple[str, ...], Record] = {}
    for row in (row for row in rows if "network" in row):
        setting = row["setting"] or str(row["mix"])
        found[row["network"], str(row["batch_size"]), row["dtype"], setting, row["provider"]] = row
    return list(found.values())


def measured_networks(rows: Iterable[Record]) -> list[Record]:
    """The newest row of each way, network, batch size and setting that was timed."""
    measured = [row for row in newest_networks(rows) if row["images_per_s"]]
    # The first rows of a network were made before there were other runtimes than PyTorch; later ones replace them.
    later = {row["network"] for row in measured if row["setting"]}
    return [row for row in measured if row["setting"] or row["network"] not in later]


def cases_of(rows: Sequence[Record]) -> Cases:
    """Where rows only name a mix of exits, its mean cost is the setting."""
    costed = [row for row in rows if not row["setting"] and row["mean_cost"] not in (None, 1)]
    # A mix in a few images costs a little more or less than in many.
    costs = {_mix(row): row["mean_cost"] for row in sorted(costed, key=lambda row: row["batch_size"])}
    cases: Cases = {}
    for row in rows:
        named = {**row, "setting": row["setting"] or _setting(row, costs.get(_mix(row)))}
        cases.setdefault(tuple(named[name] for name in SETTING), {})[row["provider"]] = named
    return cases


def _mix(row: Record) -> tuple[str, str]:
    return row["network"], str(row["mix"])


def _setting(row: Record, cost: float | None) -> str:
    return NO_EXITS if row["mix"][-1] == 1 else "some exits" if cost is None else f"cost {cost:.2f}"


def beside(cases: Cases, network: str, batch_size: int, setting: str) -> dict[str, Record]:
    """The ways of a case, and those without exits: some were measured once, where no image exits early."""
    without = cases.get((network, batch_size, NO_EXITS), {})
    return {name: row for name, row in without.items() if name.startswith(STATIC)} | cases[network, batch_size, setting]


def in_int8(cases: Cases, wanted: bool) -> Cases:
    """The ways in eight bits alone, or all others, of the cases that have such."""
    parts = {key: {n: r for n, r in ways.items() if (r["dtype"] == "int8") == wanted} for key, ways in cases.items()}
    return {key: ways for key, ways in parts.items() if ways}


def newest_latency(rows: Iterable[Record]) -> list[Record]:
    """Per network, setting and largest batch all rows of the last run: loads differ a little between runs."""
    served = [row for row in rows if "scenario" in row]
    run = {tuple(row[name] for name in LATENCY): row["environment"]["date"] for row in served}
    last = [row for row in served if row["environment"]["date"] == run[tuple(row[name] for name in LATENCY)]]
    return sorted(last, key=lambda row: (*(row[name] for name in LATENCY), row["scenario"], row["load"] or 0))


def newest_int8(rows: Iterable[Record]) -> list[Record]:
    """Of each trained network, way and origin of its thresholds."""
    return newest((row for row in rows if "quantized" in row), ("quantized", "way", "criterion", "origin"))


def newest_ops(rows: Iterable[Record]) -> list[Record]:
    return newest((row for row in rows if "op" in row), (*CASE, "provider", "timing"))


def op_case(row: Record) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)


def op_name(row: Record) -> str:
    """The shape, and what differs from the usual."""
    shape = f"{row['op']} {row['samples']}×{row['channels']}×{row['height']}×{row['width']}"
    unusual = [row["dtype"]]
    unusual += [f"K={row['classes']}"] if row["classes"] != 10 and row["op"] != "compact" else []
    unusual += [row["layout"]] if row["layout"] != "channels_last" else []
    unusual += [row["criterion"]] if row["criterion"] != "learned" else []
    unusual += [f"exit rate {row['exit_rate']}"] if row["exit_rate"] != 0.5 else []
    return " ".join([shape, *unusual])


def speed(row: Record) -> float:
    """Median images/s."""
    return float(row["images_per_s"][1])
