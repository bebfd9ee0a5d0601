"""The parity report: its reference is the network alone with each image, and it finds every way to differ from it."""

from dataclasses import asdict
from types import SimpleNamespace

import parity
import pytest
import rows
import torch
from networks import images, lived_in, one_by_one, spread_thresholds
from parity import EngineForm

from eefast import zoo
from eefast.result import ExitResult

SHAPE = (1, 12, 12)
SIZES = (1, 3, 31)


def small(criterion="learned", n=31):
    """A subject whose images use all exits."""
    net, x = lived_in(zoo.eenet("eenet8", input_shape=SHAPE), 1).with_criterion(criterion).eval(), images(n, SHAPE)
    spread_thresholds(net, x, 0.4)
    labels = torch.arange(n) % 10
    return parity.subject("small", net, x, labels, parity.all_exits(net, x, "small"))


@pytest.fixture(scope="module")
def subject():
    return small()


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    monkeypatch.setattr(parity, "BATCH_SIZES", SIZES)


FLOAT32 = EngineForm("compact", torch.float32)


@pytest.mark.parametrize("criterion", ["learned", "max_probability", "entropy", "margin"])
@torch.no_grad()
def test_the_reference_is_what_the_network_says_about_each_image_alone(criterion):
    found = small(criterion)
    assert len(set(found.reference.exit_index.tolist())) == 3
    loop = one_by_one(found.net, found.images)
    assert torch.equal(loop.exit_index, found.reference.exit_index)
    assert torch.equal(loop.logits, found.reference.logits)
    outputs = torch.stack([out.logits for out in found.outputs])
    assert torch.equal(outputs[loop.exit_index, torch.arange(31)], loop.logits)


def answers_in(sizes, change):
    """Measured answers, each batch's changed: (answers, images of the batch) → answers."""

    def made(way, net, example):
        def run(x):
            assert len(x) <= max(sizes)
            return change(net(x), x)

        return run, "changed"

    return made


def measured(subject, monkeypatch, change, way=FLOAT32):
    monkeypatch.setattr(parity, "made", answers_in(SIZES, change))
    return parity.measure(subject, way)


def test_flips_are_reported_with_their_distances(subject, monkeypatch):
    reference, net = subject.reference, subject.net
    # One image that exits too late, close to its threshold, and one that exits too early, far from its threshold.
    gaps = [(subject.outputs[i].confidence - net.thresholds[i]).abs() for i in range(2)]
    stays = int(gaps[0].where(reference.exit_index == 0, torch.inf).argmin())
    leaves = int(gaps[1].where(reference.exit_index == 2, -torch.inf).argmax())
    distances = float(gaps[0][stays]), float(gaps[1][leaves])
    assert distances[0] < 0.9 * distances[1]
    taken = reference.exit_index.clone()
    taken[stays], taken[leaves] = 1, 1
    exits = torch.stack([out.logits for out in subject.outputs])
    logits = exits[taken, torch.arange(31)]
    logits[next(i for i in range(31) if i not in (stays, leaves))] += torch.tensor([0.25] + [0.0] * 9)
    got = ExitResult(logits, taken, reference.confidence, net.cost[taken])
    wide = {torch.float32: distances[1] * 1.01}
    monkeypatch.setattr("eefast.measure.comparison.LOGIT_TOLERANCE", {torch.float32: 1.0})
    monkeypatch.setattr("eefast.measure.comparison.FLIP_MARGIN", wide)
    row = parity.compared(subject, FLOAT32, 3, got, 0, "")
    assert row.note == ""
    assert row.flips == 2
    assert row.flip_distances == pytest.approx((sum(distances) / 2, distances[1]), abs=1e-6)
    # Flipped images have another exit's logits, which is no difference between the two ways.
    assert row.logit_differences == pytest.approx((0.25, (0.25**2 / (29 * 10)) ** 0.5), rel=1e-5)
    right, before = (float((r.logits.argmax(1) == subject.labels).double().mean()) for r in (got, reference))
    assert (row.accuracy, row.accuracy_change) == pytest.approx((right, right - before))
    assert row.other_answers == int((got.logits.argmax(1) != reference.logits.argmax(1)).sum())
    cost = sum(float(net.cost[i]) for i in taken) / 31
    assert row.mean_cost == pytest.approx(cost)
    assert row.cost_change == pytest.approx(cost - sum(float(net.cost[i]) for i in reference.exit_index) / 31)

    monkeypatch.setattr("eefast.measure.comparison.FLIP_MARGIN", {torch.float32: distances[1] * 0.99})
    row = parity.compared(subject, FLOAT32, 3, got, 0, "")
    assert row.note.startswith("WRONG: 1 of 31 images took another exit")
    assert row.flips == 2


def test_wrong_logits_are_wrong_without_flips(subject, monkeypatch):
    found = measured(subject, monkeypatch, lambda r, x: r._replace(logits=r.logits + torch.arange(10.0)))
    assert [row.batch_size for row in found] == list(SIZES)
    assert all(row.note.startswith("WRONG: 0 of 31 images") and row.flips == 0 for row in found)
    assert parity.failed([asdict(row) for row in found])
    nan = measured(subject, monkeypatch, lambda r, x: r._replace(logits=r.logits * float("nan")))
    assert all(row.note.startswith("WRONG") for row in nan)


# What no bound on errors would find: the last bit of each logit, by the batch's size, or by the place within it.
@pytest.mark.parametrize("engine", ["compact", "resident"])
@pytest.mark.parametrize("by", ["size", "place"])
def test_answers_that_depend_on_batch_or_position(subject, monkeypatch, by, engine):
    exact = subject.reference.logits
    images = {x.numpy().tobytes(): i for i, x in enumerate(subject.images)}

    def change(r, x):
        logits = exact[[images[image.numpy().tobytes()] for image in x]]
        turned = torch.full((len(x), 1), len(x) == 31) if by == "size" else torch.arange(len(x))[:, None] == 2
        logits = torch.where(turned, logits.nextafter(logits + 1), logits)
        return r._replace(logits=logits, confidence=torch.zeros(len(x)))

    found = measured(subject, monkeypatch, change, EngineForm(engine, torch.float32))
    # In reverse every third image comes to another place; in batches of 31 one does, and another one in reverse.
    places = {i for i in range(31) if i % 3 == 2 or (30 - i) % 3 == 2 or i in (2, 28)}
    assert {row.unsteady for row in found} == {31 if by == "size" else len(places)}
    assert {row.flips for row in found} == {0}
    wrong = [row.note for row in found if row.note]
    assert wrong == [] if engine == "compact" else all("depend on batch or position" in note for note in wrong)
    assert parity.failed([asdict(row) for row in found]) == (engine == "resident")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", ["reference", "compact", "resident"])
def test_engines_of_this_machine(subject, engine, dtype):
    assert EngineForm(engine, dtype) in parity.forms("cpu")
    found = parity.measure(subject, EngineForm(engine, dtype))
    if found[0].note.startswith("refused"):
        # Float32 runs everywhere that has the C++ kernels, float16 in the resident engine only on a GPU.
        assert engine == "resident"
        assert len(found) == 1
        assert found[0].flips is None
        assert "cannot run" in found[0].note
        assert not parity.failed([asdict(found[0])])
        return
    assert (engine, dtype) != ("resident", torch.float16)
    assert [row.note for row in found] == [""] * 3
    for row in found:
        assert row.flip_margin == parity.FLIP_MARGIN[dtype]
        assert row.unsteady == 0 or engine != "resident"
        largest, mean = row.logit_differences
        assert 0 <= mean <= largest < (1e-4 if dtype == torch.float32 else 1.0)
        assert largest > 0 or dtype == torch.float32
        assert row.flips == 0 or dtype != torch.float32
        assert row.details
    if (engine, dtype) == ("reference", torch.float32):
        assert found[0].logit_differences == (0, 0)


def test_what_fails_is_reported_and_stops_nothing(subject, monkeypatch):
    def broken(way, net, example):
        if way.engine == "compact":
            raise RuntimeError("no memory\nat all")
        return lambda x: 1 / 0, ""

    monkeypatch.setattr(parity, "made", broken)
    (row,) = parity.measure(subject, FLOAT32)
    assert row.note == "FAILED: RuntimeError: no memory"
    (other,) = parity.measure(subject, EngineForm("resident", torch.float32))
    assert other.note == "FAILED: ZeroDivisionError: division by zero"
    assert parity.failed([asdict(row)])
    assert parity.failed([asdict(other)])
    (nonsense,) = measured(subject, monkeypatch, lambda r, x: r._replace(exit_index=r.exit_index + 7))
    assert nonsense.note.startswith("FAILED: RuntimeError: index")


def test_ways_of_a_gpu():
    found = parity.forms("cuda")
    assert len(found) == len(set(found)) == 3 * 5
    assert str(found[0]) == "resident, float16"
    assert {way.name for way in found if way.engine == "compact"} == {
        *("compact", "compact, without graphs", "compact, device-counted")
    }
    assert not any(way.how for way in parity.forms("cpu"))


def test_stages_are_made_to_count_on_the_device():
    choice = SimpleNamespace(counted=lambda stage, most, expected: False)
    graphs = SimpleNamespace(replays={(0, 0, 8): None, (0, 1, 8): None}, policies=[choice])
    fast = SimpleNamespace(engine=SimpleNamespace(graphs=graphs), plan=SimpleNamespace(reason="as asked for"))
    with pytest.raises(ValueError, match="counts its rows on the device: as asked for"):
        parity.always_count(fast)
    graphs.replays[0, 1, None] = None
    parity.always_count(fast)
    assert choice.counted(1, 8, 8.0)


@pytest.fixture
def two_networks(monkeypatch, tmp_path):
    """Small networks in place of the real ones; rows go to a fresh folder."""
    monkeypatch.setattr(parity, "SUBJECTS", {"small": lambda device, n: iter([small("margin"), small("learned")])})
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    ways = [EngineForm("reference", torch.float32), FLOAT32, EngineForm("resident", torch.float16)]
    monkeypatch.setattr(parity, "forms", lambda device: ways)
    return lambda: rows.read(tmp_path.glob("*.jsonl"))


def test_a_run_from_the_networks_to_the_table(two_networks, capsys):
    assert parity.main(["--device", "cpu", "--images", "31"]) == 0
    written, talk = two_networks(), capsys.readouterr()
    assert [(row["criterion"], row["engine"]) for row in written if row["batch_size"] in (0, 1)] == [
        (criterion, engine) for criterion in ("margin", "learned") for engine in ("reference", "compact", "resident")
    ]
    assert talk.out.count("| small ") == 4
    assert "refused: engine='resident'" in talk.out
    assert "small, margin 1/3: reference, float32" in talk.err
    assert "small, margin: net(x) 1/1" in talk.err


def test_a_spent_budget_is_reported(two_networks, capsys):
    assert parity.main(["--device", "cpu", "--images", "31", "--seconds", "0"]) == 0
    assert "skipped: the budget of 0 s is spent (small, all criteria" in capsys.readouterr().out


def test_wrong_answers_fail_the_command(two_networks, monkeypatch):
    wrong = answers_in(SIZES, lambda r, x: r._replace(exit_index=(r.exit_index + 1) % 3))
    monkeypatch.setattr(parity, "made", wrong)
    assert parity.main(["--device", "cpu", "--images", "31"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "30"], "--images 30 must be in 31, the largest batch, … 10,000"),
        (["--images", "10001"], "--images 10001 must be in 31"),
        pytest.param(
            *(["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parity.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", list(parity.SUBJECTS))
def test_the_real_networks(name):
    found = list(parity.SUBJECTS[name]("cpu", 8))
    criteria = [one.net.criterion.name for one in found]
    assert criteria == (["learned"] if name == parity.ON_NOISE else ["learned", "max_probability", "entropy", "margin"])
    for one in found:
        assert one.name == name
        assert len(one.images) == len(one.reference.exit_index) == 8
        if one.labels is None:
            assert len(one.net.heads[0].convs) == 1
            assert len(set(one.reference.exit_index.tolist())) > 1
        else:
            assert torch.equal(one.reference.labels, one.labels), "trained, right about these"
