"""The manifest: complete, exact, and refused with the files that it does not belong to."""

import json
import shutil

import pytest
import torch

import eefast
from eefast import ops
from eefast.exporting import manifest
from eefast.exporting.exported import load_exported
from eefast.exporting.manifest import MANIFEST


def test_what_a_program_needs_is_in_it(net, folder):
    known = json.loads((folder / MANIFEST).read_text())
    assert torch.equal(torch.tensor(known["thresholds"]), net.thresholds)
    assert torch.equal(torch.tensor(known["cost"]), net.cost)
    assert known["normalization"] == [[0.5] * 3, [0.3] * 3]
    assert (known["criterion"], known["comparison"], known["rule"]) == ("learned", ">", None)
    assert (known["input_shape"], known["num_classes"], known["classes"]) == ([3, 12, 12], 10, None)
    assert [file["name"] for file in known["files"]] == ["stage0.pt2", "stage1.pt2", "stage2.pt2"]


def test_texts_for_programs_in_cpp_are_exact(net):
    made = net.with_criterion("entropy", [float("-inf"), 1 / 3])
    texts = manifest.as_texts(manifest.describe(made, "aoti"))
    assert torch.equal(torch.tensor(list(map(float, texts["thresholds"].split()))), made.thresholds)
    assert texts["input_shape"] == "3 12 12"
    assert texts["instruction_set_op"] == "eefast::instruction_set"
    assert texts["instruction_set"] == ops.instruction_set()


def test_int8_asks_for_its_own_instructions(net):
    made = eefast.quantize(net, torch.randn(16, 3, 12, 12))
    assert manifest.describe(made, "aoti")["instruction_set"] == [
        "eefast::int8_instruction_set",
        ops.int8_instruction_set(),
    ]


@pytest.mark.parametrize("damage", ["file", "missing", "manifest", "format", "instructions"])
def test_what_was_not_exported_is_refused(folder, tmp_path, damage):
    folder = shutil.copytree(folder, tmp_path / "out")
    known = json.loads((folder / MANIFEST).read_text())
    if damage == "file":
        (folder / "stage1.pt2").write_bytes(b"else")
    elif damage == "missing":
        (folder / "stage1.pt2").unlink()
    elif damage == "manifest":
        (folder / MANIFEST).unlink()
    elif damage == "format":
        (folder / MANIFEST).write_text(json.dumps({**known, "format": 2}))
    else:
        known["instruction_set"] = ["eefast::instruction_set", "another"]
        (folder / MANIFEST).write_text(json.dumps(known))
    words = {
        "manifest": "has no readable manifest.json",
        "format": "says format=2",
        "instructions": "was exported for another, and this process uses",
    }
    with pytest.raises(ValueError, match=words.get(damage, r"stage1\.pt2 is missing or is not the file")):
        load_exported(folder)
