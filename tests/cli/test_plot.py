"""`eefast plot`: a picture, or an error before work starts."""

import pytest
from command_line import run


def words(shop):
    return ["plot", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]


def test_plot_draws_a_picture(shop, tmp_path):
    done = run(*words(shop), "--twin", "ResNet-8=0.98,0.6", "--twin", "a=b=0.5", "--output", tmp_path / "one.png")
    assert "one.png" in done.stdout
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes((shop / "t10k-images-idx3-ubyte").read_bytes())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes((shop / "t10k-labels-idx1-ubyte").read_bytes())
    run("plot", shop / "net", "--data-root", tmp_path, "--same-images", "--output", tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_benefit_curve_is_drawn_and_listed(shop, tmp_path):
    from eefast.checkpoint.loading import load

    done = run(*words(shop), "--benefit", "--criterion", "max_probability", "--output", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("threshold"))) + 1 : -1]]
    net = load(shop / "net")
    # At 0 all images exit at the first exit; at 1 none does at any.
    assert (rows[0][0], float(rows[0][1])) == ("0", pytest.approx(float(net.cost[0]), abs=1e-4))
    assert float(rows[-1][1]) == 1.0
    whole = (
        sum(cost.stage_macs for cost in net.stage_costs)
        + net.stage_costs[-1].head_macs
        - net.stage_costs[-1].num_features
    )
    assert float(rows[-1][2]) == pytest.approx(whole / 1e6, rel=1e-3)
    assert len(rows) == len({tuple(row[1:]) for row in rows})


@pytest.mark.parametrize("twin", ["ResNet-8", "=0.9", "a=98", "a=0.9,x", "a=0.9,-1", "a=0.9,0.5,1"])
def test_a_point_without_accuracy_or_name_is_refused(shop, twin):
    with pytest.raises(ValueError, match=r"must be name=accuracy\[,cost\]"):
        run(*words(shop), "--twin", twin)


def test_a_picture_without_a_folder_is_refused(shop, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        run(*words(shop), "--output", tmp_path / "no" / "folder.png")
