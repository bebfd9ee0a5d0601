"""Images → classes, by what `eefast export NETWORK OUT --format onnx` wrote: run_onnx.py OUT IMAGES.npy."""

# IMAGES: uint8 [N, C, H, W], or float32, normalised. Needs ONNX Runtime and NumPy, neither eefast nor PyTorch.
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder, images = Path(sys.argv[1]), np.load(sys.argv[2])
known = json.loads((folder / "manifest.json").read_text())
names = [file["name"] for file in known["files"] if file["name"] != "single.onnx"]
stages = [onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"]) for name in names]
if images.dtype == np.uint8:
    mean, std = (np.float32(part)[:, None, None] for part in known["normalization"])
    images = (images.astype(np.float32) / np.float32(255) - mean) / std
before, rows = {"x": images}, np.arange(len(images))
classes, exits = np.empty(len(images), np.int64), np.empty(len(images), np.int64)
for i, stage in enumerate(stages):
    logits, confidence, *more = stage.run(None, {value.name: before[value.name] for value in stage.get_inputs()})
    limit = np.float32(float(known["thresholds"][i]) if more else np.nan)
    goes_on = ~(confidence > limit if known["comparison"] == ">" else confidence < limit) & bool(more)
    classes[rows[~goes_on]], exits[rows[~goes_on]] = logits.argmax(1)[~goes_on], i
    rows = rows[goes_on]
    if not len(rows):
        break
    # A rule that carries the answer so far, such as patience, reads all three.
    before = {"x": more[0][goes_on], "logits_before": logits[goes_on], "confidence_before": confidence[goes_on]}
print("\n".join(f"{label} {exit_index}" for label, exit_index in zip(classes, exits, strict=True)))
