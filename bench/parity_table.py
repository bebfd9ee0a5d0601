"""Rows of parity → their table, Markdown that lines up in a terminal, too, and what was refused or wrong."""

from __future__ import annotations

from collections.abc import Sequence

from rows import Record

from eefast.measure.tables import aligned

TITLES = (
    *("network", "criterion", "engine", "dtype", "images", "flips", "from the threshold", "logits off by"),
    *("other answers", "accuracy", "mean cost", "not the same bits"),
)
LEGEND = """\
Each way beside the float32 network that is asked about one image at a time. *Flips*: images that took another exit, in
batches of {sizes}, as *other answers*: images given another class; all else is the worst of these. *From the
threshold*: median and largest |confidence - threshold| of the flips. *Logits off by*: largest and root mean square,
same exits. In brackets: change of accuracy in percentage points, and of mean cost. *Not the same bits*: images whose
answer depends on batch or position in its last bits."""


def table(rows: Sequence[Record]) -> str:
    """The newest of `rows`, as Markdown; rows of other kinds are left out.

    rows: as `rows.read` gives them, of one machine. Empty without rows of parity.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for one in (one for one in rows if "parity" in one):
        groups.setdefault(_key(one), []).append(one)
    last = [_last_run(group) for group in groups.values()]
    if not last:
        return ""
    text = aligned(TITLES, [_cells(group) for group in last if group[0]["flips"] is not None])
    notes: dict[str, list[str]] = {}
    for one in (one for group in last for one in group if one["note"]):
        where = ", ".join([*_key(one), *([f"batch {one['batch_size']}"] if one["batch_size"] else [])])
        notes.setdefault(one["note"], []).append(where)
    said = [f"- {note} ({places[0]}{_more(places)})" for note, places in notes.items()]
    sizes = sorted({one["batch_size"] for group in last for one in group if one["batch_size"]})
    legend = LEGEND.format(sizes=" / ".join(map(str, sizes)))
    return "\n".join([legend, "", *text, *([""] if said else []), *said])


def _last_run(group: Sequence[Record]) -> list[Record]:
    """Of one way, in all batch sizes; a run that skipped it says nothing about it, one that it refused does."""
    asked = [one for one in group if not one["note"].startswith("skipped")] or group
    return [one for one in asked if one["environment"]["date"] == asked[-1]["environment"]["date"]]


def _key(row: Record) -> tuple[str, ...]:
    return row["parity"], row["criterion"], row["engine"], row["dtype"]


def _more(places: Sequence[str]) -> str:
    return f" and {len(places) - 1} more" if len(places) > 1 else ""


def _cells(group: Sequence[Record]) -> tuple[str, ...]:
    """One way in all batch sizes."""
    group = sorted(group, key=lambda row: row["batch_size"])

    def worst(name: str) -> Record:
        return max(group, key=lambda row: abs(row[name] or 0))

    def largest(name: str, i: int) -> float | None:
        return max((row[name][i] for row in group if row[name] is not None), default=None)

    def pair(name: str) -> str:
        found = largest(name, 0), largest(name, 1)
        return "" if None in found else "{:.1e}, {:.1e}".format(*found)

    accuracy, cost = worst("accuracy_change"), worst("cost_change")
    change = "" if accuracy["accuracy"] is None else "{:.2%} ({:+.2f})".format(
        accuracy["accuracy"], 100 * accuracy["accuracy_change"]
    )  # fmt: skip
    return (
        *_key(group[0]),
        f"{group[0]['images']:,}",
        " / ".join(str(row["flips"]) for row in group),
        pair("flip_distances"),
        pair("logit_differences"),
        " / ".join(str(row["other_answers"]) for row in group),
        change,
        f"{cost['mean_cost']:.4f} ({cost['cost_change']:+.4f})",
        f"{group[0]['unsteady']:,}",
    )
