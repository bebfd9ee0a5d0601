"""The built library and every Triton kernel, compiled here → a folder that `bench/gpu.sh` takes where a GPU is.

What was compiled has a key in Triton's cache that its own files are part of; they may differ there, as for another
Python. So `--place` gives each kernel its key on that machine, if the release of Triton is the same. A kernel that is
missing, or called in another way, is compiled there as without a pack.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

import triton
from triton import knobs
from triton.runtime import cache

ROOT = Path(__file__).resolve().parents[2]
PACKED = "packed.json"


def pack(folder: Path, library: Path, capability: int, names: Iterable[str], compilers: Executor) -> list[str]:
    """Makes the folder; what did not compile. names: of variants in `aot.variants`; compilers: from `aot.compilers`."""
    if folder.exists():
        shutil.rmtree(folder)
    kernels = folder / "triton"
    kernels.mkdir(parents=True)
    shutil.copy(library, folder / "_C.abi3.so")
    keys, failures = dict[str, str](), list[str]()
    jobs = {
        name: compilers.submit(compiled, name, capability, kernels / str(number)) for number, name in enumerate(names)
    }
    for number, (name, job) in enumerate(jobs.items()):
        try:
            keys[str(number)] = job.result()
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    packed = {"triton": triton.__version__, "capability": capability, "keys": keys}
    (kernels / PACKED).write_text(json.dumps(packed, indent=1))
    return failures


def compiled(name: str, capability: int, target: Path) -> str:
    """Compiles a variant into a folder; its key in the cache without the part that names Triton's files."""
    import aot
    from triton.compiler.compiler import make_backend

    source, gpu, options, _ = aot.prepare(aot.variants()[name][0], capability)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        triton.compile(source, target=gpu, options=options.__dict__)
        (made,) = Path(folder).iterdir()
        backend = make_backend(gpu)
        parsed = backend.parse_options(options.__dict__ | source.parse_options())
        variables = knobs_in_keys()
        key = cache.get_cache_key(source, backend, parsed, env_vars=variables).removeprefix(cache.triton_key())
        if made.name != folder_of(key):
            raise RuntimeError(f"Triton {triton.__version__} makes keys in another way than tests/helpers/gpu_pack.py")
        shutil.move(made, target)
    return key


def knobs_in_keys() -> dict[str, str]:
    """The environment variables that Triton's keys contain."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return get_cache_invalidating_env_vars()


def folder_of(key: str) -> str:
    """Where the cache of this Triton looks for a kernel; key: without the part that names its files."""
    digest = hashlib.sha256((cache.triton_key() + key).encode()).digest()
    return base64.b32encode(digest).decode().rstrip("=")


def place(kernels: Path) -> int:
    """Makes the folder with packed kernels this machine's TRITON_CACHE_DIR; how many were placed, each time it is run.

    Raises `ValueError` where they were compiled by another release of Triton.
    """
    packed = json.loads((kernels / PACKED).read_text())
    if packed["triton"] != triton.__version__:
        raise ValueError(f"packed by Triton {packed['triton']}, here is {triton.__version__}; its kernels are not used")
    with knobs.cache.scope():
        knobs.cache.dir = str(kernels)
        for number, key in packed["keys"].items():
            target = kernels / folder_of(key)
            if (kernels / number).exists():
                shutil.rmtree(target, ignore_errors=True)
                (kernels / number).rename(target)
            # A kernel's files are listed by their absolute paths.
            for listed in target.glob("__grp__*"):
                files = json.loads(listed.read_text())["child_paths"]
                listed.write_text(json.dumps({"child_paths": {name: str(target / name) for name in files}}))
    return len(packed["keys"])


def generations(library: Path) -> set[str]:
    """GPUs that the library has machine code for, as in {"80", "90a"}."""
    command = [knobs.nvidia.cuobjdump.path, "--list-elf", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    return set(re.findall(r"\.sm_(\w+)\.cubin", done.stdout))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-pack", help="default: build/gpu-pack")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 80, 86, 89, 90 or 100; default 90")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels with this in their variant's name")
    parser.add_argument("--place", type=Path, metavar="FOLDER", help="on the machine with the GPU: the folder `triton`")
    asked = parser.parse_args(arguments)
    if asked.place is not None:
        try:
            print(f"{place(asked.place)} kernels placed in {asked.place}")
        except (OSError, ValueError) as error:
            print(f"{asked.place}: {error}", file=sys.stderr)
            return 1
        return 0
    import aot

    library = next((ROOT / "eefast").glob("_C*.so"), None)
    if library is None:
        parser.error("the C++ kernels are not built; run `make` first")
    if str(asked.capability) not in {name.rstrip("af") for name in generations(library)}:
        parser.error(f"{library} has no kernels for sm_{asked.capability}; build it where nvcc is, for this generation")
    names = [name for name in aot.variants() if asked.only in name]
    with aot.compilers(2) as compilers:
        failures = pack(asked.folder, library, asked.capability, names, compilers)
    for failure in failures:
        print(failure, file=sys.stderr)
    size = sum(file.stat().st_size for file in asked.folder.rglob("*") if file.is_file())
    print(
        f"{size / 1e6:.0f} MB in {asked.folder}, compiled by Triton {triton.__version__}; on the machine with the GPU:"
    )
    place_of = asked.folder.relative_to(ROOT) if asked.folder.is_relative_to(ROOT) else asked.folder
    print(f"EEFAST_LIBRARY={place_of}/_C.abi3.so TRITON_CACHE_DIR={place_of}/triton bench/gpu.sh")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
