"""Fields of JSON objects: exactly those of a schema, each with a value that its check takes."""

import re

import numpy as np
import pytest

from eefast.checkpoint import fields

SCHEMA = {"size": (fields.is_int, "a size"), "name": (lambda v: isinstance(v, str), "a name")}


def test_fields_that_fit_pass():
    fields.check_fields({"name": "a", "size": 3}, SCHEMA, "x.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "a"}, "x.json lacks 'size'"),
        ({"name": "a", "size": 3, "more": 1}, "x.json has the unknown key 'more'"),
        ({"name": "a", "other": 3}, "x.json has the unknown key 'other', lacks 'size'"),
        ({"name": "a", "size": 0}, "x.json says size=0; it must be a size"),
        ({"name": None, "size": 3}, "x.json says name=None; it must be a name"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_other_fields_are_named(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fields.check_fields(config, SCHEMA, "x.json")


def test_messages_stay_short():
    with pytest.raises(ValueError, match="says name=") as raised:
        fields.check_fields({"name": [*range(10**5)], "size": 3}, SCHEMA, "x.json")
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (65_535, True), (0, False), (65_536, False), (True, False), (1.0, False), ("1", False), (None, False)],
)
def test_is_int(value, expected):
    assert fields.is_int(value) is expected


def test_is_int_takes_other_limits():
    assert fields.is_int(0, least=0)
    assert fields.is_int(10**6, 10**6)
    assert not fields.is_int(10**6 + 1, 10**6)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2, 3], True),
        ((1, 2, 3), True),
        ([1, 65_535, 32_768], True),
        ([1, 65_535, 65_535], False),
        ([1, 2], False),
        ([1, 2, 0], False),
        ([1, 2, 3.0], False),
        ("123", False),
        (None, False),
    ],
)
def test_is_shape(value, expected):
    assert fields.is_shape(value) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, True),
        (-1.5, True),
        (3.4e38, True),
        (3.5e38, False),
        (10**400, False),
        (float("inf"), False),
        (float("nan"), False),
        (True, False),
        ("1", False),
        (np.float64(1), False),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_is_number(value, expected):
    assert fields.is_number(value) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, True),
        ([[0.5], [2]], True),
        (((0, -1), (1, 0.1)), True),
        ([[0.5], [0.0]], False),
        ([[0.5], [-1.0]], False),
        ([[0.5], [float("nan")]], False),
        ([[0.5]], False),
        ([0.5, 2.0], False),
        ({}, False),
    ],
)
def test_is_normalization(value, expected):
    assert fields.is_normalization(value) is expected


@pytest.mark.parametrize("normalization", [None, [[0.5] * 3, [1.0] * 3]])
def test_a_normalization_that_fits_the_channels_passes(normalization):
    fields.check_channels(normalization, (3, 8, 8))


@pytest.mark.parametrize(("means", "deviations"), [(1, 1), (3, 1), (1, 3)])
def test_a_normalization_of_other_channels_is_refused(means, deviations):
    message = f"normalization has {means} means and {deviations} deviations, but images have 3 channels"
    with pytest.raises(ValueError, match=message):
        fields.check_channels([[0.5] * means, [1.0] * deviations], (3, 8, 8))
