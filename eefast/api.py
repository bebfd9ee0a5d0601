"""`accelerate`: a network → a module with the same answers, run by the engine that planning chose."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, wraps
from itertools import groupby
from operator import itemgetter
from threading import RLock
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .deprecated import renamed_arguments
from .engines import Batch, Engine, Plan
from .engines.partial_runs import Identity, begin, finish, go_on, identity
from .engines.streaming import copied
from .engines.weight_watch import WeightWatch
from .model import TRACED, EarlyExitNet, check_not_traced, is_property
from .planning import Options, build
from .planning import check_engine as check_engine
from .profiles import Profiles, limits_of_call
from .result import ExitResult
from .survivors import Partial, Survivors
from .system import forked

P = ParamSpec("P")
R = TypeVar("R")

OUTPUTS = ("result", "logits")

_planning = RLock()
"""One plan is made at a time: plans measure speed, and a thread that waited for one of the same module then has it."""


_inherited: list[_Planned] = []
"""Of the process that this one was forked from; libraries would wait for its threads if this were freed."""


def _no_planning_goes_on() -> None:
    global _planning
    _planning = RLock()


forked.in_child(_no_planning_goes_on)


def _unrecorded(function: Callable[P, R]) -> Callable[P, R]:
    """Autograd records nothing: the engines see to that, but for what is given that requires gradients.

    Switching the record off takes as long as all checks of a call.
    """

    @wraps(function)
    def run(*given: P.args, **named: P.kwargs) -> R:
        if torch.is_grad_enabled() and any(map(_may_be_recorded, (*given, *named.values()))):
            with torch.no_grad():
                return function(*given, **named)
        return function(*given, **named)

    return run


def _may_be_recorded(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Survivors):
        return value.features.requires_grad
    return isinstance(value, (tuple, list, dict))


class _Planned(NamedTuple):
    """An engine, what notices that its plan no longer holds, and the process, if it runs in no other one."""

    engine: Engine
    watch: WeightWatch
    process: int | None


@renamed_arguments(example="example_inputs", max_batch="max_batch_size")
def accelerate(
    net: EarlyExitNet,
    *,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    example_inputs: Tensor | None = None,
    frozen: bool = False,
    max_batch_size: int = 256,
    stages: str = "auto",
    output: str = "result",
) -> Accelerated:
    """A module that gives the answers of `net.eval()`, faster.

    net: is not changed; the new module shares its parameters, buffers and state_dict keys.
    engine: "auto" (the fastest that can run; falls back and logs once why), "resident", "compact" or "reference"; one
        asked for by name raises `ValueError` if it cannot run.
    dtype: of the stages, by default that of the parameters; exits are always decided in float32. On CPUs where bfloat16
        is slower than float32 the resident engine computes that in float32. A quantised network has no other dtype.
    example_inputs: images as `module` takes them, on which speed and rounding errors are measured; by default noise.
    frozen: a promise that weights, criterion, device and dtype will not change. Checking for changes takes 30 µs per
        call for EENet-20 and 160 µs for EENet-110, which only matters for single images; with weights made in inference
        mode, which have no versions and are compared with a copy, 17 ms per 100 MB.
    max_batch_size: images for which the compact engine captures CUDA graphs; larger batches run in pieces.
    stages: what runs the compact engine's stages on CPUs in float32: "pytorch", "onnxruntime", "openvino", "compile"
        (torch.compile, which takes a minute per stage), or "auto", the fastest of the first three that are installed
        and as exact as PyTorch. One asked for by name runs in the compact engine, and raises `ValueError` if it cannot.
        The same for a network that `eefast.quantize` made for other libraries, whose convolutions they run in INT8.
        On GPUs "auto" compares PyTorch with torch.compile, for which a plan has a minute; "pytorch" does not.
    output: "result", or "logits": `module(x)` and `module.stream` then give the logits [N, K] alone, float32, in the
        place of an `ExitResult`, so that the module replaces a classifier without exits. `module.until` and
        `module.resume` are as before.

    `module(x)` takes images [N, C, H, W] of any N ≥ 0 and returns an `ExitResult`; `print(module.plan)` says what runs.
    Thresholds may change at any time. Changed weights, criterion, device or dtype are noticed at the next call, which
    then plans again. `module.stream(batches)` answers many batches in turn, `module.warmup()` does what a first call
    would. torch.compile leaves the module as it is; code around it compiles once for all batch sizes.
    """
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size={max_batch_size} must be at least 1")
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is unknown; choose one of {', '.join(OUTPUTS)}")
    if isinstance(net, Accelerated):
        net = net.net
    if not isinstance(net, EarlyExitNet):
        raise TypeError(
            f"net is a {type(net).__name__}; give an eefast.EarlyExitNet: of eefast.zoo, or eefast.attach(net, "
            "exits), which puts exits into a backbone"
        )
    return Accelerated(net, engine, dtype, example_inputs, frozen, max_batch_size, stages, output)


class Accelerated(nn.Module):
    """An `EarlyExitNet` run by an engine; made by `accelerate`. Attributes it lacks are the network's.

    plan: how the network ran last; `forward`, `warmup` and `stream` plan again where weights, criterion, device or
    dtype have changed. Nothing else does.
    """

    net: EarlyExitNet
    plan: Plan
    output = "result"

    def __init__(
        self,
        net: EarlyExitNet,
        engine: str,
        dtype: torch.dtype | None,
        example_inputs: Tensor | None,
        frozen: bool,
        max_batch_size: int,
        stages: str,
        output: str,
    ) -> None:
        super().__init__()
        _hide_from_torch_compile()
        # Sharing the dictionaries, not only the tensors, makes this module the network itself for state_dict, .to(),
        # optimisers and buffer assignment.
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.__dict__.update({name: net.__dict__[name] for name in shared}, net=net)
        examples = None if example_inputs is None else net.prepare(example_inputs, dtype).detach()
        self.frozen, self.options = frozen, Options(engine, dtype, examples, max_batch_size, stages)
        self.output = output
        self._planned: _Planned | None = None
        self._hashed: tuple[Engine, Identity] | None = None
        self._engine()  # an engine that cannot run raises here, not at the first image

    @property
    def engine(self) -> Engine:
        """What `plan` describes; a copy that was never called has none yet, and plans."""
        planned = self._planned
        return self._engine() if planned is None else planned.engine

    def _engine(self) -> Engine:
        """The engine for the network as it is now."""
        planned = self._planned
        if planned is not None and self._holds(planned):
            return planned.engine
        if planned is not None and planned.process not in (None, os.getpid()):
            _inherited.append(planned)
        del planned
        forked.check()
        with _planning:
            planned = self._planned
            if planned is None or not self._holds(planned):
                # Graphs of an old plan would hold on to their memory while those of the new one are captured.
                planned = self._planned = None
                planned = self._planned = self._planned_now()
                self.plan = planned.engine.plan
            return planned.engine

    def _holds(self, planned: _Planned) -> bool:
        if planned.process is not None and planned.process != os.getpid():
            return False
        if self.frozen:
            return True
        return not planned.watch.changed() and planned.engine.plan.criterion == self.net.criterion.name

    def _planned_now(self) -> _Planned:
        # What another thread changes meanwhile must not go unnoticed; a network that changes as it runs always does.
        for _ in range(2):
            watch = WeightWatch(self.net.stages, self.net.heads, owner=self.net)
            engine = build(self.net, self.options)
            if not watch.changed():
                break
        else:
            watch = WeightWatch(self.net.stages, self.net.heads, owner=self.net)
        if watch.compared and not self.frozen:
            why = (
                f"{watch.compared / 1e6:.1f} MB of weights were made in inference mode and are compared with a copy at "
                "every call, since only that shows changes; frozen=True does not"
            )
            engine.plan = replace(engine.plan, reasons=(*engine.plan.reasons, why))
        return _Planned(engine, watch, None if engine.survives_fork else os.getpid())

    @_unrecorded
    def forward(
        self,
        x: Tensor,
        profile: str | Tensor | None = None,
        thresholds: Tensor | Sequence[float] | None = None,
        exit_limit: int | Tensor | Sequence[int] | None = None,
    ) -> ExitResult | Tensor:
        """Arguments as of `EarlyExitNet.forward`; see `accelerate` for what `output` makes of the result."""
        engine, images, (limits, _) = self._asked(x, profile, thresholds, exit_limit)
        result = engine.run(images, limits, self.net.current_rule())
        return result.logits if self.output == "logits" else result

    def until(self, exit_index: int) -> Callable[..., Partial]:
        """A function that runs a batch up to an early exit: `fast.until(2)(x)`, arguments as of `forward`.

        It takes images, or the `Survivors` of a run that stopped after an earlier exit, and returns a `Partial`: the
        answers so far, and the survivors, which `resume` answers, `save` writes, `to_bytes` sends. Rounds as the whole
        run: in the resident engine each answer has the same bits as without a stop. docs/partial.md says more.

        exit_index: 0 … n-1. Raises `ValueError` for another one, and where the engine cannot stop there.
        """
        if not 0 <= exit_index < self.net.num_exits:
            raise ValueError(
                f"exit_index={exit_index} is no early exit; the network has {self.net.num_exits}, from 0 on"
            )

        @_unrecorded
        def run(x: Tensor | Survivors, profile: Any = None, thresholds: Any = None, exit_limit: Any = None) -> Partial:
            if isinstance(x, Survivors):
                if not (profile is None and thresholds is None and exit_limit is None):
                    raise ValueError("survivors keep the thresholds of the call that they come from; give none")
                if exit_index <= x.exit_index:
                    raise ValueError(f"exit_index={exit_index}, but these survivors have passed exit {x.exit_index}")
                engine, _, _ = self.ready()
                return go_on(engine, self._identity(engine), x, exit_index, elsewhere=False)
            engine, images, (limits, _) = self._asked(x, profile, thresholds, exit_limit)
            return begin(engine, self._identity(engine), images, limits, self.net.current_rule(), exit_index)

        return run

    @_unrecorded
    def resume(self, survivors: Survivors, elsewhere: bool = False) -> ExitResult:
        """The answers of survivors [M], in their order, by the thresholds of the call that they come from.

        elsewhere: whether they may come from another engine, device, dtype or set of instructions, which rounds
            otherwise, so that an answer near a threshold may change.
        Raises `ValueError` for survivors of another network, other weights, another exit rule or version and, unless
        `elsewhere`, from elsewhere.
        """
        engine, _, _ = self.ready()
        return finish(engine, self._identity(engine), survivors, elsewhere)

    def _identity(self, engine: Engine) -> Identity:
        """Hashes of the network as this engine runs it; hashing takes 1 ms per MB, once per plan."""
        known = self._hashed
        if known is None or known[0] is not engine:
            known = self._hashed = engine, identity(self.net)
        return known[1]

    @property
    def profiles(self) -> Profiles:
        """Those of the network, see there."""
        return self.net.profiles

    @profiles.setter
    def profiles(self, profiles: Mapping[str, Any] | None) -> None:
        self.net.profiles = profiles  # type: ignore[assignment]

    def warmup(self) -> Plan:
        """Do now what the first call would do besides answering, such as planning and loading kernels."""
        weight = next(self.net.parameters())
        for n in (1, 2):
            self(torch.zeros(n, *self.net.input_shape, dtype=weight.dtype, device=weight.device))
        return self.plan

    def stream(self, batches: Iterable[Tensor | tuple[Tensor, Any]]) -> Iterator[Any]:
        """The results of many batches, in their order, one by one, each as `module(x)` returns it.

        batches: images as the module takes them, or (images, profile), or (images, keywords) with the keywords of
            `forward`, such as {"exit_limit": 2}. A batch is what its tensor holds when the iterable hands it out, and
        is answered by the thresholds of that moment; its memory may be written to as soon as the next one is asked for.
        The resident engine reads a few batches ahead and keeps all threads, or the whole GPU, busy across the batches'
        borders; on a GPU small batches that come at once, eight at most, share a launch, and three launches are under
        way. The compact engine lets survivors wait for those of up to four more batches, so that deep stages run on
        full batches; with new thresholds it starts again. The reference engine answers one batch after the other. An
        error in a batch, or in the iterable, comes after the results of all batches before it. Closing the iterator, or
        dropping it, waits for nothing: a piece of work of up to 64 images in each thread may still end afterwards.
        """
        self._engine()
        return self._stream(batches)

    def _stream(self, batches: Iterable[Tensor | tuple[Tensor, Any]]) -> Iterator[Any]:
        # Another engine may be planned on the way.
        for engine, group in groupby(map(self._read, batches), itemgetter(0)):
            results = engine.stream(map(itemgetter(1), group))
            yield from (result.logits for result in results) if self.output == "logits" else results

    @_unrecorded
    def _read(self, batch: Tensor | tuple[Tensor, Any]) -> tuple[Engine, Batch]:
        """A checked batch in memory that its source does not write to, and what answers it."""
        x, asked = batch if isinstance(batch, tuple) else (batch, None)
        if asked is None:
            engine, limits, since = self.ready()
            images = engine.prepare(x)
        else:
            words = asked if isinstance(asked, dict) else {"profile": asked}
            engine, images, (limits, since) = self._asked(x, **words)
        if images is x or images.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            images = copied(images)
        return engine, Batch(images, limits, since, self.net.current_rule())

    def ready(self) -> tuple[Engine, Tensor, object]:
        """What answers a call: the engine for the network as it is now, and the thresholds of this moment.

        Thresholds and the object beside them as of `EarlyExitNet.limits`. Plans again where the network has changed.
        Raises `RuntimeError` in training mode, and in a forked process whose threads do not work.
        """
        while True:
            engine = self._ready_engine()
            thresholds, since = self.net.limits()
            # Thresholds belong to a criterion, and another thread may change both.
            if self.frozen or engine.plan.criterion == self.net.criterion.name:
                return engine, thresholds, since

    def _ready_engine(self) -> Engine:
        check_not_traced()
        if self.net.training:
            raise RuntimeError(
                "an accelerated network answers in eval mode only; call .eval(), or train the net itself"
            )
        forked.check()
        return self._engine()

    def _asked(
        self, x: Tensor, profile: Any = None, thresholds: Any = None, exit_limit: Any = None
    ) -> tuple[Engine, Tensor, tuple[Tensor, object]]:
        """What answers a call, see `ready`: the engine, the images as it takes them, the limits by which they exit."""
        current: tuple[Tensor, object] | None = None
        if profile is None and thresholds is None:
            engine, limits, since = self.ready()
            images = engine.prepare(x)
            if exit_limit is None:
                return engine, images, (limits, since)
            current = limits, since
        else:  # the network's thresholds do not matter, and reading them takes time
            engine = self._ready_engine()
            images = engine.prepare(x)
        net, criterion, device = self.net, engine.plan.criterion, images.device
        found = limits_of_call(
            net.profiles, net.num_exits, criterion, current, device, len(x), profile, thresholds, exit_limit
        )
        return engine, images, found

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The network's mode, set by `.train()` and `.eval()` of either module."""
        return self.net.training if "net" in self.__dict__ else False

    @training.setter
    def training(self, mode: bool) -> None:
        if "net" in self.__dict__:
            self.net.training = mode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Accelerated:
        self.net._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "net" not in self.__dict__:
                raise
        # Not in the handler: the true error should not seem to follow from one that says nothing.
        return getattr(type(self), name).__get__(self) if is_property(self, name) else getattr(self.net, name)

    def __prepare_scriptable__(self) -> Accelerated:
        raise RuntimeError(TRACED)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": None, "_hashed": None}

    def extra_repr(self) -> str:
        logits = "output='logits', " if self.output == "logits" else ""
        return f"engine={self.plan.engine!r}, {logits}{self.net.extra_repr()}"


@cache
def _hide_from_torch_compile() -> None:
    """What watches weights, locks and replays cannot be traced; its parts would be compiled for each batch size.

    Not on import, since this imports TorchDynamo, which takes a second; a network that was built has imported it.
    """
    Accelerated.forward = torch.compiler.disable(Accelerated.forward, reason=TRACED)  # type: ignore[method-assign]
