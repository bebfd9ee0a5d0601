"""Builds the C++ engines and the loop with ThreadSanitizer and runs them; faults in a copy of team.h must show."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
UNCHANGED = (
    "engines",
    "loop",
    "resident_loop",
    "exit_head",
    "instruction_set",
    "resident_kernels",
    "resident_int8_kernels",
    "program",
)
"""Sources that do not include team.h."""
RELAXED = "memory_order_relaxed"
PROCESSORS = Path("/proc/cpuinfo")
WIDEST = ["-DEEFAST_WIDEST"] if PROCESSORS.exists() and "avx512_vnni" in PROCESSORS.read_text() else []
"""Races do not depend on the width of vectors: one instruction set suffices, the widest where the processor has it."""
SOURCES = (
    *(
        "cpu/exit_head",
        "cpu/instruction_set",
        "cpu/resident",
        "cpu/resident_loop",
        "cpu/resident_kernels",
        "cpu/resident_int8_kernels",
    ),
    "program",
)
FAULTS = (
    ("done_.fetch_add(1, std::memory_order_acq_rel)",),
    (
        "claims_.store(static_cast<uint64_t>(items) << 2 * kBits, std::memory_order_release)",
        "std::memory_order_acq_rel, std::memory_order_acquire",
    ),
)
"""Memory orders of team.h without which there is a race: of the leader's wait for what is done, of a claim."""


PROGRAMS = ("engines", "loop")


def build(folder: Path, *includes: Path, reuse: tuple[str, ...] = ()) -> list[Path]:
    """The programs; `reuse` names sources whose objects are in the folder already."""
    flags = ("-std=c++20", "-O1", "-g1", "-DEEFAST_SANITIZED", "-fsanitize=thread", "-pthread", *WIDEST)
    compiler = [*os.environ.get("CXX", "c++").split(), *flags]
    sources = [ROOT / "csrc" / f"{name}.cpp" for name in SOURCES]
    mains = [ROOT / "tests" / "tsan" / f"{name}.cpp" for name in PROGRAMS]
    include = [f"-I{path}" for path in (*includes, ROOT / "csrc")]
    new = [path for path in (*mains, *sources) if path.stem not in reuse]
    running = [
        subprocess.Popen([*compiler, *include, "-c", str(path), "-o", str(folder / f"{path.stem}.o")]) for path in new
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("the C++ engines do not compile with -fsanitize=thread")
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    for main in mains:
        command = [*compiler, str(folder / f"{main.stem}.o"), *objects, "-o", str(folder / main.stem)]
        subprocess.run(command, check=True)
    return [folder / main.stem for main in mains]


def run(program: Path) -> subprocess.CompletedProcess[str]:
    """Without random addresses where possible: some systems place memory where ThreadSanitizer needs it."""
    command = [str(program)]
    if shutil.which("setarch") and not subprocess.run(["setarch", platform.machine(), "-R", "true"]).returncode:
        command = ["setarch", platform.machine(), "-R", *command]
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(command, env=options, capture_output=True, text=True, timeout=300)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="eefast_tsan_") as name:
        folder = Path(name)
        for program in build(folder):
            found = run(program)
            print(found.stdout + found.stderr[-6000:])
            if found.returncode:
                return 1
        source = (ROOT / "csrc" / "cpu" / "team.h").read_text()
        (folder / "cpu").mkdir()
        for places in FAULTS:
            broken = source
            for place in places:
                assert broken.count(place) == 1, f"team.h no longer has {place}"
                broken = broken.replace(place, re.sub(r"memory_order_(acq_rel|acquire|release)", RELAXED, place))
            (folder / "cpu" / "team.h").write_text(broken)
            found = run(build(folder, folder, reuse=UNCHANGED)[0])
            if found.returncode != 66 or "data race" not in found.stderr:
                print(
                    f"ThreadSanitizer does not notice relaxed order in {places}\n{found.stdout}{found.stderr[-2000:]}"
                )
                return 1
            print(f"a race, as it must be, with relaxed order in {', '.join(places)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
