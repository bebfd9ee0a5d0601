"""Weights that have seen the images which a run would hold out are refused, before anything is written."""

from pathlib import Path

import pytest
from training_runs import trained

from eefast import zoo
from eefast.data import datasets


def test_held_out_images_are_not_those_that_given_weights_have_seen(small_mnist: Path, tmp_path: Path) -> None:
    net = zoo.eenet("eenet8", 2, input_shape=(1, 28, 28), normalization=((0.1,), (0.3,)))
    images = datasets.dataset("mnist", small_mnist, "train")
    net.record = datasets.record("eenet8", 10, (1, 28, 28), "mnist", images, 300, 3)
    net.save(tmp_path / "first")
    options = {"net": "eenet8", "num_exits": 2, "data_root": small_mnist, "epochs": 1, "output": tmp_path / "run"}
    for weights in (tmp_path / "first", tmp_path / "first" / "model.safetensors"):
        for others in ({"seed": 1, "held_out": 300}, {"seed": 3, "held_out": 301}):
            with pytest.raises(ValueError, match=r"but for 300 by seed 3; now .* give --held-out 300 --seed 3, or add"):
                trained(weights=weights, **others, **options)
    assert not (tmp_path / "run").exists()
    trained(weights=tmp_path / "first", seed=3, held_out=300, **options)
    trained(weights=tmp_path / "first", seed=1, held_out=300, other_data=True, **options)
