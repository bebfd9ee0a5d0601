"""The name of a class or function in a pickle → whether checkpoints may name it.

Nothing that a file names is ever run, so the lists are no protection: they make an error of a file that wants to run
something, and a name too many in them is no danger.
"""

from __future__ import annotations

import sys

import torch

_MODULES = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple type",
    "collections": "Counter OrderedDict UserDict defaultdict deque",
    "copyreg": "_reconstructor __newobj__",
    "functools": "partial",
    "logging": "Logger getLogger",
    "re": "_compile",
    "time": "struct_time",
    "types": "SimpleNamespace",
    "_codecs": "encode",
    "torch": "Generator Size Tensor device dtype layout memory_format",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
    "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter _rebuild_parameter_with_state "
    "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 "
    "_rebuild_wrapper_subclass",
    "torch.serialization": "_get_layout",
    "torch.torch_version": "TorchVersion",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
}
_NAMES = {f"{module}.{name}" for module, names in _MODULES.items() for name in names.split()}
_FREE = (
    *("argparse.", "datetime.", "decimal.", "enum.", "fractions.", "pathlib.", "typing.", "uuid.", "zoneinfo."),
    *("torch.amp.", "torch.ao.", "torch.cuda.amp.", "torch.nn.", "torch.optim.", "torch.storage."),
    "numpy.random.",
)


def is_harmless(name: str) -> bool:
    """Whether checkpoints may name this: classes of data, of torch's networks and optimisers, and other people's."""
    top, _, rest = name.partition(".")
    if top not in sys.stdlib_module_names and top not in ("torch", "numpy"):
        return True
    if name in _NAMES or name.startswith(_FREE):
        return True
    if top == "numpy":
        return rest.rstrip("_0123456789") in ("bool", "bytes", "complex", "datetime", "float", "int", "str", "uint")
    is_dtype = isinstance(vars(torch).get(rest), (torch.dtype, torch.layout, torch.memory_format, torch.qscheme))
    return top == "torch" and (is_dtype or (rest.endswith("Storage") and rest.removeprefix("cuda.").isalnum()))
