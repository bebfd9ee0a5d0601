"""Answers as JSON, whose numbers are finite."""

import json

import pytest

from eefast.serving import Answer


@pytest.mark.parametrize(("confidence", "shown"), [(0.5, 0.5), (float("nan"), None), (float("inf"), None)])
def test_figures_are_json(confidence, shown):
    figures = Answer(1, None, 2, confidence, 0.25, 0.0012344, 0.5, True).figures(("cat", "dog"))
    assert json.loads(json.dumps(figures, allow_nan=False)) == {
        "label": 1, "class": "dog", "exit": 2, "confidence": shown, "cost": 0.25, "late": True, "waited_ms": 1.234,
        "computed_ms": 500.0,
    }  # fmt: skip


def test_without_names_of_classes_there_is_none():
    assert Answer(1, None, 0, 0.5, 0.25, 0.0, 0.0, False).figures()["class"] is None
