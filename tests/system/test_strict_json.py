"""JSON without numbers that JSON does not have."""

import json
from math import inf, nan

import pytest

from eefast.system.strict_json import json_text


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_json_lacks_are_texts() -> None:
    text = json_text({"thresholds": [inf, -inf, 0.5], "rows": ({"loss": nan, "name": "inf"}, None, True, 3)})
    found = json.loads(text, parse_constant=refuse)
    assert found == {"thresholds": ["inf", "-inf", 0.5], "rows": [{"loss": "nan", "name": "inf"}, None, True, 3]}
    assert [float(value) for value in found["thresholds"]] == [inf, -inf, 0.5]
    assert text.endswith("}\n")


def test_other_values_are_refused() -> None:
    with pytest.raises(TypeError):
        json_text({"set": {1}})
