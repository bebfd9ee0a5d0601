"""All documents: every block of Python runs, every command runs as written or with options that shorten it.

Commands run in `make test-all`, page after page. What no test runs is in `NOT_RUN`, with the reason; pytest prints it.
"""

from __future__ import annotations

import gzip
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
import torchvision
import yaml
from command_line import run
from documents import PAGES, ROOT, Block, blocks
from idx_files import idx_bytes
from networks import images, lived_in, spread_thresholds
from pictures import photograph
from torch import nn

import eefast
from eefast import Preprocessing, zoo
from eefast.data.mnist import mnist_test
from eefast.data.sensors import sensor_windows

NOT_RUN = {
    'pip install ".[demo,serve]"': "needs a registry; make wheel installs the package into new environments",
    "pip install dist/cpu/*.whl": "needs a registry; make wheel installs the wheel into new environments",
    'pip install "eefast[serve] @': "needs a registry; make wheel installs the package into new environments",
    "python bench/ratios.py": "takes minutes; tests/bench/test_ratios.py runs it on small networks",
    "cmake -S": "compiles for a minute; test_exported_files.py runs the three commands in another folder",
    "cmake --build": "compiles for a minute; test_exported_files.py runs the three commands in another folder",
    "build/cpp/run_package": "compiles for a minute; test_exported_files.py runs the three commands in another folder",
}
"""Beginnings of commands that no test runs as they are in the documents."""

ELSEWHERE = {
    ("docs/exit-rules.md", "python"): ("test_exit_rules_document.py", 6),
    ("docs/exporting.md", "python"): ("test_exporting_document.py", 3),
    ("docs/scoring.md", "python"): ("test_scoring_document.py", 3),
    ("docs/scoring.md", "bash"): ("test_scoring_document.py", 4),
    ("docs/serving.md", "yaml"): ("test_serving_document.py", 1),
}
"""Blocks that a test of this page runs, since it checks what comes out; the number of them."""

SHORTER = {
    "demo": "--images 500 --rounds 2",
    "train --net eenet20": "--epochs 1 --train-images 128 --held-out 800",
    "train --dataset folder": "--epochs 1 --train-images 64 --image-size 32",
    "search runs/mine": "--epochs 1 --most-places 3",
    "search timm": "--epochs 1 --most-places 3 --batch-size 16",
    "bench": "--seconds 1 --few-images",
    "bench runs/mine --data-root photos": "--batch-sizes 1,3",
}
"""Beginnings of commands → options that make them quick."""

SMALLER = {
    "docs/attach.md": {
        "(3, 224, 224)": "(3, 64, 64)",
        "(64, 3, 224, 224)": "(3, 3, 64, 64)",
        'resnet50(weights="IMAGENET1K_V2")': "resnet50()",
        'vit_b_16(weights="IMAGENET1K_V1")': "VisionTransformer(224, 32, 12, 4, 96, 192)",
    }
}
"""Of a page's Python: what is replaced, since it is large or has to be fetched."""


def made_up(page: str) -> dict[str, Any]:
    """The names that the Python of a page takes for granted."""
    if page == "docs/attach.md":
        loader = [(images(3, (3, 64, 64)), torch.tensor([0, 1, 2]))]
        return {"make_my_backbone": torchvision.models.resnet50, "loader": loader}
    if page == "docs/design.md":
        return {"eefast": eefast, "x": torch.zeros(1, 3, 32, 32)}
    if page == "docs/rows.md":
        rows = nn.Sequential()
        for i, (c_in, c_out) in enumerate([(6, 8), (8, 8), (8, 16)], 1):
            rows.add_module(
                f"layer{i}", nn.Sequential(nn.Conv1d(c_in, c_out, 3, 2, 1), nn.BatchNorm1d(c_out), nn.ReLU())
            )
        rows.extend([nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 6)])
        return {"eefast": eefast, "backbone": rows.eval(), "sensor_windows": sensor_windows}
    if page in ("docs/partial.md", "docs/quantization.md"):
        net = lived_in(zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)), 1)
        x = images(64, net.input_shape)
        spread_thresholds(net, x, 0.3)
        return {"eefast": eefast, "net": net, "x": x, "images": x, "labels": torch.arange(64) % 10}
    return {}


PYTHON = [page for page in PAGES if blocks(page, "python") and (page, "python") not in ELSEWHERE]
SHELL = [page for page in PAGES if blocks(page, "bash") and (page, "bash") not in ELSEWHERE]
LARGE = ("docs/attach.md",)


def package_of(block: Block) -> str | None:
    """The package without which a block cannot run; its first line says so."""
    first = block.text.partition("\n")[0]
    return first.removeprefix("# with ") if first.startswith("# with ") else None


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs of cats and dogs, and a network for them in runs/mine."""
    folder = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 60), ("val", 3)):
        for seed, name in enumerate(("cat", "dog")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                photograph(36, 40, seed=seed).save(folder / "photos" / split / name / f"{i}.png")
    shutil.copy(folder / "photos/val/cat/0.png", folder / "photos/cat.png")
    for path in ("photos/dog.jpg", "cat.jpg"):
        photograph(40, 50, seed=1).save(folder / path)
    normalization = ((0.5,) * 3, (0.25,) * 3)
    net = lived_in(zoo.eenet("eenet8", 2, num_classes=2, input_shape=(3, 32, 32), normalization=normalization), 1)
    net.preprocessing, net.classes = Preprocessing(32), ("cat", "dog")
    net.profiles = {"normal": [0.9] * 2, "eco": [0.5] * 2}
    net.save(folder / "runs/mine")
    return folder


@pytest.fixture(scope="module")
def digits(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 digits of MNIST in the folder DATA, and in runs/mine the network that the README's first command trains."""
    folder = tmp_path_factory.mktemp("digits")
    shutil.copytree(photographs / "photos", folder / "photos")
    pixels, labels = mnist_test()
    (folder / "DATA").mkdir()
    for stem, part in (("train", slice(0, 1600)), ("t10k", slice(1600, 2000))):
        for kind, array in (("images-idx3", pixels[part].squeeze(1)), ("labels-idx1", labels[part])):
            path = folder / "DATA" / f"{stem}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx_bytes(array.numpy())))
    train(folder, "README.md")
    return folder


@pytest.fixture(scope="module")
def pets(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, and in runs/mine the network that the quick start's first training makes, with profiles."""
    folder = tmp_path_factory.mktemp("pets")
    shutil.copytree(photographs, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "runs")
    train(folder, "docs/quick-start.md")
    net = eefast.load(folder / "runs/mine")
    net.profiles = {"normal": [0.9] * 2, "eco": [0.5] * 2}
    net.save(folder / "runs/mine")
    return folder


def train(folder: Path, page: str) -> None:
    """Run the page's first `eefast train` there."""
    command = next(line for block in blocks(page, "bash") for line in block.commands if line.startswith("eefast train"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        run_eefast(command)


def run_eefast(command: str) -> None:
    words = shlex.split(command)[1:]
    more = [added for start, added in SHORTER.items() if " ".join(words).startswith(start)]
    run(*[{"PHOTOS": "photos"}.get(word, word) for word in words], *shlex.split(" ".join(more)))


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder that the page of a test is about."""
    text = (ROOT / request.node.callspec.params["page"]).read_text()
    data = "digits" if re.search(r"\bDATA\b", text) else "pets"
    source = request.getfixturevalue(data if request.node.originalname == "test_commands_run" else "photographs")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parameters(pages: list[str], slow: Callable[[str], bool]) -> list[Any]:
    return [pytest.param(page, marks=[pytest.mark.slow] if slow(page) else [], id=page) for page in pages]


@pytest.mark.parametrize("page", parameters(PYTHON, lambda page: page in LARGE))
def test_python_runs(page: str, place: Path) -> None:
    names = made_up(page)
    for block in blocks(page, "python"):
        if package_of(block):
            continue
        text = block.text
        for large, small in SMALLER.get(page, {}).items():
            text = text.replace(large, small)
        exec(compile("\n" * (block.line - 1) + text, page, "exec"), names)


@pytest.mark.parametrize("page", SMALLER)
def test_what_is_made_smaller_is_there(page: str) -> None:
    text = "".join(block.text for block in blocks(page, "python"))
    assert all(large in text for large in SMALLER[page])


class Shell:
    """Runs the commands of a page in a folder, those of `eefast` in this process, a server until the page ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def run(self, command: str) -> None:
        words = shlex.split(command)
        if words[0] == "make":
            # What it would do; the commands that it names are tests themselves, or take hours.
            self.other(["make", "--dry-run", "-C", str(ROOT), *words[1:]])
        elif words[:2] == ["eefast", "serve"]:
            self.serve([word.replace("8000", str(self.port)) for word in words[1:]])
        elif words[0] == "eefast" and words[1].startswith("--"):
            # Shell completion looks at the shell that it is called from.
            self.other(["bash", "-c", f"{sys.executable} -m {command}; exit $?"], HOME=str(self.folder))
        elif words[0] == "eefast":
            run_eefast(command)
        elif words[0] == "curl":
            self.other([word.replace(":8000", f":{self.port}") for word in words] + ["--fail", "--max-time", "60"])
        elif words[0] == "python":
            text = command.replace("random 10", "random 1").replace(" tests/", f" {ROOT}/tests/")
            self.other([sys.executable, *shlex.split(text)[1:]])
        else:
            raise AssertionError(f"{command}: nothing runs {words[0]} here")

    def other(self, words: list[str], **variables: str) -> None:
        env = {**os.environ, **variables}
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def serve(self, words: list[str]) -> None:
        self.server = subprocess.Popen([sys.executable, "-m", "eefast", *words], cwd=self.folder)
        wait_for(f"http://127.0.0.1:{self.port}/readyz", self.server)

    def close(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            assert self.server.wait(60) in (0, 143)


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the address answers; the process must live."""
    end = time.monotonic() + seconds
    while True:
        assert process.poll() is None, "the server ended"
        try:
            urlopen(address, timeout=10).close()
        except OSError:
            assert time.monotonic() < end, f"{address} does not answer"
            time.sleep(0.2)
        else:
            return


@pytest.fixture
def shell(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """Published weights lie in the cache, so that nothing is fetched; backbones' weights are random."""
    monkeypatch.setenv("TORCH_HOME", str(place / "cache"))
    made = Shell(place)
    yield made
    made.close()


def weights_of_backbones(folder: Path) -> None:
    """Published weights, and those of a backbone for the two kinds of photographs."""
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (folder / "cache/hub/checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), folder / f"cache/hub/checkpoints/{published}")
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), folder / "resnet18.pt")


def reason_not_to_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL)
def test_commands_run(page: str, shell: Shell) -> None:
    weights_of_backbones(shell.folder)
    for block in blocks(page, "bash"):
        for command in block.commands:
            if reason_not_to_run(command) is None:
                print(f"{block}: {command}", file=sys.stderr)
                shell.run(command)


COMMANDS = [(block, command) for page in SHELL for block in blocks(page, "bash") for command in block.commands]


@pytest.mark.parametrize("start", NOT_RUN)
def test_what_no_test_runs_is_in_the_documents(start: str) -> None:
    found = [f"{block}" for block, command in COMMANDS if command.startswith(start)]
    assert found
    pytest.skip(f"{', '.join(found)}: {start} … is not run: {NOT_RUN[start]}")


def test_every_block_is_run_or_listed() -> None:
    assert len(NOT_RUN) == 7
    found = {(page, kind): len(blocks(page, kind)) for page, kind in ELSEWHERE}
    assert found == {key: count for key, (_, count) in ELSEWHERE.items()}
    for (page, _), (file, _) in ELSEWHERE.items():
        assert f'"{Path(page).name}"' in (ROOT / "tests/repository" / file).read_text()
    for page in PAGES:
        kinds = {block.language for block in blocks(page)}
        assert kinds <= {"python", "bash", "yaml", "text"}, f"{page}: name the language of each block"
        assert "yaml" not in kinds or (page, "yaml") in ELSEWHERE
    starts = ("eefast ", "pip ", "make ", "python ", "curl ", "import ", "from ", "$ ")
    shown = [f"{block}" for page in PAGES for block in blocks(page, "text") if block.text.startswith(starts)]
    assert not shown, "blocks called text that are commands or code"


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page, "yaml")], ids=str)
def test_yaml_is_read(block: Block) -> None:
    assert yaml.safe_load(block.text)


WITH_PACKAGES = [block for page in PYTHON for block in blocks(page, "python") if package_of(block) is not None]
ENDS = {
    "ray": "\nassert serve.status().applications\nserve.shutdown()\n",
    "litserve": "",
}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), [pytest.param(b.page, b, id=str(b)) for b in WITH_PACKAGES])
def test_python_with_other_packages_runs(page: str, block: Block, place: Path) -> None:
    """In a process of its own; a server that never returns is asked whether it is well, then ended."""
    package = package_of(block)
    assert package in ENDS
    if find_spec(package) is None:
        pytest.skip(f"{block}: needs {package}, which is not installed")
    shell = Shell(place)
    text = block.text.replace("8000", str(shell.port)) + ENDS[package]
    # Servers start processes, which import the program again.
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    (place / "program.py").write_text(f'if __name__ == "__main__":\n{lines}')
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "program.py"], cwd=place, env=variables)
    try:
        if package == "litserve":
            wait_for(f"http://127.0.0.1:{shell.port}/health", process)
        else:
            assert process.wait(180) == 0
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
