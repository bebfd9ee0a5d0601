"""A folder of images, train/<class>/ and val/<class>/ → a trained network in runs/folder, which answers new files."""

from pathlib import Path

import numpy as np
from PIL import Image

import eefast
from eefast.train.options import TrainOptions
from eefast.train.run import train


def make_images(root):
    """Coloured noise: put your own photographs here."""
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 10)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 160, (20, 24, 3), dtype=np.uint8)
                pixels[:, :, 2 - channel] += 90
                Image.fromarray(pixels).save(folder / f"{i}.png")


if __name__ == "__main__":
    make_images(Path("photos"))
    report = train(
        TrainOptions(
            dataset="folder",
            data_root="photos",
            image_size=16,
            net="eenet8",
            num_exits=2,
            epochs=3,
            batch_size=16,
            max_accuracy_drop=0.05,
            output="runs/folder",
            test=True,
        )
    )
    print(f"accuracy of the final exit on held-out images {report.exit_accuracy[-1]:.3f}")
    for answer in eefast.predict("runs/folder", ["photos/val/red/0.png", "photos/val/blue/0.png"]):
        print(f"{Path(answer.image).parent.name}: {answer.name}, exit {answer.exit}, cost {answer.cost:.3f}")
