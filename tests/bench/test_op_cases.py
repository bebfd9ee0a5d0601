"""Cases of the ops: providers are right, each wrong answer is found, and a case counts what the work needs."""

from dataclasses import replace

import op_cases
import pytest
import torch
from op_cases import COPY, EAGER, INDEXED, OURS, READ, RULES, OpCase, cpu_cases, gpu_cases, make_inputs, providers

CASE = OpCase("exit_head", 31)
CASES = {
    **{"exit_head": CASE, "compact": OpCase("compact", 31), "exit_conv_head": OpCase("exit_conv_head", 3, 16)},
    **{name: OpCase(name, 3) for name in INDEXED},
    **{rule: replace(CASE, criterion=rule) for rule in ("max_probability", "entropy", "margin", *RULES)},
    **{"bfloat16": replace(CASE, dtype=torch.bfloat16), "contiguous": replace(CASE, layout="contiguous")},
}


def run_here():
    """All but cuDNN's."""
    for name, case in CASES.items():
        for provider in (*providers(case), COPY, READ):
            if "cuDNN" not in provider.name and not (provider is READ and case.dtype != torch.float32):
                yield pytest.param(case, provider, id=f"{name}-{provider.name}")


@pytest.mark.parametrize(("case", "provider"), list(run_here()))
def test_providers_are_right(case, provider):
    inputs = make_inputs(case, "cpu")
    assert op_cases.check(inputs, provider, provider.make(inputs)) == ""


@pytest.mark.parametrize("name", ["exit_head", "max_probability", "entropy", "margin", "fitted"])
@pytest.mark.parametrize("rate", [0, 0.1, 0.9, 1])
def test_the_threshold_gives_the_exit_rate(name, rate):
    inputs = make_inputs(replace(CASES[name], exit_rate=rate), "cpu")
    EAGER.make(inputs)()
    assert int((~inputs.survives).sum()) == inputs.case.leaving == round(31 * rate)
    inputs.exits.fill_(op_cases.SENTINEL)
    _, survivors = EAGER.make(inputs)()
    assert survivors == 31 - inputs.case.leaving
    assert int((inputs.exits == op_cases.EXIT).sum()) == inputs.case.leaving


def changed(what):
    """Eefast's call with one thing wrong."""

    def make(inputs):
        call = OURS.make(inputs)

        def run():
            survivors, live = call()
            left = int((inputs.exits == op_cases.EXIT).nonzero()[0])
            kept = int(survivors[0])
            if what == "order":
                return survivors.flip(0), live
            if what == "exits":
                inputs.exits[left] = op_cases.SENTINEL
            if what == "logits":
                inputs.logits[left, 3] += 0.01
            if what == "confidence":
                inputs.confidence[left] += 0.01
            if what == "written":
                inputs.logits[kept] = 0
            return survivors, live

        return run

    return replace(OURS, make=make)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("order", "survivors are not those that stay, in order"),
        ("exits", "1 wrong exits"),
        ("logits", "logits off by 0.01"),
        ("confidence", "confidence off by 0.01"),
        ("written", "results of survivors were written"),
    ],
)
def test_a_wrong_answer_is_found(what, said):
    inputs = make_inputs(CASE, "cpu")
    provider = changed(what)
    assert said in op_cases.check(inputs, provider, provider.make(inputs))


@pytest.mark.parametrize(("name", "said"), [("compact", "rows differ"), ("indexed_conv", "maps off by")])
def test_wrong_maps_are_found(name, said):
    inputs = make_inputs(CASES[name], "cpu")
    call = OURS.make(inputs)
    assert said in op_cases.check(inputs, OURS, lambda: call().clone().add_(1))


def test_what_the_work_needs():
    case = OpCase("exit_head", 4, channels=16, side=2, classes=10, exit_rate=0.5)
    assert case.map_bytes == 4 * 16 * 4 * 4
    # Maps, four lists of 4 bytes, the results of two samples, the weights.
    assert case.bytes == 1024 + 64 + 2 * (40 + 12) + 4 * 11 * 17
    assert case.flops == 4 * (16 * 4 + 2 * 11 * 16)
    # With a rule the rows of all four, read by the one that carries.
    assert replace(case, criterion="fitted").bytes == 1024 + 64 + 4 * 44 + 2 * 8 + 4 * 11 * 17
    assert replace(case, criterion="carried").bytes == 1024 + 64 + 4 * 84 + 2 * 8 + 4 * 11 * 17
    compact = replace(case, op="compact")
    assert (compact.bytes, compact.flops) == (2 * (2 * 256 + 4), 0)
    assert replace(case, op="indexed_conv").flops == 2 * 2 * 9 * 16**2 * 4


@pytest.mark.parametrize("cases", [gpu_cases(), cpu_cases()], ids=["gpu", "cpu"])
def test_no_case_is_listed_twice(cases):
    assert len({str(case) for case in cases}) == len(cases)
