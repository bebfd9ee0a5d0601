"""Files of weights for a network: those that do not fit are refused, heads of another kind keep their own weights."""

import copy
from pathlib import Path

import pytest
import torch

from eefast import zoo
from eefast.checkpoint.weights import load_network, load_weights, read_weights


def test_files_that_hold_no_fitting_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_weights(tmp_path / "weights.pth")
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        read_weights(tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        read_weights(tmp_path / "other.pth")
    torch.save(torch.nn.Linear(3, 1).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="do not fit the network"):
        load_weights(torch.nn.Linear(3, 2), tmp_path / "linear.pth")


@pytest.mark.parametrize(("kind", "others"), [("pool", []), ("conv2", [0, 1]), ("bnpool", [0, 1])])
def test_heads_of_another_kind_keep_their_weights(tmp_path: Path, kind: str, others: list[int]) -> None:
    made = [
        zoo.eenet("eenet8", 2, head=head, input_shape=(1, 12, 12)) for head in ("pool", kind)
    ]  # different weights: nothing seeds them
    made[0].save(tmp_path / "net")
    (there, before), network = (net.state_dict() for net in (made[0], copy.deepcopy(made[1]))), made[1]
    assert load_network(network, tmp_path / "net") == others
    kept = tuple(f"heads.{i}." for i in others)
    for name, value in network.state_dict().items():
        assert torch.equal(value, (before if name.startswith(kept) else there)[name]), name
    assert not torch.equal(before["heads.2.classifier.weight"], there["heads.2.classifier.weight"])

    # Nothing else may be missing or too many.
    for change in (lambda w: w.pop("heads.2.classifier.weight"), lambda w: w.update({"heads.7.x": torch.ones(1)})):
        weights = dict(there)
        change(weights)
        torch.save(weights, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match="do not fit the network"):
            load_network(network, tmp_path / "wrong.pth")
