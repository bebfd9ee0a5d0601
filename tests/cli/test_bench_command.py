"""`eefast bench`: figures that one image at a time gives too, losses said as such, code that runs, errors first."""

import dataclasses
import json
import sys

import pytest
import torch
from command_line import held_out_of, run
from networks import images, lived_in, one_by_one, spread_thresholds

import eefast
from eefast import cli, ops, zoo
from eefast.cli.bench import _best, _by_cost, _excess
from eefast.data import datasets
from eefast.measure import baselines, benchmark
from eefast.measure.environment import Row

SIZES = (1, 9)


@pytest.fixture(scope="module")
def found():
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 3)
    x = images(41, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    other = [float("inf"), float(net.thresholds[1])]
    labels = torch.arange(41) % 10
    steps = []
    result = benchmark.run(
        net,
        list(zip(x.split(7), labels.split(7), strict=True)),
        batch_sizes=SIZES,
        others=[other],
        seconds=0,
        progress=lambda what, done, total: steps.append((what, done == total)),
    )
    return net, other, x, labels, result, steps


def accuracy(answer, labels):
    return pytest.approx(float((answer.labels == labels).double().mean()))


def test_accuracy_cost_and_exits_are_those_of_one_by_one(found):
    net, other, x, labels, result, steps = found
    alone = one_by_one(net, x)
    assert result.early.accuracy == accuracy(alone, labels)
    assert result.early.mean_cost == pytest.approx(float(alone.cost.mean()))
    exits = [right + wrong for right, wrong in zip(result.early.right, result.early.wrong, strict=True)]
    assert exits == alone.exit_index.bincount(minlength=3).tolist()
    assert result.criteria == {"learned": (result.early.accuracy, pytest.approx(result.early.mean_cost))}
    final = one_by_one(net.with_criterion("learned", [float("inf")] * 2), x)
    assert result.plain_accuracy == accuracy(final, labels)
    (point,) = result.curve
    there = one_by_one(net.with_criterion("learned", other), x)
    assert (point.accuracy, point.mean_cost) == (accuracy(there, labels), pytest.approx(float(there.cost.mean())))
    for row in result.rows:
        answer = final if row.criterion is None else alone
        assert row.exits == tuple(answer.exit_index.bincount().tolist())
        assert row.accuracy == accuracy(answer, labels)
        assert (row.images, row.flips) == (41, 0)
    assert {what for what, done in steps if done} == {"checking answers", "timing, batch 1", "timing, batch 9"}


def test_all_ways_are_there_or_said_to_be_missing(found):
    result = found[4]
    engines = [name for name in benchmark.ENGINES if name != "resident" or not ops.CPP_MISSING]
    onnx = [] if "ONNX Runtime" in result.left_out else ["plain, ONNX Runtime"]
    for size in SIZES:
        names = [row.name for row in result.rows if row.batch_size == size]
        assert names == ["plain, PyTorch", *onnx, benchmark.LOOP, *engines]
    assert "--compile" in result.left_out["torch.compile"]
    assert ("resident" in result.left_out) == bool(ops.CPP_MISSING)
    assert result.auto in engines


def test_verdicts_follow_from_the_rows(found):
    result = found[4]
    for size, verdict in zip(SIZES, result.verdicts, strict=True):
        rows = {row.name: row for row in result.rows if row.batch_size == size}
        assert rows[verdict.static].criterion is None
        # Measured against itself.
        assert rows[verdict.static].speedup == rows[verdict.static].realised_ratio == 1
        assert all(row.speedup < 1.5 for row in rows.values() if row.criterion is None)
        best = max((rows[name] for name in benchmark.ENGINES if name in rows), key=lambda row: row.images_per_s)
        assert (verdict.engine, verdict.batch_size) == (best.name, size)
        assert verdict.speedup[1] == best.speedup
        assert verdict.over_loop == best.images_per_s / rows[benchmark.LOOP].images_per_s


def a_row(name, criterion, images_per_s, speedup, quantiles):
    known = {"images_per_s_quantiles": (1, 2), "mean_cost": 0.5, "accuracy": 0.9, "images": 4, "batch_size": 16}
    more = {"exits": (4,), "flips": 0, "flip_margin": 1e-4, "realised_ratio": 0.5 * speedup}
    own = {"images_per_s": images_per_s, "speedup": speedup, "speedup_quantiles": quantiles}
    return Row(name=name, criterion=criterion, **known, **more, **own)


@pytest.mark.parametrize(
    ("quantiles", "worth", "words"),
    [
        ((1.4, 1.6), True, "worth it: compact is 1.50 × as fast as plain, PyTorch, accuracy -0.47 points"),
        ((0.9, 1.6), None, "no clear difference: compact is 0.90 … 1.60 × as fast as plain, PyTorch"),
        ((0.4, 0.6), False, "not worth it: compact is 0.50 × as fast as plain, PyTorch"),
    ],
)
def test_losses_are_said_as_plainly_as_wins(quantiles, worth, words):
    speedup = 0.5 if worth is False else 1.5
    rows = [
        a_row("plain, PyTorch", None, 100, 1, (1, 1)),
        a_row(benchmark.LOOP, "learned", 200, 2, (2, 2)),
        a_row("compact", "learned", 100 * speedup, speedup, quantiles),
        a_row("resident", "learned", 10, 0.1, (0.1, 0.1)),
    ]
    verdict = benchmark._verdict(rows, "plain, PyTorch")
    assert verdict.worth is worth
    sentence = benchmark.words(verdict, -0.0047)
    assert sentence.startswith(words)
    assert f"{speedup / 2:.2f} × the masked loop" in sentence
    # Without an engine of its own eefast runs the loop.
    assert benchmark._verdict(rows[:2], "plain, PyTorch").engine == "reference"


def test_the_code_runs_what_was_found(found, tmp_path):
    net, *_, result, _ = found
    net.save(tmp_path)
    net = net.with_criterion("entropy", [0.1, 1 / 3])
    first, second = (dataclasses.replace(v, worth=True, engine="compact") for v in result.verdicts)
    lines = benchmark.code(str(tmp_path), net, [first, second], torch.float32, False)
    names = {"eefast": eefast, "torch": torch}
    exec(lines, names)
    assert names["fast"].plan.engine == "compact"
    assert names["net"].criterion.name == "entropy"
    assert torch.equal(names["net"].thresholds, net.thresholds)
    lines = benchmark.code(
        str(tmp_path), net, [first, dataclasses.replace(second, engine="reference")], torch.float64, True
    )
    assert "with_criterion" not in lines
    assert "engine='compact', dtype=torch.float64, frozen=True)  # batches of 1\n" in lines
    assert "engine='reference', dtype=torch.float64, frozen=True)  # batches of 9" in lines
    assert benchmark.code("x", net, [dataclasses.replace(first, worth=False)], torch.float32, False) == ""


def test_a_wrong_answer_gets_no_speed_and_exit_code_1(found, shop, monkeypatch, tmp_path, capsys):
    loop = baselines.masked

    def masked(net, dtype):
        run = loop(net, dtype)
        return lambda x: run(x)._replace(exit_index=torch.full((len(x),), 1))

    monkeypatch.setattr(baselines, "masked", masked)
    words = ["bench", shop / "net", "--data-root", shop, "--own-thresholds", "--batch-sizes", "4"]
    monkeypatch.setattr(sys, "argv", ["eefast", *map(str, words), "--figure", str(tmp_path / "no.png")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    error = capsys.readouterr()
    assert "'masked loop, PyTorch' disagrees with the reference" in error.err
    assert error.out == ""
    assert not (tmp_path / "no.png").exists()


def test_the_command_chooses_measures_and_saves(shop, tmp_path):
    net = eefast.load(shop / "net")
    net.save(tmp_path / "net")
    words = [
        "bench",
        tmp_path / "net",
        "--data-root",
        shop,
        "--held-out",
        31,
        "--few-images",
        "--seed",
        5,
        "--batch-sizes",
        "4,1",
    ]
    more = ["--max-cost", 0.7, "--seconds", 0, "--save", "--images", 20]
    done = run(*words, *more, "--figure", tmp_path / "a.png", "--json", tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert set(report["chosen"]) == set(eefast.criteria.CRITERIA) == set(report["criteria"])
    best = max(report["chosen"].values(), key=lambda c: (c["accuracy"], -c["cost"]))
    assert report["criterion"] == best["criterion"]
    assert report["thresholds"] == best["thresholds"]
    saved = eefast.load(tmp_path / "net")
    assert (saved.criterion.name, saved.thresholds.tolist()) == (best["criterion"], best["thresholds"])
    assert set(json.loads((tmp_path / "net" / "thresholds.json").read_text())) == set(report["chosen"])
    kept, labels = held_out_of(shop, 31, 5)
    test = datasets.dataset("mnist", shop, "test")
    chosen_at = torch.randperm(41, generator=torch.Generator().manual_seed(0))[:20]
    for name, chosen in report["chosen"].items():
        own = net.with_criterion(name, chosen["thresholds"])
        assert chosen["accuracy"] == accuracy(one_by_one(own, net.prepare(kept)), labels)
        answer = one_by_one(own, net.prepare(test.images[chosen_at]))
        assert report["criteria"][name][0] == accuracy(answer, test.labels[chosen_at])
        assert report["criteria"][name][1] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
    assert [verdict["batch_size"] for verdict in report["verdicts"]] == [1, 4]
    for text in ("batch 1: ", "batch 4: ", "realised ratio", "not compared: torch.compile", "saved: "):
        assert text in done.stdout
    assert report["environment"]["threads"] == torch.get_num_threads()
    # Own thresholds need no training images; only JSON goes to stdout.
    for stem in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (tmp_path / f"t10k-{stem}").write_bytes((shop / f"t10k-{stem}").read_bytes())
    again = ["bench", tmp_path / "net", "--data-root", tmp_path, "--batch-sizes", 4, "--seconds", 0]
    done = run(*again, "--own-thresholds", "--figure", tmp_path / "b.png", "--json", "-")
    report = json.loads(done.stdout)
    assert (report["criterion"], report["thresholds"]) == (best["criterion"], best["thresholds"])
    assert (report["bound"], report["chosen"], report["curve"]) == (None, {}, [])
    with pytest.raises(FileNotFoundError, match="or keep the network's thresholds: --own-thresholds"):
        run(*again)


def test_it_refuses_before_it_works(shop, tmp_path):
    words = ["bench", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]
    for more, error in (
        (["--batch-sizes", "1,x"], r"batch_sizes='1,x' must be numbers from 1 on"),
        (["--batch-sizes", "0,4"], r"batch_sizes='0,4' must be numbers from 1 on"),
        (["--batch-sizes", "64"], r"batch_sizes='64': there are only 41 test images"),
        (["--dtype", "int8"], r"dtype='int8' is unknown; choose one of float32, float16, bfloat16"),
        (["--own-thresholds", "--save"], "own_thresholds=True chooses nothing"),
        (["--own-thresholds", "--max-cost", "0.5"], "own_thresholds=True chooses nothing"),
        (["--min-accuracy", "0.5", "--max-cost", "0.5"], r"min_accuracy=0.5, max_cost=0.5: give one of them"),
        (["--criterion", "best"], r"criterion='best' is unknown"),
        (["--figure", tmp_path / "no" / "a.png"], "there is no folder"),
    ):
        with pytest.raises(ValueError, match=error):
            run(*words, *more)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("max_accuracy_drop", 0.01, "max_accuracy_drop 0.0200 instead of 0.01"),
        ("min_accuracy", 0.98, "min_accuracy 0.9700 instead of 0.98"),
        ("max_cost", 0.1, "max_cost 0.2000 instead of 0.1"),
        *[("max_accuracy_drop", 0.03, ""), ("min_accuracy", 0.96, ""), ("max_cost", 0.3, "")],
    ],
)
def test_a_budget_that_test_images_break_is_said(kind, value, words):
    early = benchmark.Evaluation(100, 0.97, 0.2, 0.2, (), (), (), ())
    found = benchmark.Bench(0.99, early, {}, (), (), (), "compact", "", {})
    said = _excess(found, kind, value)
    assert said == (words and f"the budget is not kept on the test images: {words}")


def test_the_cheapest_criterion_is_taken_and_the_curve_is_even():
    def chosen(cost, accuracy):
        return bench_calibration(cost, accuracy)

    three = {"a": chosen(0.5, 0.9), "b": chosen(0.3, 0.8), "c": chosen(0.3, 0.85)}
    assert _best(three, "max_accuracy_drop") == "c"
    assert _best(three, "max_cost") == "a"
    front = [chosen(cost, cost) for cost in (0.1, 0.11, 0.12, 0.3, 0.5)]
    assert [point.cost for point in _by_cost(front, 3)] == [0.1, 0.3, 0.5]
    assert _by_cost(front[:1], 3) == front[:1]
    assert _by_cost([], 3) == []


def bench_calibration(cost, accuracy):
    return eefast.thresholds.calibration.Calibration("learned", (0.5,), accuracy, cost)
