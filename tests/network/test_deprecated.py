"""Names of version 0.1: they still work, and a warning at the user's line says what replaced them."""

import re
import warnings

import pytest
import torch
from networks import images, lived_in
from packaging.version import Version

import eefast
from eefast.deprecated import UNTIL, renamed_arguments
from eefast.planning import planner

SHAPE = (3, 12, 12)


def said(old, new):
    words = f"{old} is deprecated and will be gone in eefast {UNTIL}; use {new}"
    return pytest.warns(DeprecationWarning, match=re.escape(words))


def test_arguments_of_accelerate(monkeypatch):
    net, given = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE), 1), []
    build = planner.build
    monkeypatch.setattr("eefast.api.build", lambda net, options: given.append(options) or build(net, options))
    x = images(5, SHAPE)
    with said("accelerate(example=)", "example_inputs="), said("accelerate(max_batch=)", "max_batch_size=") as told:
        eefast.accelerate(net, engine="reference", example=x, max_batch=7)
    assert torch.equal(given[0].example_inputs, x)
    assert given[0].max_batch_size == 7
    assert {warning.filename for warning in told} == {__file__}
    with pytest.raises(
        TypeError, match=r"accelerate got max_batch_size= and max_batch=, its old name; leave max_batch= "
    ):
        eefast.accelerate(net, max_batch=7, max_batch_size=7)


def test_names_of_the_zoo():
    with said("eefast.zoo.NAMES", "eefast.zoo.names()") as told:
        assert list(eefast.zoo.NAMES) == eefast.zoo.names()
    assert told[0].filename == __file__
    with said("eefast.zoo.PLACEMENTS", "the names themselves"):
        assert set(eefast.zoo.PLACEMENTS) == {"fine", "pareto", "linear", "gold_ratio"}
    with pytest.raises(AttributeError, match=r"module 'eefast\.zoo' has no attribute 'MORE'"):
        _ = eefast.zoo.MORE


def test_new_names_warn_of_nothing_and_others_are_refused():
    @renamed_arguments(old="new")
    def twice(new=1):
        """Doubles."""
        return 2 * new

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (twice(), twice(3), twice(new=4), twice.__doc__) == (2, 6, 8, "Doubles.")
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            twice(other=1)
        with pytest.raises(DeprecationWarning):
            twice(old=1)


def test_they_are_gone_in_time():
    """Fails in the version that promises to have none."""
    assert Version(eefast.__version__) < Version(UNTIL)
