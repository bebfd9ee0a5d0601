"""`eefast bench`: thresholds from held-out images, what one image at a time gives too, errors before work starts."""

import json
import sys

import pytest
import torch
from command_line import held_out_of, run
from networks import one_by_one

import eefast
from eefast import cli
from eefast.data import datasets
from eefast.measure import baselines


def accuracy(answer, labels):
    return pytest.approx(float((answer.labels == labels).double().mean()))


def test_a_wrong_answer_gets_no_speed_and_exit_code_1(shop, monkeypatch, tmp_path, capsys):
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


@pytest.fixture(scope="module")
def benched(shop, tmp_path_factory):
    """A network that the command chose thresholds for and saved, its folder, what was printed and the report."""
    net, folder = eefast.load(shop / "net"), tmp_path_factory.mktemp("benched")
    net.save(folder / "net")
    held_out = ["--held-out", 31, "--few-images", "--seed", 5]
    sizes = ["--batch-sizes", "4,1", "--images", 20, "--seconds", 0]
    places = ["--figure", folder / "a.png", "--json", folder / "a.json"]
    done = run("bench", folder / "net", "--data-root", shop, *held_out, *sizes, "--max-cost", 0.7, "--save", *places)
    return net, folder, done.stdout, json.loads((folder / "a.json").read_text())


def test_the_best_criterion_is_taken_and_saved(benched):
    _, folder, _, report = benched
    assert set(report["chosen"]) == set(eefast.criteria.CRITERIA) == set(report["criteria"])
    best = max(report["chosen"].values(), key=lambda c: (c["accuracy"], -c["cost"]))
    assert (report["criterion"], report["thresholds"]) == (best["criterion"], best["thresholds"])
    saved = eefast.load(folder / "net")
    assert (saved.criterion.name, saved.thresholds.tolist()) == (best["criterion"], best["thresholds"])
    assert set(json.loads((folder / "net" / "thresholds.json").read_text())) == set(report["chosen"])


@pytest.mark.parametrize("name", eefast.criteria.CRITERIA)
def test_figures_are_those_of_one_image_at_a_time(shop, benched, name):
    net, _, _, report = benched
    chosen = report["chosen"][name]
    early = net.with_criterion(name, chosen["thresholds"])
    kept, labels = held_out_of(shop, 31, 5)
    assert chosen["accuracy"] == accuracy(one_by_one(early, net.prepare(kept)), labels)
    test = datasets.dataset("mnist", shop, "test")
    chosen_at = torch.randperm(41, generator=torch.Generator().manual_seed(0))[:20]
    answer = one_by_one(early, net.prepare(test.images[chosen_at]))
    assert report["criteria"][name][0] == accuracy(answer, test.labels[chosen_at])
    assert report["criteria"][name][1] == pytest.approx(float(answer.cost.mean()), abs=1e-6)


def test_each_batch_size_gets_a_verdict(benched):
    _, folder, said, report = benched
    assert (folder / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [verdict["batch_size"] for verdict in report["verdicts"]] == [1, 4]
    for text in ("batch 1: ", "batch 4: ", "realised ratio", "not compared: torch.compile", "saved: "):
        assert text in said
    assert report["environment"]["threads"] == torch.get_num_threads()


def test_the_network_s_thresholds_need_no_training_images(shop, benched, tmp_path):
    """And only JSON goes to stdout."""
    _, folder, _, before = benched
    for stem in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (tmp_path / f"t10k-{stem}").write_bytes((shop / f"t10k-{stem}").read_bytes())
    words = ["bench", folder / "net", "--data-root", tmp_path, "--batch-sizes", 4, "--seconds", 0]
    done = run(*words, "--own-thresholds", "--figure", tmp_path / "b.png", "--json", "-")
    report = json.loads(done.stdout)
    assert (report["criterion"], report["thresholds"]) == (before["criterion"], before["thresholds"])
    assert (report["bound"], report["chosen"], report["curve"]) == (None, {}, [])
    with pytest.raises(FileNotFoundError, match="or keep the network's thresholds: --own-thresholds"):
        run(*words)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--batch-sizes 1,x", r"batch_sizes='1,x' must be numbers from 1 on"),
        ("--batch-sizes 0,4", r"batch_sizes='0,4' must be numbers from 1 on"),
        ("--batch-sizes 64", r"batch_sizes='64': there are only 41 test images"),
        ("--dtype int8", r"dtype='int8' is unknown; choose one of float32, float16, bfloat16"),
        ("--own-thresholds --save", "own_thresholds=True chooses nothing"),
        ("--own-thresholds --max-cost 0.5", "own_thresholds=True chooses nothing"),
        ("--own-thresholds --criterion margin", "own_thresholds=True chooses nothing"),
        ("--min-accuracy 0.5 --max-cost 0.5", r"min_accuracy=0.5, max_cost=0.5: give one of them"),
        ("--criterion best", r"criterion='best' is unknown"),
        ("--figure no/a.png", "there is no folder"),
    ],
)
def test_it_refuses_before_it_works(shop, tmp_path, monkeypatch, words, error):
    monkeypatch.chdir(tmp_path)
    start = ["bench", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]
    with pytest.raises(ValueError, match=error):
        run(*start, *words.split())
    assert not list(tmp_path.iterdir())


def test_int8_is_one_more_way(shop, tmp_path):
    words = ["--data-root", shop, "--held-out", 31, "--few-images", "--seed", 5, "--max-cost", 0.7, "--seconds", 0]
    places = ["--figure", tmp_path / "a.png", "--json", tmp_path / "a.json"]
    done = run(
        "bench", shop / "net", *words, "--criterion", "margin", "--batch-sizes", "4", "--images", 20, "--int8", *places
    )
    report = json.loads((tmp_path / "a.json").read_text())
    net = eefast.load(shop / "net").with_criterion(report["criterion"], report["thresholds"])
    images, labels = held_out_of(shop, 31, 5)
    # As made here: by chance the thresholds are chosen from the same images as the ranges.
    expected = eefast.quantize(net, images, labels)
    tests = datasets.dataset("mnist", shop, "test")
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))[:20]
    before, after = (one_by_one(n, n.prepare(tests.images[order])) for n in (net, expected))
    rows = [row for row in report["rows"] if row["name"] == "INT8, resident"]
    assert len(rows) == 1
    for row in rows:
        assert row["accuracy"] == accuracy(after, tests.labels[order])
        assert row["other_classes"] == float((before.labels != after.labels).double().mean())
        assert row["exits"] == after.exit_index.bincount(minlength=net.num_exits + 1).tolist()
    assert {row["other_classes"] for row in report["rows"] if "INT8" not in row["name"]} == {None}
    # It is never what is proposed, nor what the others are measured against.
    assert "INT8" not in report["code"]
    assert all("INT8" not in verdict["static"] + verdict["engine"] for verdict in report["verdicts"])
    assert "other classes" in done.stdout


def test_a_folder_in_int8_is_benched_as_any_network(shop, tmp_path):
    run("quantize", shop / "net", "--data-root", shop, "--output", tmp_path / "int8", "--keep-thresholds",
        "--held-out", 31)  # fmt: skip
    words = ["--own-thresholds", "--batch-sizes", "4", "--images", 20, "--seconds", 0, "--figure", tmp_path / "a.png"]
    report = json.loads(run("bench", tmp_path / "int8", "--data-root", shop, *words, "--json", "-").stdout)
    assert "resident" in {row["name"] for row in report["rows"]}
    assert "--int8" in report["left_out"]["ONNX Runtime"]


@pytest.mark.parametrize("options", [["--own-thresholds"], ["--dtype", "bfloat16"]])
def test_int8_needs_held_out_images_and_float32(shop, options):
    with pytest.raises(ValueError, match="int8=True needs held-out images and dtype=float32"):
        run("bench", shop / "net", "--data-root", shop, "--int8", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "tensorrt"], "stages='tensorrt' is unknown; choose one of auto, pytorch, onnxruntime"),
        (["--stages", "compile", "--dtype", "bfloat16"], "stages='compile' runs stages in float32; leave out"),
    ],
)
def test_stages_that_cannot_run_are_refused_before_work_starts(shop, options, message):
    with pytest.raises(ValueError, match=message):
        run("bench", shop / "net", "--data-root", shop, *options)
