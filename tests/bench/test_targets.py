"""What must be reached is said to be, from its exact bound on."""

from dataclasses import replace

from shown_rows import row_of, shown


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
