"""What must be reached is said to be, from its exact bound on."""

from dataclasses import replace

import pytest
from shown_rows import ON_A_CPU, row_of, shown


def test_targets_of_the_gpu():
    compiled = replace(row_of("plain, torch.compile", 1000.0), mean_cost=1.0)
    text = "compact: eenet50 at 224, N = 256, cost .4: realised ratio ≥ 0.95"
    assert f"NOT REACHED: {text}" in shown(compiled, row_of("eefast compact", 2370.0))
    assert f"reached: {text}" in shown(compiled, row_of("eefast compact", 2380.0))
    graph = replace(compiled, provider="plain, torch.compile, CUDA graph", images_per_s=(1100.0,) * 3)
    assert f"NOT REACHED: {text}" in shown(compiled, graph, row_of("eefast compact", 2380.0))
    found = shown(row_of("plain, eager", 1000.0), row_of("eefast compact", 2380.0))
    assert f"not measured: {text}" in found
    assert "resident: realised ratio" not in found, "those are the CPU's targets"


def int8_row(provider, speed, dtype="int8", **fields):
    more = {"network": "eenet20", "dtype": dtype, "setting": "no exits", "mean_cost": 1.0, **fields}
    return row_of(provider, speed, **more)


@pytest.mark.parametrize(("speed", "verdict"), [(1800.0, "reached"), (1799.0, "NOT REACHED")])
def test_targets_of_int8_are_against_int8(speed, verdict):
    rivals = int8_row("plain, OpenVINO int8", 1000.0), int8_row("plain, OpenVINO", 9000.0, "float32")
    found = shown(*rivals, int8_row("eefast resident, int8", speed), around=ON_A_CPU)
    text = "resident, int8: eenet20, N = 256, no image leaves early: ≥ 1.8 × plain, OpenVINO int8"
    assert f"\n{verdict}: {text}" in found
    assert "eefast resident, int8 is slower than another way in 0 of 1 cases" in found


@pytest.mark.parametrize(("batch_size", "least"), [(256, 1.7), (16, 1.5), (1, 1.2)])
@pytest.mark.parametrize("cost", ["0.25", "0.3"])
def test_realised_ratios_of_int8(batch_size, least, cost):
    row = int8_row("eefast resident, int8", 1.0, batch_size=batch_size, setting=f"cost {cost}", realised_ratio=least)
    text = f"resident, int8: realised ratio ≥ {least} over the best static way in int8 at N = {batch_size}"
    assert f"\nreached: {text}" in shown(row, around=ON_A_CPU)
    assert f"\nNOT REACHED: {text}" in shown(replace(row, realised_ratio=least - 0.01), around=ON_A_CPU)


def test_a_way_in_int8_is_no_rival_of_one_in_float32():
    ours = replace(row_of("eefast resident", 2200.0, dtype="float32"), network="eenet20", setting="cost 0.3")
    stage = replace(ours, provider="ONNX Runtime per stage", images_per_s=(1000.0,) * 3)
    other = replace(stage, provider="ONNX Runtime per stage, int8", dtype="int8", images_per_s=(9000.0,) * 3)
    assert "\nreached: resident: ≥ 2.2 × ONNX Runtime per stage" in shown(ours, stage, other, around=ON_A_CPU)
