"""The program that AOTInductor compiles: it has the bits of the resident engine; compiled: tests/examples."""

import pytest
import torch

import eefast
from eefast import ops, rules
from eefast.exporting import resident_package

cpp_only = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")


@cpp_only
@pytest.mark.parametrize("kind", ["learned", "carried", "INT8"])
def test_it_has_the_bits_of_the_engine(net, x, kind):
    made = net if kind == "learned" else net.with_criterion(rules.carried([0.0, 0.5, 0.25]), [0.2, 0.3])
    if kind == "INT8":
        made = eefast.quantize(net, x)
    program = resident_package.traced(made).module()
    wanted = eefast.accelerate(made, engine="resident")
    for n in (1, 5, 37):
        found, answer = program(x[:n], made.thresholds), wanted(x[:n])
        assert torch.equal(found[0], answer.logits)
        assert torch.equal(found[1], answer.confidence)
        assert torch.equal(found[2], answer.exit_index)


@cpp_only
def test_thresholds_are_an_argument(net, x):
    program = resident_package.traced(net).module()
    assert program(x, torch.full((2,), -torch.inf))[2].tolist() == [0] * len(x)


def test_without_kernels_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops" / "__init__.py"))
    with pytest.raises(ValueError, match="format='aoti' needs the C\\+\\+ kernels"):
        resident_package.library()
