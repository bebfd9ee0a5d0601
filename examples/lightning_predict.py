"""An accelerated network as the `predict_step` of a LightningModule → labels and exits of a data set."""

from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader

import eefast
from eefast.data.mnist import mnist_test

SHIPPED = Path(eefast.__file__).parent / "assets/eenet-mnist"


class Predictor(lightning.LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.fast = eefast.accelerate(eefast.load(folder), frozen=True)

    def predict_step(self, images, index):
        result = self.fast(images)
        return torch.stack([result.labels, result.exit_index])


if __name__ == "__main__":
    images, labels = mnist_test()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batches = trainer.predict(Predictor(SHIPPED), DataLoader(images[:1000], batch_size=250))
    found, exits = torch.cat(batches, dim=1)
    print(f"accuracy {(found == labels[:1000]).float().mean():.3f}, images per exit {exits.bincount().tolist()}")
