"""Packed weights, read back in the order of the kernels, by loops and matrices written for the tests."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eefast.planning import weight_order

# Lavin & Gray 2015: the transforms of the input and of the output, Bᵀ and Aᵀ.
INPUT = {
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
OUTPUT = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}


class Reader:
    """Takes numbers from the front of a packed vector."""

    def __init__(self, packed: torch.Tensor) -> None:
        assert packed.dtype == torch.float32
        self.rest = packed

    def take(self, *shape: int) -> np.ndarray:
        n = int(np.prod(shape))
        found, self.rest = self.rest[:n], self.rest[n:]
        return found.double().numpy().reshape(shape)

    def take_pairs(self, width: int) -> np.ndarray:
        """[2, width]: two bfloat16 numbers from each place of a float32."""
        found, self.rest = self.rest[:width], self.rest[width:]
        return found.contiguous().view(torch.bfloat16).double().numpy().reshape(width, 2).T


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def expected(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """[H, W, O] of the valid convolution of x [C, H, W], in float64."""
    return F.conv2d(x[None].double(), weight.double(), bias.double())[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("outputs", [1, 16, 20, 40, 64])
def test_direct(outputs: int, kernel: int, planes: bool, bfloat16: bool) -> None:
    for inputs in (1, 3, 16, 17, 35):
        weight, bias, x = random(outputs, inputs, kernel, kernel), random(outputs), random(inputs, kernel, kernel)
        reader = Reader(weight_order.convolution(weight, bias, 0, planes, bfloat16))
        padded = -(-outputs // 16) * 16
        width = 32 if padded % 32 == 0 else 16
        sums = reader.take(padded)
        block = 1 if planes else 16
        for group, begin in product(range(padded // width), range(0, inputs, block)):
            group_sums = sums[group * width : (group + 1) * width]
            for i, j in product(range(kernel), range(kernel)):
                pixels = x[begin : begin + block, i, j].double().numpy()
                if bfloat16 and not planes:
                    for pair in range(0, len(pixels), 2):
                        group_sums += np.resize([*pixels[pair : pair + 2], 0], 2) @ reader.take_pairs(width)
                else:
                    group_sums += pixels @ reader.take(len(pixels), width)
        assert len(reader.rest) == 0
        assert (sums[outputs:] == 0).all()
        rounded = weight.bfloat16() if bfloat16 and not planes else weight
        wanted = expected(rounded, bias, x)[0, 0]
        np.testing.assert_allclose(sums[:outputs], wanted, atol=1e-10, err_msg=f"{inputs} inputs")


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("outputs", [1, 16, 20, 48, 64, 130])
def test_winograd(outputs: int, side: int) -> None:
    """One tile: Aᵀ [(weights) ⊙ (Bᵀ d B)] A."""
    before, after = np.array(INPUT[side], dtype=float), np.array(OUTPUT[side], dtype=float)
    for inputs in (1, 16, 19):
        weight, bias, x = random(outputs, inputs, 3, 3), random(outputs), random(inputs, side + 2, side + 2)
        reader = Reader(weight_order.convolution(weight, bias, side, False, False))
        padded = -(-outputs // 16) * 16
        width = 64 if padded % 64 == 0 else 32 if padded % 32 == 0 else 16
        biases = reader.take(padded)
        weights = reader.take(side + 2, side + 2, padded // width, inputs, width)
        assert len(reader.rest) == 0
        tile = np.einsum("ay,cyx,bx->cab", before, x.double().numpy(), before)
        product_ = np.einsum("cab,abgcw->abgw", tile, weights).reshape(side + 2, side + 2, padded)
        found = np.einsum("ya,abo,xb->yxo", after, product_, after) + biases
        assert (found[..., outputs:] == 0).all()
        wanted = expected(weight, bias, x)
        np.testing.assert_allclose(found[..., :outputs], wanted, atol=1e-4, err_msg=f"{inputs} inputs")


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 19), (16, 16), (48, 1), (130, 17)])
def test_winograd_of_rows(outputs: int, inputs: int, side: int) -> None:
    """One tile: [(weights) ⊙ (d B)] A."""
    before, after = np.array(INPUT[side], dtype=float), np.array(OUTPUT[side], dtype=float)
    weight, bias, x = random(outputs, inputs, 1, 3), random(outputs), random(inputs, 1, side + 2)
    reader = Reader(weight_order.convolution(weight, bias, side, False, False))
    padded = -(-outputs // 16) * 16
    biases, weights = reader.take(padded), reader.take(padded // 16, inputs, side + 2, 16)
    assert len(reader.rest) == 0
    tile = np.einsum("ax,cx->ca", before, x.double().numpy()[:, 0])
    found = np.einsum("xa,ao->xo", after, np.einsum("ca,gcaw->agw", tile, weights).reshape(side + 2, padded)) + biases
    assert (found[:, outputs:] == 0).all()
    np.testing.assert_allclose(found[:, :outputs], expected(weight, bias, x)[0], atol=1e-4)


class Int8Reader(Reader):
    """Takes numbers of several types from the places of float32 ones."""

    def take_as(self, dtype: torch.dtype, *shape: int) -> np.ndarray:
        n = int(np.prod(shape)) * dtype.itemsize // 4
        found, self.rest = self.rest[:n], self.rest[n:]
        return found.clone().view(dtype).numpy().reshape(shape).astype(np.int64)


def random_int8(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


SIZES = list(product((1, 16, 17, 33, 65), (1, 3, 4, 5, 17)))


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_int8_direct(kernel: int, outputs: int, inputs: int) -> None:
    """Pixel by pixel, four inputs at a time, as the kernel multiplies."""
    weight, bias = random_int8(outputs, inputs, kernel, kernel), 1000 * random_int8(1, outputs).int().expand(2, -1)
    x = random_int8(inputs, kernel, kernel).numpy().astype(np.int64)
    scale, padded, fours = random(outputs).abs(), -(-outputs // 16) * 16, -(-inputs // 4)
    reader = Int8Reader(weight_order.int8_convolution(weight, bias, scale, torch.tensor(0.75), 0))
    sums, second = reader.take_as(torch.int32, 2, padded)
    scales, ratio = reader.take(padded), reader.take(16)
    width = 32 if padded % 32 == 0 else 16
    pixels = np.zeros((4 * fours, kernel, kernel), dtype=np.int64)
    pixels[:inputs] = x
    for group, y, four, i in product(range(padded // width), range(kernel), range(fours), range(kernel)):
        for begin in range(0, width, 16):
            rows = reader.take_as(torch.int8, 16, 4)
            at = group * width + begin
            sums[at : at + 16] += rows @ pixels[4 * four : 4 * four + 4, y, i]
    assert len(reader.rest) == 0
    assert (sums[outputs:] == 0).all()
    assert (second == 0).all()
    wanted = bias[0].numpy() + (weight.numpy().astype(np.int64) * x).sum((1, 2, 3))
    np.testing.assert_array_equal(sums[:outputs], wanted)
    np.testing.assert_array_equal(scales, F.pad(scale, (0, padded - outputs)).double().numpy())
    np.testing.assert_array_equal(ratio, [0.75] + [0] * 15)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_int8_winograd(outputs: int, inputs: int) -> None:
    """A tile of two outputs: their half sum and half difference from frequencies 1 and 2, then 0 and 3 on top."""
    weight, even = random_int8(outputs, inputs, 3, 4), 1000 * random_int8(outputs).int()
    bias = torch.stack([even, even + 2 * random_int8(outputs).int()])
    v = random_int8(inputs, 3, 4).numpy().astype(np.int64)
    padded, fours = -(-outputs // 16) * 16, -(-inputs // 4)
    reader = Int8Reader(weight_order.int8_convolution(weight, bias, random(outputs), torch.tensor(0.0), 1))
    half_sum, half_difference = reader.take_as(torch.int32, 2, padded)
    reader.take(padded + 16)
    width = 32 if padded % 32 == 0 else 16
    values = np.zeros((4 * fours, 3, 4), dtype=np.int64)
    values[:inputs] = v
    products = np.zeros((4, padded), dtype=np.int64)
    for group, phase, four in product(range(padded // width), ((1, 2), (0, 3)), range(fours)):
        for frequency, y, begin in product(phase, range(3), range(0, width, 16)):
            at = group * width + begin
            rows = reader.take_as(torch.int8, 16, 4)
            products[frequency, at : at + 16] += rows @ values[4 * four : 4 * four + 4, y, frequency]
    assert len(reader.rest) == 0
    p, q = half_sum + products[1], half_difference + products[2]
    found = np.stack([p - q + products[0], p + q + products[3]])
    assert (found[:, outputs:] == 0).all()
    m = np.einsum("ocyk,cyk->ko", weight.numpy().astype(np.int64), v)
    wanted = bias.numpy() + np.stack([m[0] + m[1] - m[2], m[1] + m[2] + m[3]])
    np.testing.assert_array_equal(found[:, :outputs], wanted)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_int8_winograd_2d(outputs: int, inputs: int) -> None:
    """A tile of 2×2 outputs: for even, then odd columns their half sum and half difference of the two rows."""
    weight, first = random_int8(outputs, inputs, 4, 4), 1000 * random_int8(2, outputs).int()
    bias = torch.cat([first, first + 2 * random_int8(2, outputs).int()])  # [4, O]: rows 0 and 2, 1 and 3 of one parity
    w = random_int8(inputs, 4, 4).numpy().astype(np.int64)
    padded, fours = -(-outputs // 16) * 16, -(-inputs // 4)
    scale = random(outputs)
    reader = Int8Reader(weight_order.int8_convolution(weight, bias, scale, torch.tensor(0.5), 2))
    even_sum, even_difference, odd_sum, odd_difference = reader.take_as(torch.int32, 4, padded)
    np.testing.assert_array_equal(reader.take(padded)[:outputs], scale.double().numpy())
    np.testing.assert_array_equal(reader.take(16), [0.5] + [0] * 15)
    width = 32 if padded % 32 == 0 else 16
    values = np.zeros((4 * fours, 4, 4), dtype=np.int64)
    values[:inputs] = w
    products = np.zeros((4, 4, padded), dtype=np.int64)  # [along y, along x]
    for group, x, y, four in product(range(padded // width), (1, 2, 0, 3), (1, 2, 0, 3), range(fours)):
        for begin in range(0, width, 16):
            at = group * width + begin
            rows = reader.take_as(torch.int8, 16, 4)
            products[y, x, at : at + 16] += rows @ values[4 * four : 4 * four + 4, y, x]
    assert len(reader.rest) == 0
    of_x = [products[:, 0] + products[:, 1] - products[:, 2], products[:, 1] + products[:, 2] + products[:, 3]]
    m = np.einsum("ocyx,cyx->yxo", weight.numpy().astype(np.int64), w)
    of_y = [m[0] + m[1] - m[2], m[1] + m[2] + m[3]]
    for column, start in enumerate(((even_sum, even_difference), (odd_sum, odd_difference))):
        p, q = start[0] + of_x[column][1], start[1] + of_x[column][2]
        for row, found in enumerate((p - q + of_x[column][0], p + q + of_x[column][3])):
            v = of_y[row]
            wanted = bias[2 * row + column].numpy() + (v[1] + v[2] + v[3] if column else v[0] + v[1] - v[2])
            np.testing.assert_array_equal(found[:outputs], wanted)
            assert (found[outputs:] == 0).all()


@pytest.mark.parametrize("channels", [1, 16, 20])
def test_affine(channels: int) -> None:
    scale, shift = random(channels), random(channels) + 1
    reader = Reader(weight_order.affine(scale, shift))
    padded = -(-channels // 16) * 16
    for wanted in (shift, scale):
        np.testing.assert_array_equal(reader.take(padded), F.pad(wanted, (0, padded - channels)).double().numpy())
    assert len(reader.rest) == 0


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("channels", [2, 16, 20])
def test_depthwise_convolution(channels: int, kernel: int) -> None:
    weight, bias = random(channels, 1, kernel, kernel), random(channels)
    reader = Reader(weight_order.grouped(weight, bias, channels, channels, False))
    blocks = -(-channels // 16)
    np.testing.assert_array_equal(reader.take(blocks * 16)[:channels], bias.double().numpy())
    taps = reader.take(blocks, kernel, kernel, 16).transpose(0, 3, 1, 2).reshape(-1, kernel, kernel)
    np.testing.assert_array_equal(taps[:channels], weight[:, 0].double().numpy())
    assert (taps[channels:] == 0).all()
    assert len(reader.rest) == 0


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("groups", [2, 5])
def test_narrow_groups(n: int, groups: int) -> None:
    weight, bias = random(groups * n, n, 3, 3), random(groups * n)
    reader = Reader(weight_order.grouped(weight, bias, groups * n, groups, False))
    blocks = -(-groups * n // 16)
    np.testing.assert_array_equal(reader.take(blocks * 16)[: groups * n], bias.double().numpy())
    found = reader.take(blocks, 3, 3, n, 16).transpose(0, 4, 3, 1, 2).reshape(-1, n, 3, 3)
    np.testing.assert_array_equal(found[: groups * n], weight.double().numpy())
    assert (found[groups * n :] == 0).all()
    assert len(reader.rest) == 0


@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "width"),
    [(8, 4, 8, 16), (4, 16, 16, 16), (2, 32, 32, 32), (3, 24, 24, 16), (3, 5, 7, 16), (2, 40, 32, 32), (2, 3, 96, 32)],
)
def test_grouped_convolution(groups: int, inputs: int, outputs: int, width: int) -> None:
    """Unit after unit as a dense convolution of the blocks that its groups read."""
    weight, bias = random(groups * outputs, inputs, 2, 2), random(groups * outputs)
    x = random(groups * inputs, 3, 4)
    wanted = F.conv2d(x[None].double(), weight.double(), bias.double(), groups=groups)[0].numpy()
    reader = Reader(weight_order.grouped(weight, bias, groups * inputs, groups, False))
    total = -(-groups * outputs // 16) * 16
    sums = reader.take(total)[:, None, None] + np.zeros((1, *wanted.shape[1:]))
    for first in range(0, total, width):
        last = min(first + width, groups * outputs) - 1
        begin, end = first // outputs * inputs // 16 * 16, (last // outputs + 1) * inputs
        for block in range(begin, end, 16):
            for i, j, c in product(range(2), range(2), range(block, min(block + 16, end))):
                row = reader.take(width)
                sums[first : first + width] += row[:, None, None] * x[c, i : i + 2, j : j + 3].double().numpy()
    assert len(reader.rest) == 0
    np.testing.assert_allclose(sums[: groups * outputs], wanted, atol=1e-5)
    assert (sums[groups * outputs :] == 0).all()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("classes", [1, 10, 15, 16, 1000])
def test_exit_rows(classes: int, flatten: bool) -> None:
    height, width = (3, 2) if flatten else (1, 1)
    for channels in (1, 16, 20):
        weight = random(classes + 1, channels, height, width)
        bias, x = random(classes + 1), random(channels, height, width)
        packed = weight_order.exit_rows(weight if flatten else weight[:, :, 0, 0], bias)
        reader, rows = Reader(packed), -(-(classes + 1) // 16) * 16
        sums = reader.take(rows)
        for first in range(0, rows, 16):
            for begin, i, j, c in product(range(0, channels, 16), range(height), range(width), range(16)):
                row = reader.take(16)
                if begin + c < channels:
                    sums[first : first + 16] += float(x[begin + c, i, j]) * row
                else:
                    assert (row == 0).all()
        assert len(reader.rest) == 0
        assert (sums[classes + 1 :] == 0).all()
        wanted = weight.double().flatten(1) @ x.double().flatten() + bias.double()
        np.testing.assert_allclose(sums[: classes + 1], wanted.numpy(), atol=1e-5, err_msg=f"{channels} channels")
