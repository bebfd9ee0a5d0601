"""A fresh clone → seconds of each step of a newcomer: set-up, demo, the quick start's commands on own images.

    make first-hour                             # with published weights, which the quick start fetches
    make first-hour FIRST_HOUR=--random-weights # where nothing can be fetched but packages

It clones this repository as it is committed into a temporary folder, which takes 6 GB while it runs, and makes
photographs of two kinds, 120 to train on and ten to classify. The commands are read from docs/quick-start.md. It fails
where a command does, or where the sums are over their limits.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from documents import blocks
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"clone, set-up, demo": 5 * 60, "own images": 10 * 60}
"""Seconds."""

Step = tuple[str, Callable[[], None]]


def photographs(folder: Path, train: int = 60, to_classify: int = 5) -> list[Path]:
    """Discs called cat and squares called dog on noise, JPEG and PNG files of several sizes; those to classify."""
    random, found = np.random.default_rng(0), []
    for split, count in (("train", train), ("val", to_classify)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = (int(n) for n in random.integers(180, 400, 2))
                image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
                x, y, r = (int(n) for n in random.integers([60, 60, 30], [width - 60, height - 60, 60]))
                draw = ImageDraw.Draw(image)
                shape = draw.ellipse if name == "cat" else draw.rectangle
                shape((x - r, y - r, x + r, y + r), fill=tuple(int(n) for n in random.integers(0, 256, 3)))
                path = folder / split / name / f"{i}.{'jpg' if split == 'train' else 'png'}"
                image.save(path)
                found += [path] if split == "val" else []
    Image.open(found[0]).save(folder.parent / "cat.jpg")
    return found


def commands(random_weights: bool) -> list[list[str]]:
    """Those of the quick start after the demo, by which an own backbone gets exits; without the server's."""
    lines = [line for block in blocks("docs/quick-start.md", "bash") for line in block.commands]
    chosen = []
    for words in map(shlex.split, lines):
        if words[0] != "eefast" or words[1] in ("demo", "serve") or "--net" in words:
            continue
        if random_weights and "--weights" in words:
            at = words.index("--weights")
            words = [word for i, word in enumerate(words) if i not in (at, at + 1) and word != "--download"]
        chosen.append(words)
    return chosen


def steps(folder: Path, images: list[Path], random_weights: bool) -> dict[str, list[Step]]:
    """What is timed, by the limit that it counts for."""
    clone, program = folder / "clone", folder / "clone/.venv/bin/eefast"

    def started(*words: object, cwd: Path = folder) -> Callable[[], None]:
        return lambda: run(list(map(str, words)), cwd)

    first = [
        ("clone", started("git", "clone", "--quiet", ROOT, clone)),
        ("set-up (make demo, packages from the registry)", started("make", "--silent", ".venv/.ready", cwd=clone)),
        ("make demo", started("make", "--silent", "demo", cwd=clone)),
    ]
    own = []
    for words in commands(random_weights):
        given = [*words[1:3], *images] if words[1] == "predict" else words[1:]
        own.append((" ".join(words[:2]), started(program, *given)))
    own.append(("eefast serve, one image", lambda: served(program, folder)))
    return dict(zip(LIMITS, (first, own), strict=True))


def variables() -> dict[str, str]:
    """Those of this process, without what a newcomer has not set."""
    without = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in without}


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, env=variables(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"{shlex.join(words)} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def served(program: Path, folder: Path) -> None:
    """Start the server of the quick start, ask it for one image, end it."""
    words = [str(program), "serve", "runs/mine", "--port", "8000"]
    server = subprocess.Popen(words, cwd=folder, env=variables(), stderr=subprocess.DEVNULL)
    request = Request(
        "http://127.0.0.1:8000/v1/predict", (folder / "cat.jpg").read_bytes(), {"Content-Type": "image/jpeg"}
    )
    try:
        while True:
            try:
                answer = json.load(urlopen(request, timeout=60))
            except OSError as error:
                if server.poll() is not None:
                    raise ValueError("eefast serve runs/mine --port 8000 ended; is the port taken?") from error
                time.sleep(0.1)
            else:
                break
        if "label" not in answer:
            raise ValueError(f"eefast serve answered {answer}")
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", action="store_true", help="train the backbone from random weights")
    parser.add_argument("--json", type=Path, help="file for the seconds")
    options = parser.parse_args()
    sums = {}
    with tempfile.TemporaryDirectory(prefix="eefast_first_hour_") as name:
        images = photographs(Path(name) / "photos")
        for limit, timed in steps(Path(name), images, options.random_weights).items():
            sums[limit] = 0.0
            for what, step in timed:
                begin = time.perf_counter()
                step()
                seconds = time.perf_counter() - begin
                sums[limit] += seconds
                print(f"{seconds:7.1f} s  {what}", flush=True)
            print(f"{sums[limit]:7.1f} s  {limit}, of {LIMITS[limit]} allowed", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**sums, "random_weights": options.random_weights}, indent=1) + "\n")
    return int(any(sums[limit] > most for limit, most in LIMITS.items()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
