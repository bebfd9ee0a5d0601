"""Random shifts and flips of training images beside loops over all that they may be."""

import numpy as np
import pytest
import torch

from eefast.train.augment import random_flip, random_shift


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (31, 3, 7, 4), (0, 1, 28, 28)])
def test_random_shift_moves_whole_images(shape: tuple[int, ...]) -> None:
    images = torch.randint(1, 256, shape, dtype=torch.uint8)
    shifted = random_shift(images, 2)
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.uint8
    height, width = shape[2:]
    for image, moved in zip(images.numpy(), shifted.numpy(), strict=True):
        candidates = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                expected = np.zeros_like(image)
                for y in range(height):
                    for x in range(width):
                        if 0 <= y + dy < height and 0 <= x + dx < width:
                            expected[:, y, x] = image[:, y + dy, x + dx]
                candidates.append(expected)
        assert any(np.array_equal(moved, c) for c in candidates)


def test_random_shift_uses_every_offset() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 2] = 9
    torch.manual_seed(0)
    where = random_shift(image.expand(500, 1, 5, 5), 2).flatten(1).argmax(dim=1)
    assert sorted(set(where.tolist())) == list(range(25))


def test_random_flip_mirrors_half_of_the_images() -> None:
    images = torch.randint(256, (257, 3, 5, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    flipped = random_flip(images)
    assert flipped.dtype == torch.uint8
    mirrored = 0
    for image, found in zip(images.numpy(), flipped.numpy(), strict=True):
        is_mirrored = np.array_equal(found, image[:, :, ::-1])
        assert is_mirrored or np.array_equal(found, image)
        mirrored += is_mirrored
    assert 90 < mirrored < 167
    assert random_flip(images[:0]).shape == (0, 3, 5, 4)
