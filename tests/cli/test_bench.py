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
        early = net.with_criterion(name, chosen["thresholds"])
        assert chosen["accuracy"] == accuracy(one_by_one(early, net.prepare(kept)), labels)
        answer = one_by_one(early, net.prepare(test.images[chosen_at]))
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
