"""The arithmetic of quantised maps beside NumPy in 64-bit integers and single float32 operations."""

import numpy as np
import pytest
import torch
from integer_oracle import SIGNS, affine, max_pool, products, requantized, winograd_2d_sums, winograd_sums

from eefast.modules import integer_maps

CHANNELS = [(1, 3), (3, 1), (5, 17), (17, 5), (65, 3)]
SIZES = [(1, 1), (3, 2), (5, 7), (8, 8)]


def random_map(shape, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int64)


def float_map(integers):
    return torch.from_numpy(integers).float()


def same(found, expected):
    assert found.shape == expected.shape
    assert np.array_equal(found.double().numpy(), expected.astype(np.float64))


@pytest.mark.parametrize(("inputs", "outputs"), CHANNELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 1, 2)])
@pytest.mark.sampled(25)
def test_direct_sums(inputs, outputs, size, kernel, stride, padding):
    q = random_map((2, inputs, *size))
    weight = random_map((outputs, inputs, kernel, kernel), 1, -127, 128)
    bias = random_map((outputs,), 2, -(2**22), 2**22)
    fill = random_map((inputs,), 3)
    expected = products(q, weight, stride, padding, fill) + bias.reshape(1, -1, 1, 1)
    arguments = float_map(q), torch.from_numpy(weight).to(torch.int8), torch.from_numpy(bias).int(), stride, padding
    same(integer_maps.convolution_sums(*arguments, fill=float_map(fill)), expected)
    expected = products(q, weight, stride, padding, [7] * inputs) + bias.reshape(1, -1, 1, 1)
    same(integer_maps.convolution_sums(*arguments, fill=7), expected)


@pytest.mark.parametrize(("inputs", "kernel"), [(130, 3), (1100, 1), (2, 25)])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_beyond_two_to_the_24_are_exact(inputs, kernel, sign):
    q = np.full((1, inputs, kernel, kernel), 255, np.int64)
    q[0, 0, 0, 0] = 254
    weight = np.full((3, inputs, kernel, kernel), 127 * sign, np.int64)
    expected = products(q, weight, 1, 0, 0)
    assert abs(expected).min() > 2**24
    same(integer_maps.convolution_sums(float_map(q), torch.from_numpy(weight), torch.zeros(3)), expected)


@pytest.mark.parametrize(("inputs", "outputs"), CHANNELS)
@pytest.mark.parametrize("size", [*SIZES, (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("winograd", [1, 2])
@pytest.mark.sampled(15)
def test_winograd_sums(winograd, inputs, outputs, size):
    q = random_map((2, inputs, *size), 4)
    weight = random_map((outputs, inputs, 2 + winograd, 4), 5, -127, 128)
    bias = random_map((2 * winograd, outputs), 6, -(2**22), 2**22)
    expected = (winograd_sums if winograd == 1 else winograd_2d_sums)(q, weight, bias)
    arguments = float_map(q), torch.from_numpy(weight).to(torch.int8), torch.from_numpy(bias).int()
    same(integer_maps.winograd_sums(*arguments, winograd), expected)


@pytest.mark.parametrize("winograd", [1, 2])
def test_winograd_sums_beyond_two_to_the_24_are_exact(winograd):
    q = np.full((1, 600, 3, 3), 255, np.int64)
    weight = np.full((3, 600, 2 + winograd, 4), 127, np.int64)
    bias = np.arange(6 * winograd).reshape(-1, 3)
    expected = (winograd_sums if winograd == 1 else winograd_2d_sums)(q, weight, bias)
    assert abs(expected).max() > 2**24
    found = integer_maps.winograd_sums(float_map(q), torch.from_numpy(weight), torch.from_numpy(bias), winograd)
    same(found, expected)


@pytest.mark.parametrize("size", [(6, 7), (5, 4)], ids=str)
@pytest.mark.parametrize("winograd", [1, 2])
def test_the_transformed_weight_gives_the_convolution(winograd, size):
    """With exact inputs: twice, or four times, the sum of the transformed products, offsets taken off."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 256, (2, 5, *size), generator=generator).double()
    weight = torch.randn(3, 5, 3, 3, generator=generator, dtype=torch.float64)
    u = integer_maps.winograd_weight(weight, winograd)
    offset = torch.full((4,) * winograd, 127.5, dtype=torch.float64)
    offset[(1,) * winograd] = 0
    v = integer_maps.exact_winograd_inputs(q, winograd) - offset[(...,) + (None,) * 4]
    signs = torch.from_numpy(SIGNS).double()
    if winograd == 1:
        m = torch.stack([torch.nn.functional.conv2d(v[k], u[..., k : k + 1]) for k in range(4)])
        sums = torch.einsum("xb,bnohw->nohwx", signs, m).flatten(3)
    else:
        m = torch.einsum("abnchw,ocab->abnohw", v, u)
        sums = torch.einsum("ya,xb,abnohw->nohywx", signs, signs, m).flatten(4).flatten(2, 3)
    found = 2**winograd * sums[:, :, : size[0], : size[1]]
    torch.testing.assert_close(found, torch.nn.functional.conv2d(q, weight, padding=1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-38, 3e-5, 0.37, 1e30], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_requantized(scale, with_residual):
    sums = random_map((2, 5, 3, 7), 7, -(2**31) + 1, 2**31)
    sums[0, 0] = 0
    scales = (np.random.default_rng(8).uniform(0.5, 1.5, 5) * scale).astype(np.float32)
    residual = random_map((2, 5, 3, 7), 9) if with_residual else None
    ratio = integer_maps.short_mantissa(torch.tensor(1.2345678))
    expected = requantized(sums, scales, residual, ratio.item())
    given = torch.from_numpy(sums).double(), torch.from_numpy(scales)
    more = (float_map(residual), ratio) if with_residual else ()
    same(integer_maps.requantized(*given, *more), expected)


def test_halves_are_rounded_to_even_and_saturated():
    sums = torch.tensor([-3.0, -1, 1, 3, 5, 509, 511, 2**31 - 1]).double().view(1, 1, 1, -1)
    found = integer_maps.requantized(sums, torch.tensor([0.5]))
    assert found.flatten().tolist() == [0, 0, 0, 2, 2, 254, 255, 255]


def test_short_mantissa_makes_products_exact():
    values = torch.tensor([1e-20, 0.1, 1.0, 3.14159265, 65537.0, 1e20])
    short = integer_maps.short_mantissa(values)
    torch.testing.assert_close(short, values, rtol=2.0**-16, atol=0)
    q = torch.arange(256.0)
    assert torch.equal((q * short[:, None]).double(), q.double() * short.double()[:, None])


def test_images():
    x = torch.tensor([[0.0, 1.0, 0.5, -9.0, torch.inf], [-torch.inf, 0.25, 1.0, 2.0, 0.0]]).view(1, 2, 1, 5)
    multiplier, shift = torch.tensor([255.0, 2.0]), torch.tensor([0.0, 3.5])
    found = integer_maps.image_integers(x, multiplier, shift)
    assert found.flatten().tolist() == [0, 255, 128, 0, 255, 0, 4, 6, 8, 4]
    assert integer_maps.image_fill(torch.tensor([-3.0, 2.5, 300.0])).tolist() == [0, 2, 255]
    x = torch.cat([x, x])
    x[1, 1, 0, 3] = torch.nan
    found = integer_maps.image_integers(x, multiplier, shift)
    assert found[1].isnan().all()
    assert not found[0].isnan().any()


def test_affine():
    q = random_map((2, 3, 5, 7), 10)
    scale, shift = torch.tensor([0.5, 1.25, -2.0]), torch.tensor([0.3, -40.7, 260.0])
    same(integer_maps.affine(float_map(q), scale, shift), affine(q, scale.numpy(), shift.numpy()))


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)], ids=str)
def test_max_pool(window):
    q = random_map((2, 3, 5, 7), 11)
    same(integer_maps.max_pool(float_map(q), *window), max_pool(q, *window))


@pytest.mark.parametrize("winograd", [0, 1, 2])
def test_no_sum_exceeds_the_largest(winograd):
    """Of the map that has 255 where a weight has the sign of the sum, and 0 elsewhere: with direct sums the bound."""
    sides = [(3, 3), (3, 4), (4, 4)][winograd]
    weight = torch.from_numpy(random_map((5, 3, *sides), 12, -127, 128))
    bias = torch.from_numpy(random_map((4 if winograd == 2 else 2, 5), 13, -1000, 1000))
    if winograd == 0:
        bias[1] = bias[0]
    bound = integer_maps.largest_sums(weight, bias, winograd)
    if winograd == 1:
        of_columns = [weight[..., :3].abs().sum((1, 2, 3)), weight[..., 1:].abs().sum((1, 2, 3))]
    else:
        of_columns = [weight.abs().sum((1, 2, 3))] * len(bias)
    expected = [255 * magnitude + b.abs() for magnitude, b in zip(of_columns, bias, strict=True)]
    assert bound.tolist() == torch.stack(expected).amax(0).tolist()
