"""How commands end, by errors, signals, missing packages: exit code, one line, no half-written file, no process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx_bytes
from networks import lived_in

import eefast_command
from eefast import zoo
from eefast.cli import ending
from eefast.data import mnist
from eefast.system import files

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def own_handlers():
    before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGALRM)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeError("a fault"), 1, "a fault"),
        (RuntimeError("two\n  lines"), 1, "two lines"),
        (files.WriteError("x cannot be written"), 1, "x cannot be written"),
        (MemoryError(), 1, "MemoryError"),
        (ValueError("x=3 must be 4"), 2, "x=3 must be 4"),
        (FileNotFoundError(2, "No such file", "x"), 2, "[Errno 2] No such file: 'x'"),
        (ImportError("no timm"), 2, "no timm"),
        (ModuleNotFoundError("No module named 'lightning'", name="lightning.pytorch"), 2,
         'lightning is not installed; pip install "eefast[train]" brings it, eefast[demo] all of the commands'),
        (ModuleNotFoundError("No module named 'other'", name="other"), 2, "No module named 'other'"),
        (KeyboardInterrupt("--resume goes on"), 130, "interrupted by Ctrl-C; --resume goes on"),
        (SystemExit(), 0, None), (SystemExit(2), 2, None), (SystemExit("words"), 1, "words"),
        (BrokenPipeError(), 1, None),
    ],
)  # fmt: skip
def test_exit_codes_and_lines(capsys, error, code, line):
    before = [signal.getsignal(number) for number in STOPS]
    assert ending.run(raising(error)) == code
    assert capsys.readouterr().err == ("" if line is None else f"error: {line}\n")
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        ending.run(lambda: 1 // 0)


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("way", ["directly", "as SystemExit", "as another error", "in a library that goes on"])
def test_signals_end_a_command(capsys, number, way):
    def command():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            # More of them, as from a hurried user, do not break into the cleaning up.
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            if way == "as SystemExit":
                raise SystemExit(1) from None
            if way == "as another error":
                raise RuntimeError("DataLoader worker exited unexpectedly") from None
            if way == "directly":
                raise KeyboardInterrupt("--resume goes on") from None

    assert ending.run(command) == 128 + number
    said = {
        signal.SIGINT: "interrupted by Ctrl-C",
        signal.SIGTERM: "ended by SIGTERM",
        signal.SIGHUP: "ended by SIGHUP",
    }
    more = "; --resume goes on" if way == "directly" else ""
    assert capsys.readouterr().err == f"error: {said[number]}{more}\n"


class Slow:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOPS)
def test_signals_in_a_destructor_end_a_command(capsys, number):
    """Python prints what is raised there and goes on."""
    ended = []

    def command():
        Slow(number)
        time.sleep(5)
        ended.append("not at all")

    assert ending.run(command) == 128 + number
    assert not ended
    assert "Exception ignored" not in capsys.readouterr().err


def test_what_the_parent_ignores_stays_ignored():
    """As nohup does with SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert ending.run(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_commands_run_in_other_threads_too():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(ending.run(raising(ValueError("x")))))
    thread.start()
    thread.join()
    assert codes == [2]


def test_a_signal_while_files_are_written_leaves_old_or_new_ones(tmp_path):
    """At 60 moments, some of them within a write."""
    for name in "ab":
        (tmp_path / name).write_bytes(b"0" * 300_000)
    begin, broken = 0, 0
    for attempt in range(1, 61):

        def command(attempt=attempt):
            timer = threading.Timer(attempt * 1e-4, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
            try:
                for _ in range(100):
                    with files.together():
                        for name in "ab":
                            files.write(tmp_path / name, b"%d" % (attempt % 10) * 300_000)
            finally:
                timer.join()

        assert ending.run(command) == 143
        contents = [(tmp_path / name).read_bytes() for name in "ab"]
        assert contents[0] == contents[1]
        assert len(contents[0]) == 300_000
        assert len(set(contents[0])) == 1
        broken += contents[0][0] == begin
        begin = contents[0][0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def catches(process, number):
    """Whether a process has a handler for a signal, which Linux tells."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1


def test_signals_while_pytorch_is_imported():
    """As soon as the command has handlers, and while it imports: Python itself would show a traceback, or nothing."""
    script, module = [str(Path(sys.executable).with_name("eefast"))], [sys.executable, "-m", "eefast"]
    started = [
        (number, after, subprocess.Popen([*command, "demo"], stderr=subprocess.PIPE, text=True))
        for command, number, after in (
            (script, signal.SIGINT, 0),
            (script, signal.SIGTERM, 0.2),
            (script, signal.SIGHUP, 0),
            (module, signal.SIGINT, 0),
            (module, signal.SIGTERM, 0.5),
        )
    ]
    for number, after, process in started:
        while process.poll() is None and not catches(process, signal.SIGTERM):
            time.sleep(0.002)
        time.sleep(after)
        process.send_signal(number)
    for number, after, process in started:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (128 + number, f"error: {eefast_command.STOPS[number]}\n"), after


def test_extras_bring_what_they_are_said_to_bring():
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    packages = {"yaml": "pyyaml", "PIL": "pillow", "prometheus_client": "prometheus-client"}
    for module, extra in ending.EXTRAS.items():
        assert packages.get(module, module) in extras[extra]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A network, images enough for commands that take long, and image files of which one is cut off."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("shop")
    images, labels = mnist.mnist_test()
    for stem, n in (("train", 1500), ("t10k", 10_000)):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images[:n, 0].numpy()))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:n].to(torch.uint8).numpy()))
    lived_in(zoo.eenet("eenet8", input_shape=(1, 28, 28), normalization=((0.1,), (0.3,))), 1).save(folder / "net")
    random = np.random.default_rng(0)
    for name in ("blue", "red"):
        (folder / "photos" / "train" / name).mkdir(parents=True)
        for i in range(40):
            path = folder / "photos" / "train" / name / f"{i:02}.png"
            Image.fromarray(random.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    # The header is whole, so the file is taken for an image until it is decoded.
    path.write_bytes(path.read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def in_forks():
    """Runs jobs in forks of one process, since a start of Python takes seconds."""
    script = Path(__file__).parents[1] / "helpers" / "commands_in_forks.py"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True) as process:

        def run(jobs):
            for job in jobs:
                print(json.dumps(job), file=process.stdin, flush=True)
                yield json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_every_command_stops_at_a_signal(shop, in_forks, tmp_path, which):
    """Ctrl-C, which goes to the worker processes too, and SIGTERM, which does not."""
    eenet, mnist = str(shop / "net"), ["--dataset", "mnist", "--data-root", str(shop)]
    slow, to = [*mnist, "--batch-size", "1", "--workers", "2"], str(tmp_path / "written")
    train = ["train", "--net", "eenet8", "--num-exits", "2", "--epochs", "1000", "--workers", "2", "--held-out", "1000"]
    commands = [
        ([*train, *mnist, "--output", str(tmp_path / "run"), "--device", "cpu"], 0.2),
        (
            [
                "calibrate",
                eenet,
                *slow,
                "--held-out",
                "1500",
                "--no-assurance",
                "--save",
                "--cache",
                to,
                "--json",
                f"{to}.json",
            ],
            0.5,
        ),
        (["evaluate", eenet, *slow, "--json", f"{to}.json"], 0.5),
        (["plot", eenet, *slow, "--same-images", "--output", f"{to}.png"], 0.5),
        (["bench", eenet, *mnist, "--own-thresholds", "--seconds", "60", "--figure", f"{to}.png"], 1.0),
        (["demo", "--rounds", "1000", "--figure", f"{to}.png"], 0.5),
        (["calibrate-device", "--json", f"{to}.json"], 0.3),
    ]
    commands = commands if which == "all" else [commands[0], commands[6]]
    network = {path.name: path.read_bytes() for path in (shop / "net").iterdir()}
    stops = [(signal.SIGINT, True), (signal.SIGTERM, False)]
    jobs = [
        {
            "words": words,
            "signal": stops[(i + j) % 2][0],
            "group": stops[(i + j) % 2][1],
            "after": after,
            "seen": "epoch 2/" if words[0] == "train" else "",  # after the checkpoint of the first
            "slow_gpu": words[0] == "calibrate-device",
        }
        for i, (words, after) in enumerate(commands)
        for j in range(2 if which == "all" and words[0] == "train" else 1)
    ]
    said = {signal.SIGINT: "error: interrupted by Ctrl-C", signal.SIGTERM: "error: ended by SIGTERM"}
    for job, found in zip(jobs, in_forks(jobs), strict=True):
        what = f"{job['words'][0]}: {found}"
        assert found["code"] == 128 + job["signal"], what
        assert "Traceback" not in found["err"], what
        last = found["err"].splitlines()[-1]
        assert last.startswith(said[job["signal"]]), what
        assert sum("error" in line or "abort" in line.lower() for line in found["err"].splitlines()) == 1, what
        assert not found["left"], what
        if job["words"][0] == "train":
            assert "--resume (resume=True) goes on after epoch" in last, what
    assert {path.name: path.read_bytes() for path in (shop / "net").iterdir()} == network
    assert not list(tmp_path.rglob("*.partial"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_faults_while_commands_work(shop, in_forks, tmp_path, which):
    """What fails in the middle, and what is not installed: one line, and the exit code in the help."""
    (tmp_path / "file").write_text("text")
    eenet, mnist = str(shop / "net"), ["--dataset", "mnist", "--data-root", str(shop)]
    photos = ["--dataset", "folder", "--data-root"]
    train = ["train", "--net", "eenet8", "--num-exits", "2", "--epochs", "2", "--batch-size", "16", "--device", "cpu"]
    small = [*train, "--held-out", "16", "--image-size", "16", *photos, str(shop / "photos"), "--output"]
    report = str(tmp_path / "report.json")
    cases = [
        # words, what happens to it, exit code, what the line says
        ([*small, str(tmp_path / "a")], {}, 1, "images could not be read"),
        ([*small, str(tmp_path / "b"), "--workers", "2"], {}, 1, "images could not be read"),
        ([*small, str(tmp_path / "file" / "run")], {}, 2, "cannot be made: not a directory|cannot be made: Not a"),
        ([*train, *mnist, "--held-out", "1400", "--output", str(tmp_path / "c")], {"limit": 3000}, 1,
         r"best\.ckpt cannot be written: file too large; .*; no epoch was finished"),
        (["evaluate", eenet, "--dataset", "mnist", "--images", "9", "--json", report], {"limit": 1200}, 1,
         r"report\.json cannot be written: file too large"),
        (["evaluate", eenet, "--dataset", "mnist", "--images", "9", "--json", "/dev/full"], {}, 1,
         "/dev/full cannot be written: no space left on device"),
        (["evaluate", eenet, "--dataset", "mnist", "--json", str(tmp_path / "file" / "x")], {}, 2,
         "cannot be written: there is no folder"),
        (["plot", eenet, "--output", str(tmp_path / "x.gif2")], {}, 2, r"ending must be one of .*png"),
        (["demo", "--figure", "/proc/x.png"], {}, 2, "/proc/x.png cannot be written"),
        (["calibrate", eenet, *mnist, "--held-out", "500", "--save", "--max-cost", "0.7", "--no-assurance"],
         {"limit": 3000}, 1,
         r"model\.safetensors cannot be written: file too large; .* unchanged"),
        (["train", "--num-exits", "99", "--held-out", "500", *mnist], {}, 2, "does not fit: 9 exits fit into 9 blocks"),
        (["train", "--resume", "--output", str(tmp_path / "nothing"), *mnist], {}, 2, "there is no .*last.ckpt"),
        (["demo"], {"missing": ["typer"]}, 2, r'typer is not installed; pip install "eefast\[cli\]"'),
        (["train", *mnist], {"missing": ["lightning"]}, 2, r'lightning .* "eefast\[train\]"'),
        (["bench", eenet], {"missing": ["matplotlib"]}, 2, r'matplotlib .* "eefast\[plot\]"'),
        ([*small, str(tmp_path / "d")], {"missing": ["torchvision"]}, 2, r'torchvision .* "eefast\[train\]"'),
        (["train", "--dataset", "svhn", "--data-root", str(shop)], {"missing": ["scipy"]}, 2, "pip install"),
    ]  # fmt: skip
    network = {path.name: path.read_bytes() for path in (shop / "net").iterdir()}
    cases = cases if which == "all" else cases[::5]
    jobs = [{"words": list(words), **how} for words, how, _, _ in cases]
    for (words, _, code, message), found in zip(cases, in_forks(jobs), strict=True):
        what = f"{words}: {found}"
        assert found["code"] == code, what
        last = found["err"].splitlines()[-1]
        assert last.startswith("error: "), what
        assert pytest.raises(ValueError, match=message).matches(ValueError(last)), what
        assert "Traceback" not in found["err"], what
        assert not found["left"], what
    assert {path.name: path.read_bytes() for path in (shop / "net").iterdir()} == network
    assert not list(tmp_path.rglob("*.partial"))
    assert not Path(report).exists()
    assert not (tmp_path / "nothing").exists()
