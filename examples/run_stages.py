"""Images → classes, by what `eefast export NETWORK OUT --format stages` wrote: run_stages.py OUT IMAGES.npy."""

# IMAGES: uint8 [N, C, H, W], or float32, normalised. Needs PyTorch and NumPy, not eefast.
import json
import sys
from pathlib import Path

import numpy as np
import torch

folder, images = Path(sys.argv[1]), torch.from_numpy(np.load(sys.argv[2]))
known = json.loads((folder / "manifest.json").read_text())
stages = [torch.export.load(folder / file["name"]).module() for file in known["files"]]
if images.dtype == torch.uint8:
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in known["normalization"])
    images = (images / 255 - mean) / std
before, rows = [images], torch.arange(len(images))
classes, exits = torch.empty(len(images), dtype=torch.int64), torch.empty(len(images), dtype=torch.int64)
for i, stage in enumerate(stages):
    logits, confidence, *more = stage(*before)
    limit = torch.tensor(float(known["thresholds"][i]) if more else torch.nan)
    goes_on = ~(confidence > limit if known["comparison"] == ">" else confidence < limit) & bool(more)
    classes[rows[~goes_on]], exits[rows[~goes_on]] = logits.argmax(1)[~goes_on], i
    rows = rows[goes_on]
    if not len(rows):
        break
    # A rule that carries the answer so far, such as patience, reads all three.
    before = [more[0][goes_on], *([logits[goes_on], confidence[goes_on]] if known["rule"] else [])]
print("\n".join(f"{label} {exit_index}" for label, exit_index in zip(classes.tolist(), exits.tolist(), strict=True)))
