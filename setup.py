"""Decide which C++ extension to build; everything else is in pyproject.toml.

`python setup.py cuda` compiles the CUDA kernels alone, which needs no torch, so that it can run while pip brings torch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

GENERATIONS = "8.0;8.6;8.9;9.0a;10.0+PTX"
"""GPUs that the CUDA kernels are compiled for unless TORCH_CUDA_ARCH_LIST names others."""


def nvcc() -> str | None:
    """Path of the CUDA compiler, or None where it is missing or switched off; no GPU is needed."""
    if os.environ.get("EEFAST_USE_CUDA", "1") == "0" or os.environ.get("SANITIZE") == "1":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home) / "bin" / "nvcc") for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, places) if found), None)


def targets() -> list[str]:
    """Nvcc options for the GPUs in TORCH_CUDA_ARCH_LIST: "8.0 9.0a 10.0+PTX", separated by spaces or semicolons."""
    options = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", GENERATIONS).replace(";", " ").split():
        number, portable = name.removesuffix("+PTX").replace(".", ""), name.endswith("+PTX")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if portable:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def cuda_objects(compiler: str, folder: Path = Path("build/cuda")) -> list[str]:
    """Object files of csrc/cuda/*.cu, all compiled at the same time; those newer than every source are kept."""
    headers = [path for pattern in ("*.cuh", "*.h") for path in Path("csrc").rglob(pattern)]
    folder.mkdir(parents=True, exist_ok=True)
    objects, running = [], []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        target = folder / f"{source.stem}.o"
        objects.append(str(target))
        command = [compiler, "-std=c++17", "-O3", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden", *targets()]
        stamp = target.with_suffix(".command")
        newest = max(path.stat().st_mtime for path in (source, *headers))
        known = target.exists() and stamp.exists() and stamp.read_text() == " ".join(command)
        if not known or target.stat().st_mtime < newest:
            running.append((subprocess.Popen([*command, "-c", str(source), "-o", str(target)]), stamp, command))
    for process, stamp, command in running:
        if process.wait() != 0:
            raise SystemExit(f"eefast: {command[0]} failed; EEFAST_USE_CUDA=0 installs without the CUDA kernels")
        stamp.write_text(" ".join(command))
    return objects


def cudart(compiler: str) -> str:
    """Folder of the static CUDA runtime, which finds a driver at run time and also loads without one."""
    for home in (Path(compiler).resolve().parent.parent, Path(compiler).parent.parent, Path("/usr/local/cuda")):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (home / folder / "libcudart_static.a").exists():
                return str(home / folder)
    raise SystemExit(f"eefast: no libcudart_static.a near {compiler}; set EEFAST_USE_CUDA=0 to install without CUDA")


def cpp_problem() -> str | None:
    """Why the C++ kernels cannot be built, or None; tried on a small library."""
    if sys.platform == "win32":
        return "Windows is not supported"
    compiler = os.environ.get("CXX", "c++").split()
    if not compiler or shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({' '.join(compiler)})"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        command = [*compiler, "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        source = "#include <concepts>\n#include <string>\ntemplate <std::integral T> std::string text(T);"
        result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if result.returncode or not library.exists():
            return f"{' '.join(compiler)} does not compile C++20: {result.stderr.strip()[-500:] or 'no message'}"
    return None


def interface(cuda: bool) -> str:
    """A source that includes all of csrc/*.cpp: what takes the compiler's time is torch's headers, read once so."""
    sources = sorted(path for path in Path("csrc").glob("*.cpp") if cuda or not path.stem.endswith("_cuda"))
    text = "".join(f'#include "{path.name}"\n' for path in sources)
    target = Path("build") / f"interface{'_cuda' * cuda}.cpp"
    target.parent.mkdir(exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return str(target)


def widest() -> list[str]:
    """Under sanitizers the instructions of this machine suffice: where it has AVX-512, kernels without are not run."""
    processors = Path("/proc/cpuinfo")
    return ["-DEEFAST_WIDEST"] if processors.exists() and "avx512_vnni" in processors.read_text() else []


def extensions() -> tuple[list, dict]:
    """The C++ kernels; without a working compiler or with EEFAST_USE_CPP=0 nothing, and a warning says so.

    EEFAST_USE_CPP=1 turns that warning into an error.
    """
    wanted = os.environ.get("EEFAST_USE_CPP", "")
    problem = "EEFAST_USE_CPP=0" if wanted == "0" else cpp_problem()
    if problem is not None and wanted == "1":
        raise SystemExit(f"eefast: EEFAST_USE_CPP=1, but {problem}; set CXX to a C++20 compiler")
    if problem is not None:
        print(f"eefast: warning: {problem}; installing without the C++ kernels", file=sys.stderr)
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cuda = nvcc()
    if cuda is None:
        print("eefast: no CUDA toolkit (nvcc); installing without the CUDA kernels", file=sys.stderr)

    optimise = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-g0"]
    sanitize: list[str] = []
    if os.environ.get("SANITIZE") == "1":
        # Python's compiler flags define signed overflow, which would hide it from the sanitizer.
        optimise = ["-O1", "-g1", "-fno-wrapv", "-DEEFAST_SANITIZED", *widest()]
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    extension = CppExtension(
        "eefast._C",
        [interface(cuda is not None), *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        depends=sorted(str(path) for pattern in ("*.h", "*.cpp") for path in Path("csrc").rglob(pattern)),
        include_dirs=[str(Path("csrc").resolve())],
        # Only torch's stable interface, as of 2.11, is used: one library serves every later torch and every Python.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=["-std=c++20", "-fvisibility=hidden", *optimise, *sanitize],
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    if cuda is None:
        return [extension], {"build_ext": BuildExtension}
    extension.library_dirs.append(cudart(cuda))
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]

    compiler_of_cuda: str = cuda

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            extension.extra_objects += cuda_objects(compiler_of_cuda)
            super().build_extensions()

    return [extension], {"build_ext": Build}


if sys.argv[1:] == ["cuda"]:
    if os.environ.get("EEFAST_USE_CPP") != "0" and cpp_problem() is None and (found := nvcc()) is not None:
        cuda_objects(found)
    sys.exit()
ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass, options={"bdist_wheel": {"py_limited_api": "cp310"}})
