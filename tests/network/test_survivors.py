"""Survivors as a value: what fits together, what merges, how far rounded features are off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import eefast
from eefast.survivors import Partial, Survivors


def survivors(count: int = 3, size: int = 7, exits: int = 2, seed: int = 0, **changed: Any) -> Survivors:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {
        "features": torch.randn(count, 5, 4, 3, generator=generator),
        "positions": torch.arange(count) * 2,
        "size": size,
        "exit_index": 0,
        "logits": torch.randn(count, 10, generator=generator),
        "confidence": torch.rand(count, generator=generator),
        "limits": torch.full((exits,), 0.5),
        "criterion": "learned",
        "structure": "0" * 16,
        "weights": "1" * 16,
        "version": eefast.__version__,
        "arithmetic": {"engine": "resident", "device": "cpu"},
    }
    return Survivors(**made | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": torch.tensor([0, 2, 2])}, "positions names a row of the batch twice"),
        ({"positions": torch.tensor([0, 2, 7])}, "positions reach from 0 to 7; expected 0 … 6"),
        ({"positions": torch.tensor([-1, 2, 3])}, "positions reach from -1 to 3"),
        ({"positions": torch.tensor([1, 2])}, r"positions has shape \(2,\) for 3 survivors"),
        ({"positions": torch.arange(3).int()}, "positions is torch.int32; expected torch.int64"),
        ({"confidence": torch.rand(4)}, r"confidence has shape \(4,\)"),
        ({"logits": torch.rand(2, 10)}, r"logits has shape \(2, 10\)"),
        ({"logits": torch.rand(3, 10).double()}, "logits is torch.float64"),
        ({"features": torch.rand(3, 5)}, r"must be \[M, C, H, W\]"),
        ({"limits": torch.rand(2, 4)}, r"limits has shape \(2, 4\) for 3 survivors"),
        ({"exit_index": 2}, "exit_index=2 is no early exit of a network that has 2"),
        ({"exit_index": -1}, "exit_index=-1"),
        ({"rule": torch.rand(2, 9)}, r"rule is torch.float32 of shape \(2, 9\); expected float32 of \(3, 9\)"),
        ({"rule": torch.rand(3, 9).double()}, "rule is torch.float64"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_what_does_not_fit_together_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        survivors(**changed)


def test_it_says_what_it_is_and_cannot_be_changed() -> None:
    made = survivors()
    assert repr(made) == "Survivors(3 of 7 after exit 0, features 5×4×3, resident cpu)"
    assert len(made) == 3
    with pytest.raises(AttributeError):
        made.size = 8  # type: ignore[misc]


def test_merged_positions_count_through_the_batches() -> None:
    a, b, c = survivors(3, 7), survivors(0, 5), survivors(2, 4, seed=1)
    merged = Survivors.merged([a, b, c])
    assert merged.positions.tolist() == [0, 2, 4, 12, 14]
    assert (merged.size, len(merged)) == (16, 5)
    assert torch.equal(merged.features, torch.cat([a.features, c.features]))
    assert torch.equal(merged.limits, a.limits)


def test_merged_thresholds_that_differ_become_those_of_each_sample() -> None:
    a, b = survivors(3, 7), survivors(2, 4, limits=torch.rand(2, 2))
    merged = Survivors.merged([a, b])
    assert torch.equal(merged.limits, torch.cat([torch.full((2, 3), 0.5), b.limits], 1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"exit_index": 1}, "survivors of exit_index=0 and 1 cannot go on together"),
        ({"weights": "2" * 16}, "survivors of weights=1111111111111111 and 2222222222222222"),
        ({"arithmetic": {}}, "survivors of arithmetic="),
        ({"features": torch.rand(3, 5, 4, 2)}, r"survivors with features \(5, 4, 3\) and \(5, 4, 2\)"),
    ],
    ids=["exit", "weights", "arithmetic", "features"],
)
def test_what_cannot_go_on_together_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Survivors.merged([survivors(), survivors(**changed)])


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="several is empty"):
        Survivors.merged([])


@pytest.mark.parametrize("features", ["exact", "float16", "uint8"])
@pytest.mark.parametrize("count", [0, 1, 31])
def test_sent_features_are_off_by_what_is_said(features: str, count: int) -> None:
    made = survivors(count, 99)
    data = made.to_bytes(features)
    back = Survivors.from_bytes(data)
    assert back.features.dtype == torch.float32
    off = float((back.features - made.features).abs().max()) if count else 0.0
    assert back.error == off
    if features == "exact":
        assert off == 0
    if count == 31:
        # A step of uint8 is (largest - smallest) / 255 of a channel; float16 has 11 bits.
        spread = made.features.transpose(0, 1).flatten(1)
        assert (
            off
            <= {"exact": 0, "float16": 2**-11 * 4.5, "uint8": float((spread.amax(1) - spread.amin(1)).max()) / 509}[
                features
            ]
        )
        assert len(data) < {"exact": 10_000, "float16": 6_500, "uint8": 4_600}[features]
    for name in ("positions", "logits", "confidence", "limits"):
        assert torch.equal(getattr(back, name), getattr(made, name))


def test_a_rounded_survivor_keeps_its_error() -> None:
    back = Survivors.from_bytes(survivors().to_bytes("float16"))
    assert Survivors.from_bytes(back.to_bytes()).error == back.error > 0
    assert Survivors.merged([survivors(), back]).error == back.error


@pytest.mark.parametrize(
    ("value", "features", "message"),
    [
        (float("nan"), "uint8", "has infinite numbers or NaN, which uint8 does not keep"),
        (1e5, "float16", "numbers beyond 65504"),
        (1.0, "int4", "features='int4' is unknown; choose one of exact, float16, uint8"),
    ],
)
def test_features_that_a_format_cannot_hold(value: float, features: str, message: str) -> None:
    made = survivors()
    made.features[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match=message):
        made.to_bytes(features)
    assert torch.equal(Survivors.from_bytes(made.to_bytes()).features.nan_to_num(), made.features.nan_to_num())


def test_integers_stay_exact_in_every_format() -> None:
    made = replace(survivors(), features=torch.arange(180, dtype=torch.uint8).view(3, 5, 4, 3))
    for features in ("exact", "float16", "uint8"):
        back = Survivors.from_bytes(made.to_bytes(features))
        assert back.features.dtype == torch.uint8
        assert torch.equal(back.features, made.features)
        assert back.error == 0


def test_the_rest_takes_the_places_of_the_survivors() -> None:
    result = eefast.ExitResult(torch.zeros(5, 3), torch.zeros(5).long(), torch.zeros(5), torch.zeros(5))
    exited = torch.tensor([True, False, True, True, False])
    partial = Partial(result, exited, survivors(2, 5, logits=torch.zeros(2, 3)))
    rest = eefast.ExitResult(torch.ones(2, 3), torch.tensor([1, 2]), torch.tensor([0.5, 0.7]), torch.tensor([0.6, 1.0]))
    whole = partial.finished(rest)
    assert whole.exit_index.tolist() == [0, 1, 0, 0, 2]
    assert whole.logits[:, 0].tolist() == [0, 1, 0, 0, 1]
    assert result.exit_index.tolist() == [0] * 5
    with pytest.raises(ValueError, match="rest has 1 rows for 2 survivors"):
        partial.finished(eefast.ExitResult(*(part[:1] for part in rest)))
