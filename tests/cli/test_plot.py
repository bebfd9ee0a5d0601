"""`eefast plot`: a picture, or an error before work starts."""

import pytest
from command_line import run


def test_plot_draws_a_picture(shop, tmp_path):
    words = ["plot", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]
    done = run(*words, "--twin", "ResNet-8=0.98,0.6", "--twin", "a=b=0.5", "--output", tmp_path / "one.png")
    assert "one.png" in done.stdout
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes((shop / "t10k-images-idx3-ubyte").read_bytes())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes((shop / "t10k-labels-idx1-ubyte").read_bytes())
    run("plot", shop / "net", "--data-root", tmp_path, "--same-images", "--output", tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for twin in ("ResNet-8", "=0.9", "a=98", "a=0.9,x", "a=0.9,-1"):
        with pytest.raises(ValueError, match=r"must be name=accuracy\[,cost\]"):
            run(*words, "--twin", twin)
    with pytest.raises(ValueError, match="there is no folder"):
        run(*words, "--output", tmp_path / "no" / "folder.png")
