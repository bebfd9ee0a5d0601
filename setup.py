"""Decide which C++ extension to build; everything else stands in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup


def extensions() -> tuple[list, dict]:
    """The CPU kernels where a C++ compiler is found; nothing, said out loud, where none is or EEFAST_USE_CPP=0."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    missing = None
    if os.environ.get("EEFAST_USE_CPP", "1") == "0":
        missing = "EEFAST_USE_CPP=0"
    elif sys.platform == "win32":
        missing = "Windows is not supported"
    elif shutil.which(compiler) is None:
        missing = f"no C++ compiler ({compiler})"
    if missing is not None:
        print(f"eefast: {missing}; installing without the C++ kernels", file=sys.stderr)
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    optimise = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-g0"]
    sanitize: list[str] = []
    if os.environ.get("SANITIZE") == "1":
        # Python's own flags would define signed overflow, which then went unseen.
        optimise, sanitize = ["-O1", "-g", "-fno-wrapv"], ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    extension = CppExtension(
        "eefast._C",
        sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        include_dirs=[str(Path("csrc").resolve())],
        # Only torch's stable interface, as of 2.11, is used: one library serves every later torch and every Python.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=["-std=c++20", "-fvisibility=hidden", *optimise, *sanitize],
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return [extension], {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass, options={"bdist_wheel": {"py_limited_api": "cp310"}})
