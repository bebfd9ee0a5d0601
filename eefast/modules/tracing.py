"""Module → torch.fx graph of what it computes, recorded without touching what other threads use."""

from __future__ import annotations

import linecache
import math
import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import fx, nn
from torch.fx import _symbolic_trace as torch_fx

from .tree_copy import TreeCopy


class InPlaceProxy(fx.Proxy):
    """Records `x += y` as what it is; torch.fx would make `x = x + y` of it, and other names of x would miss that."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[..., object], other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class Tracer(fx.Tracer):
    """torch.fx's tracer on copies of the modules.

    `fx.Tracer.trace` patches `nn.Module`, `math` and wrapped functions for the whole process, so that modules of other
    threads fail meanwhile. Here each copy records its calls and the names of its parameters, and functions that need
    wrapped ones are copied with other global variables. The traced module is not changed, even where its code sets
    attributes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._qualname_counter = defaultdict(int)  # torch.fx's is shared by all threads

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module, see `fx.Tracer.trace`; whatever its code raises on proxies comes through.

        Tensors that the code makes are in `node.meta["constant"]` of the node that reads them: `graph_module` and
        `attributes` find them there.
        """
        if not isinstance(root, nn.Module):
            raise TypeError(f"root is a {type(root).__name__}; give an nn.Module")
        with _tracing_flag():
            self.root = _RecordingCopy(root, self).of(root)
            function, bound = _forward(self.root, self.traced_func_name)
            self.root_module_name = root._get_name()
            self.submodule_paths = {module: name for name, module in self.root.named_modules()}
            self.graph = fx.Graph(tracer_cls=type(self))
            self.tensor_attrs = {
                value: f"{prefix}.{name}" if prefix else name
                for prefix, module in self.root.named_modules(remove_duplicate=False)
                for name, value in module.__dict__.items()
                if isinstance(value, torch_fx._constant_attribute_types)
            }
            called, args = self.create_args_for_root(function, bound, concrete_args)
            result = self.create_arg(called(*args))
            self.create_node("output", "output", (result,), {})
        for node in self.graph.find_nodes(op="get_attr"):
            if node.target in vars(self.root) and node.target not in vars(root):
                node.meta["constant"] = vars(self.root)[node.target]
        self.root, self.submodule_paths = root, None
        return self.graph


def attributes(root: nn.Module, graph: fx.Graph, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The modules, parameters and constants that the graph names, by name; what `fx.GraphModule` takes as root.

    known: what to use in place of attributes of `root`, by name.
    """
    found = dict[str, Any]()
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            name, others = str(node.target), {**(known or {})}
            if "constant" in node.meta:
                others[name] = node.meta["constant"]
            found[name] = others[name] if name in others else operator.attrgetter(name)(root)
    return found


def graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A module that runs the graph on what `attributes` found."""
    module = fx.GraphModule(root, graph)
    _forget_with(module)
    return module


def recompile(module: fx.GraphModule) -> None:
    """Make the module run its current graph."""
    module.recompile()
    _forget_with(module)


def _forget_with(module: fx.GraphModule) -> None:
    """Without this, torch.fx keeps the source of every module that it ever made."""
    name = type(module).forward.__code__.co_filename
    weakref.finalize(module, _forget, name).atexit = False


def _forget(name: str) -> None:
    fx.graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


@contextmanager
def _tracing_flag() -> Iterator[None]:
    """Tell compiled modules of this thread that they are traced; older versions of PyTorch would tell all threads."""
    if not hasattr(torch_fx, "_is_fx_tracing_tls"):
        yield
        return
    with torch_fx._is_fx_tracing_context(True):
        yield


def _forward(root: nn.Module, name: str) -> tuple[FunctionType, bool]:
    """What a call of `root` runs, and whether that takes the module as its first argument."""
    found, bound = getattr(type(root), name), True
    if name in root.__dict__:  # the user's replacement
        found = root.__dict__[name]
        bound = isinstance(found, MethodType) and found.__self__ is root
        found = found.__func__ if isinstance(found, MethodType) and bound else found
    if not isinstance(found, FunctionType):
        raise TypeError(f"{name} of the {type(root).__name__} is a {type(found).__name__}, which cannot be traced")
    return found, bound


class _Parameters(dict[str, Any]):
    """The parameters of a copy, which `module.name` finds as proxies."""

    def __init__(self, parameters: dict[str, Any], found: Callable[[str, Any], Any]) -> None:
        super().__init__(parameters)
        self._found = found

    def __getitem__(self, name: str) -> Any:
        return self._found(name, super().__getitem__(name))


class _RecordingCopy(TreeCopy):
    """A copy whose calls and parameters go through a tracer."""

    def __init__(self, root: nn.Module, tracer: Tracer) -> None:
        self._tracer = tracer
        self._variables: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self._wrapped = defaultdict[int, set[str]](set)
        for (namespace, name), _ in list(torch_fx._wrapped_fns_to_patch.items()):
            self._wrapped[namespace].add(name)
        self._proxies: dict[str, fx.Proxy] = {}
        super().__init__(root)
        for module in root.modules():
            self._record(module, self.of(module))

    def _record(self, module: nn.Module, copied: nn.Module) -> None:
        tracer = self._tracer

        def call(*args: Any, **kwargs: Any) -> Any:
            return tracer.call_module(copied, partial(type(copied)._call_impl, copied), args, kwargs)

        def found(name: str, value: Any) -> Any:
            return tracer.getattr(name, value, self._proxies)

        for name, function in _functions(type(module)):
            copied_function = self.of(function)
            if copied_function is not function and name not in copied.__dict__:
                copied.__dict__[name] = MethodType(copied_function, copied)
        # `nn.Module.__call__` looks here first.
        copied.__dict__["_call_impl"] = call
        copied.__dict__["_parameters"] = _Parameters(copied._parameters, found)

    def variables(self, function: FunctionType) -> dict[str, Any]:
        variables, special = self._special(function.__globals__)
        return variables if special & _names(function.__code__) else function.__globals__

    def _special(self, namespace: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """A copy of global variables in which what torch.fx would patch is wrapped, and the names that differ."""
        if id(namespace) in self._variables:
            return self._variables[id(namespace)]
        copied = namespace.copy()
        builtins = copied.get("__builtins__", {})
        builtins = vars(builtins) if isinstance(builtins, ModuleType) else builtins
        special = self._wrapped[id(namespace)] & (copied.keys() | builtins.keys())
        for name in special:
            copied[name] = torch_fx._create_wrapped_func(copied[name] if name in copied else builtins[name])
        for name, value in namespace.copy().items():
            if value is math:
                copied[name] = _wrapped_math()
                special.add(name)
            elif not name.startswith("_") and callable(value) and id(value) in self._tracer._autowrap_function_ids:
                copied[name] = torch_fx._create_wrapped_func(value)
                special.add(name)
        self._variables[id(namespace)] = copied, special
        # Functions of the same file that use them, or use such functions.
        functions = {n: f for n, f in copied.items() if type(f) is FunctionType and f.__globals__ is namespace}
        while reached := {n for n, f in functions.items() if n not in special and special & _names(f.__code__)}:
            special |= reached
        for name in functions.keys() & special - self._wrapped[id(namespace)]:
            copied[name] = self.of(functions[name])
        return copied, special


def _functions(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods of a class of modules that is not PyTorch's."""
    seen = set()
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith("torch.nn"):
            return
        for name, value in list(vars(base).items()):
            if type(value) is FunctionType and name not in seen and not name.startswith("__"):
                seen.add(name)
                yield name, value


def _names(code: CodeType) -> set[str]:
    """The global variables, attributes and methods that a function's code and that of functions in it name."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _wrapped_math() -> ModuleType:
    module = ModuleType("math")
    for name, value in vars(math).items():
        public = not name.startswith("_") and callable(value)
        module.__dict__[name] = torch_fx._create_wrapped_func(value) if public else value
    return module
