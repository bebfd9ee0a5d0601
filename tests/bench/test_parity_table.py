"""The table of parity: the worst of all batch sizes, the newest rows, and what was refused."""

import json
import re
from dataclasses import asdict

import parity_table

# At the end, where none of its modules hides one of the tests'.
import rows


def row_of(engine="compact", batch_size=1, date="2026-11-26", **figures):
    figures = {
        **{"flips": 3, "flip_distances": [0.001, 0.002], "logit_differences": [0.5, 0.25], "other_answers": 1},
        **{"accuracy": 0.9876, "accuracy_change": -0.0002, "mean_cost": 0.25, "cost_change": 0.001, "unsteady": 7},
        **figures,
    }
    row = rows.ParityRow("net", "learned", engine, "float16", batch_size, 10_000, 0.05, **figures)
    return json.loads(json.dumps({**asdict(row), "environment": {"date": date}}))


NOTHING = dict.fromkeys(
    ("flips", "flip_distances", "logit_differences", "other_answers", "accuracy", "mean_cost", "unsteady")
)


def test_a_line_per_way_shows_the_worst_of_its_batch_sizes():
    sizes = [
        row_of(batch_size=1),
        row_of(batch_size=31, flips=4, flip_distances=[0.003, 0.004], accuracy_change=0.0003, accuracy=0.9881),
        row_of(batch_size=256, flips=0, flip_distances=None, logit_differences=[0.75, 0.1]),
    ]
    text = parity_table.table([{"network": "another kind"}, *sizes])
    (line,) = re.findall(r"^\| net .*$", text, re.MULTILINE)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("net", "learned", "compact", "float16", "10,000", "3 / 4 / 0", "3.0e-03, 4.0e-03", "7.5e-01, 2.5e-01"),
        *("1 / 1 / 1", "98.81% (+0.03)", "0.2500 (+0.0010)", "7"),
    ]
    assert "batches of 1 / 31 / 256" in text
    header, rule, *_ = (line for line in text.splitlines() if line.startswith("|"))
    assert header.count("|") == rule.count("|") == line.count("|")
    assert len(header) == len(rule) == len(line)


def test_the_newest_rows_count():
    refused = row_of(batch_size=0, date="2026-11-27", note="refused: not here", **NOTHING)
    skipped = row_of(batch_size=0, date="2026-11-28", note="skipped: no time", **NOTHING)
    wrong = row_of("resident", date="2026-11-27", flips=9, note="WRONG: 9 of them")
    text = parity_table.table([row_of(), row_of("resident"), refused, wrong, skipped])
    assert "compact   |" not in text
    assert "- refused: not here (net, learned, compact, float16)" in text
    assert "- WRONG: 9 of them (net, learned, resident, float16, batch 1)" in text
    assert re.findall(r"resident *\| float16 *\| 10,000 *\| (\d)", text) == ["9"]
    assert "skipped" not in text
    assert "skipped: no time (net, learned, compact, float16)" in parity_table.table([skipped])
    assert parity_table.table([]) == parity_table.table([{"op": "exit_head"}]) == ""
