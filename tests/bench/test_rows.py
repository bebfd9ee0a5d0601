"""Rows as they are written and read, those of before included."""

import json
import re
from dataclasses import asdict

import rows
from rows import NetworkRow
from shown_rows import ON_A_GPU, row_of, shown
from summary import show


def test_rows_come_back_and_old_ones_still_read(tmp_path):
    row = row_of("eefast compact", 2000.0, host_waits=2, launch_gaps=0.125, peak_memory=7, joules_per_image=0.5)
    back = json.loads(json.dumps(asdict(row)))
    assert NetworkRow(**{name: tuple(v) if isinstance(v, list) else v for name, v in back.items()}) == row
    assert re.search(r"eefast compact +\| +2,000 +\| +\| +0\.400 +\| +\| +2 +\| +12%", shown(row))
    del back["host_waits"], back["launch_gaps"], back["peak_memory"], back["joules_per_image"]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**back, "environment": ON_A_GPU}))
    old = show(rows.read([file]))
    assert re.search(r"eefast compact +\| +2,000 +\| +\| +0\.400 [ |]+$", old, re.MULTILINE)
    assert NetworkRow(**back).host_waits is NetworkRow(**back).joules_per_image is None
