"""Record what a module computes as a torch.fx graph, and copy modules, without touching what other threads use."""

from __future__ import annotations

import copy
import linecache
import math
import operator
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as torch_fx


class Twins:
    """A copy of a module tree for private use: every module anew, with attributes of its own, tensors as `tensor` says.

    Unlike `copy.deepcopy`, it copies whatever a module holds (locks, hooks, weights that are no leaves of autograd):
    what is neither a module nor a list, tuple, dictionary, method, partial or closure with modules in it is shared.
    A dictionary that another thread fills meanwhile does no harm. Modules compiled by torch.compile run as written.
    """

    def __init__(self, root: nn.Module, tensor: Callable[[Tensor], Tensor] | None = None) -> None:
        self._new = tensor
        # By id; the originals are kept, so that no other object comes to have the same id.
        self._copies: dict[int, tuple[Any, Any]] = {}
        modules = list(root.modules())
        for module in modules:
            self._keep(module, self._script(module) if _is_script(module) else object.__new__(type(module)))
        for module in modules:
            if not _is_script(module):
                self._fill(module, self.of(module))

    def of(self, value: Any, whole: bool = False) -> Any:
        """The copy of a value; the value itself where it holds nothing that was copied, unless a `whole` container."""
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if isinstance(value, Tensor):
            return value if self._new is None else self._keep(value, self._new(value))
        kind = type(value)
        if kind is list or kind in (dict, OrderedDict, defaultdict):
            return self._container(value, whole)
        if kind is tuple:
            parts = tuple(map(self.of, value))
            return self._keep(value, parts) if any(a is not b for a, b in zip(parts, value, strict=True)) else value
        if kind is MethodType:
            function, owner = self.of(value.__func__), self.of(value.__self__)
            unchanged = function is value.__func__ and owner is value.__self__
            return value if unchanged else self._keep(value, MethodType(function, owner))
        if kind is partial:
            parts = value.func, value.args, tuple(value.keywords.items())
            copied = self.of(parts)
            return value if copied is parts else self._keep(value, partial(copied[0], *copied[1], **dict(copied[2])))
        return self._function(value) if kind is FunctionType else value

    def _keep(self, value: Any, copied: Any) -> Any:
        self._copies[id(value)] = value, copied
        return copied

    def _script(self, module: nn.Module) -> nn.Module:
        return _ScriptTwin(module) if self._new is None else copy.deepcopy(module)

    def _container(self, value: Any, whole: bool) -> Any:
        copied = self._keep(value, value.copy())
        places = list(copied.items()) if isinstance(copied, dict) else list(enumerate(copied))
        changed = whole
        for place, item in places:
            copied[place] = self.of(item)
            changed |= copied[place] is not item
        return copied if changed else self._keep(value, value)

    def _fill(self, module: nn.Module, copied: nn.Module) -> None:
        state = module.__dict__.copy()
        for cls in type(module).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(module, name) and name not in ("__dict__", "__weakref__"):
                    object.__setattr__(copied, name, self.of(getattr(module, name)))
        state.pop("_compiled_call_impl", None)
        copied.__dict__.update({name: self.of(value, whole=True) for name, value in state.items()})
        if type(module).__name__ == "OptimizedModule":
            copied.__dict__["forward"] = copied._orig_mod

    def _function(self, function: FunctionType) -> FunctionType:
        self._keep(function, function)  # it may lie in its own closure
        cells = tuple(map(self._cell, function.__closure__ or ()))
        variables = self.variables(function)
        if cells == (function.__closure__ or ()) and variables is function.__globals__:
            return function
        made = FunctionType(function.__code__, variables, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
        made.__dict__.update(function.__dict__)
        return self._keep(function, made)

    def _cell(self, cell: CellType) -> CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            return cell
        copied = self.of(value)
        return cell if copied is value else CellType(copied)

    def variables(self, function: FunctionType) -> dict[str, Any]:
        """The global variables with which a copied function runs."""
        return function.__globals__


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


class _ScriptTwin(nn.Module):
    """Stands for a module of TorchScript, which has no Python attributes to copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["original"](*args, **kwargs)


class _Proxy(fx.Proxy):
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
    """torch.fx's tracer on twins of the modules.

    `fx.Tracer.trace` patches `nn.Module`, `math` and wrapped functions for the whole process, so that modules of other
    threads fail meanwhile. Here each twin takes its calls and its parameters' names itself, and functions that need
    wrapped ones are copied with other global variables. The module that is traced stays as it is, also where its code
    sets attributes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._qualname_counter = defaultdict(int)  # torch.fx's is shared by all threads

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module, see `fx.Tracer.trace`; whatever its code raises on proxies comes through.

        Tensors that the code makes are in `node.meta["constant"]` of the node that reads them: `graph_module` and
        `attributes` find them there.
        """
        if not isinstance(root, nn.Module):
            raise TypeError(f"root is a {type(root).__name__}; give an nn.Module")
        with _tracing_flag():
            twins = _RecordingTwins(root, self)
            self.root = twins.of(root)
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

    known: by name, what stands for attributes of `root`.
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
    """Make the module run its graph as it is now."""
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
    """A twin's parameters, which `module.name` finds as proxies."""

    def __init__(self, parameters: dict[str, Any], found: Callable[[str, Any], Any]) -> None:
        super().__init__(parameters)
        self._found = found

    def __getitem__(self, name: str) -> Any:
        return self._found(name, super().__getitem__(name))


class _RecordingTwins(Twins):
    """Twins whose calls and parameters go through a tracer."""

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

    def _record(self, module: nn.Module, twin: nn.Module) -> None:
        tracer = self._tracer

        def call(*args: Any, **kwargs: Any) -> Any:
            return tracer.call_module(twin, partial(type(twin)._call_impl, twin), args, kwargs)

        def found(name: str, value: Any) -> Any:
            return tracer.getattr(name, value, self._proxies)

        for name, method in _functions(type(module)):
            copied = self.of(method)
            if copied is not method and name not in twin.__dict__:
                twin.__dict__[name] = MethodType(copied, twin)
        # `nn.Module.__call__` looks here first.
        twin.__dict__["_call_impl"] = call
        twin.__dict__["_parameters"] = _Parameters(twin._parameters, found)

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
