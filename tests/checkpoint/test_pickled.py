"""What a pickle holds: tensors inside of their storages, and values that say what they are."""

import pytest
import torch

from eefast.checkpoint.pickled import Inert, Name, Storage, Stored, are_sizes, attributes, kind

DATA = bytearray(torch.arange(12, dtype=torch.float32).numpy().tobytes())


def storage() -> Storage:
    """Ten numbers, after two of another storage."""
    made = Storage("0", torch.float32, 10)
    made.place = 8, 40
    return made


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "expected"),
    [
        (0, (2, 3), (3, 1), [[2, 3, 4], [5, 6, 7]]),
        (1, (2, 3), (1, 2), [[3, 5, 7], [4, 6, 8]]),
        (9, (1,), (1,), [11]),
        (9, (), (), 11),
        (0, (2, 2), (0, 0), [[2, 2], [2, 2]]),
        (50, (0, 3), (3, 1), []),
    ],
)
def test_a_tensor_is_read_from_its_place(offset, shape, stride, expected):
    got = Stored(storage(), offset, shape, stride).tensor(DATA)
    assert got.shape == shape
    assert got.tolist() == expected


@pytest.mark.parametrize(("offset", "shape", "stride"), [(10, (1,), (1,)), (0, (11,), (1,)), (5, (2, 2), (4, 1))])
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(offset, shape, stride):
    with pytest.raises(ValueError, match="reaches beyond its storage of 40 bytes"):
        Stored(storage(), offset, shape, stride).tensor(DATA)


def test_a_tensor_in_another_dtype_than_its_storage():
    made = Stored(storage(), 0, (3,), (1,), torch.float64)
    assert made.nbytes == 24
    with pytest.raises(ValueError, match="reaches beyond its storage"):
        Stored(storage(), 0, (6,), (1,), torch.float64).tensor(DATA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0", 0, (1,), (1,)), "without storage or shape"),
        ((storage(), -1, (1,), (1,)), "without storage or shape"),
        ((storage(), 0, [1], (1,)), "without storage or shape"),
        ((storage(), 0, (1,), (1, 1)), "wrong strides"),
        ((storage(), 0, (1,), (-1,)), "wrong strides"),
        ((storage(), 0, (1,), None), "wrong strides"),
    ],
    ids=["no storage", "offset", "list", "rank", "negative", "none"],
)
def test_what_is_no_tensor_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stored(*arguments)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((), True), ((0, 3), True), ((2**47 - 1,), True), ((2**47,), False), ((1,) * 16, True), ((1,) * 17, False),
        ((-1,), False), ((True,), False), ((1.0,), False), ([1], False), (None, False),
    ],
)  # fmt: skip
def test_sizes(value, expected):
    assert are_sizes(value) is expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Stored(storage(), 0, (1,), (1,)), "a Tensor"),
        (Name("a.b"), "the name 'a.b'"),
        (Inert("package.Settings"), "a Settings"),
        (Inert("torch._utils._rebuild_qtensor"), "a Tensor (_rebuild_qtensor)"),
        (3, "a int"),
    ],
    ids=["tensor", "name", "object", "odd tensor", "int"],
)
def test_values_say_what_they_are(value, words):
    assert kind(value) == words


@pytest.mark.parametrize(("state", "expected"), [({"a": 1}, {"a": 1}), (None, {}), ([1], {})])
def test_attributes_of_an_object(state, expected):
    thing = Inert("package.Settings")
    thing.state = state
    assert attributes(thing) == expected
