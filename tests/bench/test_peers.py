"""The peers that are more than a call of a library, on small networks: right answers at 1, 3 and 31 images."""

import math
import os
import platform
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import cpu_ways
import network_runs
import peers
import pytest
import torch
from cases import check, joined
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from peers import (
    EAGER_NCHW,
    OPENVINO_BFLOAT16,
    batch_condition,
    int8,
    memory_kept,
    one_graph,
    smaller,
    torch_compile_early,
)
from peers import one_by_one as loop
from runtime_process import Setting
from subjects import Network, Subject
from torch import nn
from workloads import Workload

import eefast
from eefast.cost import macs

SHAPE = (3, 12, 12)
COMPILED = torch_compile_early.PEERS
ON_ONNX_RUNTIME, ON_OPENVINO = one_graph.PEERS


def ready(peer):
    missing = [name for name in peer.needs if not find_spec(name)]
    skip = pytest.mark.skipif(bool(missing), reason=f"needs {missing}: pip install 'eefast[bench]'")
    return pytest.param(peer, id=peer.name, marks=skip)


def network(criterion="learned"):
    return lived_in(eefast.zoo.eenet("eenet20", 2, input_shape=SHAPE, criterion=criterion), 7)


@pytest.fixture(scope="module", params=["learned", "entropy"])
def answered(request):
    """A network whose images use all exits, the images, the answers."""
    net, x = network(request.param), images(31, SHAPE)
    spread_thresholds(net, x, 0.4)
    return net, x, one_by_one(net, x)


def compared():
    """(peer, cost): static peers where no image exits early, the others also where some and where most do."""
    # torch.compile takes longer than all the others; those with variables need separate processes.
    for peer in (p for p in (*peers.PEERS, *int8.PEERS) if p.family != "torch.compile" and not p.variables):
        for cost in (1,) if peer.static else (0.5,) if peer.calibrated else (1, 0.5, 0.25):
            yield pytest.param(peer, cost, id=f"{peer.name}-cost {cost}", marks=ready(peer).marks)


@pytest.mark.parametrize(("peer", "cost"), list(compared()))
@torch.no_grad()
@pytest.mark.sampled(10)
def test_a_peer_agrees_with_the_reference(subject, peer, cost):
    case = cpu_ways.case_of(subject, 16, cost)
    try:
        run = peer.prepare(case.net, *([subject.images] if peer.calibrated else []))
    except ValueError as error:
        if "AVX512-BF16" not in str(error) and "C++ kernels are" not in str(error):
            raise
        pytest.skip(str(error))  # what this machine lacks, in the engine's words
    batches = [x.contiguous(memory_format=peer.memory_format) for x in case.batches]
    checked, note = check(case, *joined(map(run, batches), peer.static), peer.dtype)
    assert checked, note
    if not peer.static:
        case.net.thresholds.fill_(-1)
        assert run(batches[0]).exit_index.tolist() == [0] * 16, "it must follow thresholds that change"
    assert peer.describe()


@pytest.mark.parametrize("peer", [ready(p) for p in (loop.PEER, *batch_condition.PEERS, ON_OPENVINO)])
@torch.no_grad()
def test_early_exits_answer_as_one_image_at_a_time(peer, answered):
    net, x, expected = answered
    run = peer.prepare(net)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    for n in (31, 1):
        part = x[:n].contiguous(memory_format=peer.memory_format)
        assert_same_answers(run(part), eefast.ExitResult(*(values[:n] for values in expected)), net)


@pytest.mark.parametrize("peer", [ready(p) for p in (loop.PEER, batch_condition.PEERS[0], ON_OPENVINO)])
@torch.no_grad()
def test_thresholds_may_change_and_all_may_exit(peer):
    net, x = network(), images(3, SHAPE)
    run = peer.prepare(net)
    for thresholds, expected in (([-1, -1], 0), ([2, -1], 1), ([2, 2], 2), ([float("inf"), -1], 1)):
        net.thresholds.copy_(torch.tensor(thresholds))
        assert run(x).exit_index.tolist() == [expected] * 3


@pytest.mark.parametrize("peer", [ready(ON_ONNX_RUNTIME)])
def test_one_graph_answers_in_a_separate_process(peer, answered):
    """Another peer makes threads for all sessions of a process, after which ONNX Runtime takes no session like this."""
    net, x, expected = answered
    subject = Subject(net, x, [])
    with closing(cpu_ways.started([peer])) as device:
        device.open(subject)
        for batch_size in (31, 3, 1):
            setting = Setting(tuple(net.thresholds.tolist()), batch_size, -(-31 // batch_size))
            found = device.processes[peer.family].answer(peer, setting)
            assert torch.equal(found.exits, expected.exit_index)
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
        # All images may exit, or none, under thresholds that are set after the graph was made.
        all_exit, none_exits = (-math.inf, math.inf) if net.criterion.comparison == ">" else (math.inf, -math.inf)
        for thresholds, taken in (
            ((all_exit, all_exit), 0),
            ((none_exits, all_exit), 1),
            ((none_exits, none_exits), 2),
        ):
            found = device.processes[peer.family].answer(peer, Setting(thresholds, 31, 1))
            assert found.exits.tolist() == [taken] * 31


@pytest.mark.parametrize("peer", COMPILED, ids=lambda peer: peer.name)
@torch.no_grad()
@pytest.mark.sampled(1)
def test_what_torch_compile_gets_answers_as_one_image_at_a_time(peer, monkeypatch):
    """Traced and run without code being generated, which takes a minute and is checked before it is timed."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **more: compile_(*args, backend="eager", **more))
    torch._dynamo.reset()
    # What a peer sets for its process goes back to what it was.
    with torch._dynamo.config.patch(recompile_limit=8, capture_dynamic_output_shape_ops=False):
        net, x = network(), images(31, SHAPE).contiguous(memory_format=torch.channels_last)
        spread_thresholds(net, x, 0.4)
        run, expected = peer.prepare(net), one_by_one(net, x)
        for n in (31, 3):  # the second size makes sizes dynamic
            assert_same_answers(run(x[:n]), eefast.ExitResult(*(values[:n] for values in expected)), net)
        net.thresholds.fill_(-1)
        assert run(x).exit_index.tolist() == [0] * 31
        graphs = [int(word) for word in peer.describe().split() if word.isdigit()]
    # One graph, or several where the loop is cut at its exits; the last number counts the cuts.
    whole = peer.name.endswith("full graph")
    assert (graphs[0] <= 3) if whole else (graphs[0] >= 3)
    assert (graphs[-1] > 0) == peer.name.endswith("on the loop")


@torch.no_grad()
def test_pytorchs_own_layout_changes_no_answer():
    net, x = network(), images(31, SHAPE)
    exact = net.double().plain()(x.double())
    eager = net.float().plain()(x)
    error = float((eager - exact).abs().max())
    found = EAGER_NCHW.prepare(net)(x)
    # Folding rounds the weights once more.
    assert float((found - exact).abs().max()) <= 4 * error


@pytest.mark.parametrize("peer", [ready(int8.OPENVINO)])
@torch.no_grad()
def test_eight_bits_are_not_float32_under_another_name(peer):
    net, x = network(), images(31, SHAPE)
    exact = net.plain()(x)
    error = (peer.prepare(net, x)(x) - exact).square().mean().sqrt() / exact.std()
    assert 2e-3 < error < 0.2


@torch.no_grad()
def test_an_engine_that_is_not_integer_arithmetic_is_refused(monkeypatch):
    net, x = network(), images(31, SHAPE)

    def rounding_elsewhere(made, **_):
        return lambda part: made(part)._replace(logits=made(part).logits + 1e-2)

    monkeypatch.setattr(eefast, "accelerate", rounding_elsewhere)
    with pytest.raises(RuntimeError, match="not those of integer arithmetic"):
        int8.RESIDENT.prepare(net, x)


@pytest.mark.parametrize(("factor", "right"), [(0.9, True), (1.1, False)])
@torch.no_grad()
def test_libraries_may_round_otherwise_but_no_more(monkeypatch, factor, right):
    net, x = network(), images(31, SHAPE)

    def rounding_elsewhere(made, **_):
        def run(part, **limits):
            found, exact = made(part, **limits), net(part, **limits)
            return found._replace(logits=found.logits + factor * (exact.logits - found.logits))

        return run

    monkeypatch.setattr(eefast, "accelerate", rounding_elsewhere)
    if right:
        assert int8.BY_DEFAULT.prepare(net, x)(x).logits.shape == (31, net.num_classes)
    else:
        with pytest.raises(RuntimeError, match=r"WRONG: the logits differ from simulated INT8 by"):
            int8.BY_DEFAULT.prepare(net, x)


@pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino: pip install 'eefast[bench]'")
def test_openvino_in_bfloat16_is_not_float32_under_another_name():
    import openvino

    net, x = network(), images(31, SHAPE)
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ValueError, match="bfloat16 needs a CPU with"):
            OPENVINO_BFLOAT16.prepare(net)
        return
    with torch.no_grad():
        exact = net.plain()(x)
    error = (OPENVINO_BFLOAT16.prepare(net)(x) - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize(
    ("name", "exits", "shape"), [("eenet20", 2, SHAPE), ("eenet110", 8, SHAPE), ("eenet50", 3, (3, 32, 32))]
)
def test_fewer_blocks_cost_a_quarter(name, exits, shape):
    net = eefast.zoo.eenet(name, exits, input_shape=shape)
    other = smaller.smaller(net)
    share = macs(other.plain(), shape)[0] / macs(net.plain(), shape)[0]
    # EENet-50's blocks that change the channels already cost more.
    assert share <= (0.45 if name == "eenet50" else smaller.COST)
    assert share > 0.15
    assert other.num_exits == 0
    with torch.no_grad():
        assert other(torch.zeros(1, *shape)).logits.shape == (1, 10)
    assert len(net.stages) == exits + 1
    assert not any(isinstance(m, nn.Identity) for m in net.stages.modules()), "the network itself stays as it is"


def test_fewer_blocks_need_blocks():
    net = eefast.zoo.eenet("eenet8", 2, input_shape=(1, 28, 28))
    with pytest.raises(ValueError, match="no residual blocks"):
        smaller.smaller(net)


@pytest.mark.parametrize("peer", [ready(p) for p in peers.STAND_INS])
def test_a_stand_in_is_checked_against_its_own_network_and_is_no_yardstick(peer, monkeypatch):
    monkeypatch.setattr(network_runs, "ROUNDS", 2)
    monkeypatch.setattr(cpu_ways, "TURN_SECONDS", 0.001)
    net, x = network(), images(16, SHAPE)
    outputs, _ = eefast.thresholds.outputs.collect(net, [(x, torch.zeros(len(x)))])
    subject = Subject(net, x, outputs)
    ways = (EAGER_NCHW, peer, loop.PEER)
    work = Workload(Network("eenet20", SHAPE, 10, ()), 8, (0.3,))
    large = Workload(work.network, 32, (0.3,))
    with closing(cpu_ways.started(ways)) as device:
        device.open(subject)
        rows = {row.provider: row for row in network_runs.measure(work, subject, device)[0]}
    assert rows[peer.name].images_per_s is not None, rows[peer.name].note
    assert 0.15 < rows[peer.name].mean_cost < 0.3
    assert {row.best_static for row in rows.values()} == {EAGER_NCHW.name}
    # Larger batches tell nothing new about a loop over images.
    assert [p.name for p, _ in cpu_ways.pairs_of(large, subject, ways)] == [EAGER_NCHW.name, peer.name]


def first_sure(net, x):
    """The answers of the first exit at which the least sure image is above the threshold, or of the final one."""
    features = x
    for i, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
        features = stage(features)
        logits = head(features).logits
        sure = logits.softmax(1).max(1).values
        if i == net.num_exits or float(sure.min()) >= float(net.thresholds[i]):
            return i, logits, sure


@pytest.mark.parametrize("peer", [ready(p) for p in peers.WHOLE_BATCH])
@torch.no_grad()
def test_a_batch_exits_as_a_whole_where_all_its_images_are_sure(peer):
    net, x = network(), images(32, SHAPE)
    subject = Subject(net, x, eefast.thresholds.outputs.collect(net, [(x, torch.zeros(32))])[0])
    run, seen = peer.prepare(net), set()
    for n, cost in ((1, 0.4), (2, 0.3), (16, 0.2), (3, 0.9), (32, 1)):
        case = cpu_ways.case_of(subject, n, cost, peer.whole_batch)
        net.thresholds.copy_(case.net.thresholds)
        found = [run(batch.contiguous(memory_format=torch.channels_last)) for batch in case.batches]
        for batch, result in zip(case.batches, found, strict=True):
            exit_index, logits, sure = first_sure(net, batch)
            assert result.exit_index.tolist() == [exit_index] * len(batch)
            torch.testing.assert_close(result.logits, logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(result.confidence, sure, rtol=0, atol=1e-4)
            seen.add((len(batch) > 1, exit_index))
        # What the bench says of them: right as they are, wrong where one image exited by itself.
        logits, taken = joined(found, peer.static)
        checked, note = check(case, logits, taken, peer.dtype)
        assert checked, note
        means = [float(net.cost[result.exit_index].mean()) for result in found]
        assert checked.costs == pytest.approx(means)
        taken[0] = (taken[0] + 1) % 3
        assert check(case, logits, taken, peer.dtype)[1].startswith("WRONG")
    assert seen >= {(False, 0), (False, 1), (False, 2), (True, 0), (True, 1), (True, 2)}


@pytest.mark.parametrize("peer", [ready(p) for p in peers.WHOLE_BATCH])
@torch.no_grad()
def test_as_many_images_are_sure_as_would_exit(peer):
    net, x = network(), images(64, SHAPE)
    subject = Subject(net, x, eefast.thresholds.outputs.collect(net, [(x, torch.zeros(64))])[0])
    usual = cpu_ways.case_of(subject, 1, 0.4)
    alone = cpu_ways.case_of(subject, 1, 0.4, peer.whole_batch)
    assert alone.mix == usual.mix
    assert len(usual.batches) == 64
    by_itself = net.with_criterion(peer.whole_batch, alone.net.thresholds.tolist())(x).exit_index
    expected = usual.net(x).exit_index
    assert by_itself.bincount().tolist() == expected.bincount().tolist()


def test_names_are_unique():
    names = [peer.name for peer in (*peers.ALL_PEERS, *int8.PEERS)]
    assert len(set(names)) == len(names)


FAULTS = """
import resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before, _ = faults(), bytearray(2**26)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are glibc's")
@pytest.mark.parametrize(("variables", "most"), [((), math.inf), (memory_kept.VARIABLES, 100)])
def test_kept_memory_needs_no_page_faults(variables, most):
    """64 MiB are 16,384 pages, or 32 large ones."""
    environment = {name: value for name, value in os.environ.items() if name not in dict(memory_kept.VARIABLES)}
    command = [sys.executable, "-c", FAULTS]
    faults = int(subprocess.check_output(command, env={**environment, **dict(variables)}))
    assert faults <= most
    assert variables or faults > 30


@pytest.mark.parametrize("text", ["docs/benchmarks.md"])
def test_texts_name_the_variables_that_are_measured(text):
    named = " ".join("=".join(variable) for variable in memory_kept.VARIABLES)
    assert named in (Path(__file__).parents[2] / text).read_text()
