"""Folded stage → the fastest library that runs it as exactly as PyTorch, and how many images it takes at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.program import layout_of
from ..model import EarlyExitNet
from ..modules.contexts import isolated
from ..qdq import QdqStage, round_nothing
from ..runtimes import RUNTIMES, Runtime, RuntimeStage, StageAndHead, exported_once
from ..system.openmp import one_thread
from ..system.time_limits import within
from . import probe
from .inference_copies import inference_copy
from .trial import brief, difference

PYTORCH = "pytorch"
STAGES = ("auto", PYTORCH, *RUNTIMES)

LIBRARIES = "libraries"
"""As "auto", without PyTorch but where no other library can run a stage; for planning itself."""

GAIN, GAIN_BESIDE_OPENMP = 0.97, 1.05
"""Time ÷ PyTorch's from which on another library runs a stage; the second with several threads, where those of
PyTorch's stages take the cores from the stages after them."""

STAYING, STAYING_IN_CHUNKS = 0.75, 0.95
"""What a library's time counts where it has run the stage before, too, so that no other one's threads have to wake; the
second where images are large.
"""

SECONDS, MORE_SECONDS = 30.0, 600.0
"""Longest time for a library to build a stage and to answer for the first time; and where that is known to be slow."""

EXACT = 3e-5
"""Difference from float64 ÷ largest feature that is always allowed; above it, twice that of PyTorch."""

IN_INT8 = 0.01
"""Difference from simulated INT8 ÷ features, both root mean squares, that is always allowed where a library uses
integers; above it, what rounding changes at all: a sum that is near to the middle between two integers becomes another
one after any other order of additions, and later layers enlarge that.
"""

SIZES, SIZES_IN_CHUNKS = (1, 6, 64), (1, 4)
"""Images on which the libraries are compared."""

VARIED = (6, 64)
"""Of these, those at which the number of images changes from call to call."""

CHUNK = 64
"""Small images that go through a stage together at most: more are not faster, and PyTorch's maps of more than that are
handed back to the system by glibc after every layer and waited for again."""

CHUNK_IN_LIBRARIES, MEGABYTES = 256, 16
"""The same for other libraries, each call of which wakes its threads, as long as features before and after the stage
take no more than that."""

BETWEEN, LARGER = (2,), (8, 16, 32)
"""Further numbers of images that may go through a stage together."""

SLOW = 1.25
"""Time ÷ that of the fastest library at the first of the sizes from which on others are not measured."""

LARGE = 2**17
"""Bytes of an image from which on chunks are measured, since the maps of a batch exceed the caches."""

ENOUGH = 1.03
"""Time ÷ the least of all chunks that counts as the same; of these the largest chunk is taken."""

LONG = 0.1
"""Seconds of a chunk beyond which a larger one is tried only where this one is faster than those before it."""


@dataclass(frozen=True)
class Chosen:
    """What runs a stage.

    note: how, and why no other library. chunk: images at a time at most, None for any number. seconds: of an image, 0
    where that was not measured.
    """

    stage: nn.Module
    note: str
    chunk: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class HeadBody:
    """What comes before a head's linear. convs: as the network has them; folded: for inference; flatten: see there."""

    convs: nn.Module
    folded: nn.Module
    flatten: bool

    def after(self, stage: nn.Module, folded: bool = True) -> StageAndHead:
        return StageAndHead(stage, self.folded if folded else self.convs, self.flatten)


Seconds = dict[int, float]
"""Number of images that go through a stage together → seconds for each of them."""

choices: dict[Any, tuple[str, int | None, str, float]] = {}
"""For each stage's layers and settings, and the library of the stage before, the library, the chunk, the note, the
seconds.
"""

times: dict[Any, dict[str, Seconds]] = {}
"""For each stage's layers and settings what was measured, so that none is measured twice and like stages run alike."""

hung: dict[int, str] = {}
"""Libraries, by id, that did not come to an end; they are not waited for again."""


def chosen(
    stage: nn.Module,
    folded: Chosen,
    seen: Tensor,
    layout: torch.memory_format,
    asked: str,
    in_chunks: bool,
    spend: Callable[[float], None] = lambda seconds: None,
    head: HeadBody | None = None,
    before: nn.Module | None = None,
) -> Chosen:
    """The fastest way to run a stage, or the one that was asked for.

    folded: by PyTorch, checked. seen: [N, C, H, W] float32 features before the stage, on the CPU; layout: in which they
    come. asked: one of `STAGES`, or `LIBRARIES`; "auto" tries what is quick to build. in_chunks: whether to measure how
    many images should go through together, else any number does. spend: told the seconds of an image before that is
    measured. head: of the exit after the stage, which a library runs, too, where it can. before: what runs the stage
    before this one, whose library is to be left for a clear gain alone.
    Raises `ValueError` where what was asked for cannot run.
    """
    if asked == PYTORCH and not in_chunks:
        return folded
    in_int8 = isinstance(stage, QdqStage)
    head = None if in_int8 else head
    whole = head.after(folded.stage) if head else folded.stage
    same = getattr(before, "library", "")
    kind = *_key(whole, seen, layout, asked), in_chunks
    key = kind, same
    known = choices.get(key)
    quick = [n for n, r in RUNTIMES.items() if r.quick and not r.missing()]
    tried = quick if asked in ("auto", LIBRARIES) else [asked]
    names = [known[0]] if known else tried
    built, why_not = {PYTORCH: whole}, dict[str, str]()
    libraries = [name for name in names if name != PYTORCH]
    wanted = _wanted(head.after(stage, False) if head else stage, whole, seen) if libraries else []
    with exported_once():
        for name in libraries:
            made = _built(RUNTIMES[name], whole, seen, wanted)
            if isinstance(made, str) and head and id(RUNTIMES[name]) not in hung:
                made = _built(RUNTIMES[name], folded.stage, seen, wanted[:1])
            if isinstance(made, str):
                why_not[name] = made
            else:
                built[name] = made
    if asked in why_not:
        raise ValueError(f"stages={asked!r} cannot run: {why_not[asked]}; use stages={PYTORCH!r} or 'auto'")
    left_out = [f"{RUNTIMES[n].name} left out: {reason}" for n, reason in why_not.items()]
    if known:
        name, chunk, note, seconds = known
        spend(seconds)
        if name not in built:
            return Chosen(folded.stage, "; ".join(left_out))
        return Chosen(folded.stage if name == PYTORCH else built[name], note, chunk, seconds)
    if len(built) > 1 and (asked != "auto" or in_int8):  # simulated INT8 is many times slower
        del built[PYTORCH]
    found = times.get(kind, {})
    if found.keys() != built.keys():
        found = times[kind] = _timed(built, seen, layout, SIZES_IN_CHUNKS if in_chunks else SIZES)
    name, note = _fastest(found, folded.note, same, STAYING_IN_CHUNKS if in_chunks else STAYING)
    note = f"INT8 by {note}" if in_int8 and name != PYTORCH else note
    seconds = min(found[name].values())
    spend(seconds)
    chunk = fastest_chunk(built[name], found[name], seen, layout) if in_chunks else None
    at_a_time = [] if chunk is None else [f"{chunk} at a time"]
    choices[key] = name, chunk, "; ".join([note, *at_a_time, *left_out]), seconds
    return Chosen(folded.stage if name == PYTORCH else built[name], choices[key][2], chunk, seconds)


def missing_runtimes() -> list[str]:
    """Which libraries "auto" would try if they were installed."""
    return [f"{r.name} left out: {r.missing()}" for r in RUNTIMES.values() if r.quick and r.missing()]


def _key(whole: nn.Module, seen: Tensor, layout: torch.memory_format, asked: str) -> Any:
    """What the speed of a stage, or of one with its head, depends on."""
    code = tuple(getattr(part, "code", "") for part in whole.modules())
    tensors = tuple((name, tuple(t.shape)) for name, t in whole.state_dict().items())
    return repr(whole), code, tensors, seen.shape[1:], layout, torch.get_num_threads(), libraries(asked)


def libraries(asked: str) -> Any:
    """What may run stages: as asked for, of what is installed; a key for what was measured with it."""
    return asked, tuple((name, id(runtime), runtime.missing()) for name, runtime in RUNTIMES.items())


@dataclass(frozen=True)
class _Wanted:
    """What libraries are compared with.

    part: of what a stage and its head return, 0 for the stage alone. features: ÷ `largest`, in float64. allowed:
    difference from them; of simulated INT8 both root mean squares count, of other stages the largest.
    """

    part: int
    features: Tensor
    largest: float
    in_int8: bool
    allowed: float


@torch.no_grad()
def _wanted(stage: nn.Module, folded: nn.Module, seen: Tensor) -> list[_Wanted]:
    """Of a stage, and where it comes with its head of that, too."""
    found = list[_Wanted]()
    exact, others = _parts(_exact(stage, seen)), _parts(folded(_in(layout_of(folded), seen)))
    for i, (part, other) in enumerate(zip(exact, others, strict=True)):
        largest = max(float(part.nan_to_num(0, 0, 0).abs().max()), 1e-300)
        part = part.double() / largest
        if isinstance(stage, QdqStage):
            whole = inference_copy(folded)
            round_nothing(whole)
            allowed = max(IN_INT8, _relative(_features(whole, seen) / largest, part))
        else:
            allowed = max(EXACT, 2 * float((other.double() / largest - part).nan_to_num(0, 0, 0).abs().max()))
        found.append(_Wanted(i, part, largest, isinstance(stage, QdqStage), allowed))
    return found


def _exact(stage: nn.Module, seen: Tensor) -> Any:
    """What comes in float64, computed in float32 for a stage that does not take float64, and in simulated INT8."""
    try:
        if isinstance(stage, QdqStage):
            return stage(seen)
        return inference_copy(stage).to(torch.float64)(seen.double())
    except Exception:  # a stage raises whatever it does
        return inference_copy(stage)(seen.clone())


def _parts(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _features(run: nn.Module, seen: Tensor, part: int = 0) -> Tensor:
    """[N, C, H, W] float64."""
    return _parts(run(_in(layout_of(run), seen)))[part].double()


def _built(runtime: Runtime, folded: nn.Module, seen: Tensor, wanted: Sequence[_Wanted]) -> nn.Module | str:
    """The stage, or one with its head, run by a library, or why that does not do."""
    if reason := runtime.missing() or hung.get(id(runtime), ""):
        return reason
    threads = torch.get_num_threads()

    def build() -> tuple[nn.Module, str]:
        # Modes are those of a thread.
        with isolated(seen.device):
            made = runtime.build(folded, seen, threads)
            wrong = next(filter(None, (_wrong(made, seen, part) for part in wanted)), "")
            if not wrong and any(_loses_nan(made, folded, seen, part.part) for part in wanted):
                if not isinstance(made, RuntimeStage):
                    return made, "it makes numbers of NaN"
                made.loses_nan = True
            return made, wrong

    try:
        made, wrong = within(SECONDS if runtime.quick else MORE_SECONDS, build)
    except TimeoutError as error:
        hung[id(runtime)] = str(error)
        return str(error)
    except Exception as error:  # a library raises whatever it does
        return brief(error)
    return wrong or made


def _wrong(made: nn.Module, seen: Tensor, wanted: _Wanted) -> str:
    """Why a library's features are not the stage's, for single images and for several; "" where they are."""
    for rows in (1, len(seen)):
        found, expected = _features(made, seen[:rows], wanted.part) / wanted.largest, wanted.features[:rows]
        if reason := difference(found, expected, 1.0 if wanted.in_int8 else wanted.allowed):
            return f"its {reason}"
        if wanted.in_int8 and (error := _relative(found, expected)) > wanted.allowed:
            more = f"more than rounding changes ({wanted.allowed:.1%})"
            return f"its answers differ from simulated INT8 by {error:.1%}, {more}"
    return ""


def _loses_nan(made: nn.Module, folded: nn.Module, seen: Tensor, part: int) -> bool:
    """Whether a library has numbers in channels in which the stage has NaN, for images with NaN or infinities."""
    broken = seen[:1].repeat(3, 1, 1, 1)
    broken[0] = torch.nan
    middle = broken[1:, 0, seen.shape[2] // 2, seen.shape[3] // 2]
    middle.copy_(torch.tensor([torch.nan, torch.inf]))
    wanted = _features(folded, broken, part).isnan().flatten(2).any(2)
    alone = torch.cat([_features(made, row[None], part) for row in broken])
    together = _features(made, broken, part)
    return any(bool((found.isnan().flatten(2).any(2) < wanted).any()) for found in (together, alone))


def _relative(found: Tensor, exact: Tensor) -> float:
    """Difference ÷ exact, both root mean squares."""
    return float(((found - exact).square().mean() / exact.square().mean().clamp_min(1e-300)).sqrt())


def _in(layout: torch.memory_format, features: Tensor) -> Tensor:
    return features.clone(memory_format=torch.contiguous_format).contiguous(memory_format=layout)


def _timed(
    candidates: dict[str, nn.Module], seen: Tensor, layout: torch.memory_format, sizes: Sequence[int]
) -> dict[str, Seconds]:
    """Of all candidates, in turns, at each of the sizes but for those that are slow at the first one.

    layout: of the features that they get.
    """
    found: dict[str, Seconds] = {name: {} for name in candidates}
    for n in sizes:
        # No two batches leave the same number of survivors, and some libraries prepare for each number anew.
        counts = (n, n - n // 3) if n in VARIED else (n,)
        features = [_some(count, seen, layout) for count in counts]
        least = probe.seconds_on_cpu([partial(_run, c, *features) for c in candidates.values()])
        for name, value in zip(candidates, least, strict=True):
            found[name][n] = value / sum(counts)
        candidates = {name: c for name, c in candidates.items() if found[name][n] * sum(counts) <= SLOW * min(least)}
    return found


def _fastest(found: dict[str, Seconds], what: str, same: str, staying: float) -> tuple[str, str]:
    """The fastest candidate, and a note with the times of all; of several sizes the geometric mean counts.

    same: name of the library of the stage before; staying: what its time counts.
    """
    sizes = max(found.values(), key=len)
    least = {n: min(seconds[n] for seconds in found.values() if n in seconds) for n in sizes}
    scores = {name: geometric_mean(s / least[n] for n, s in seconds.items()) for name, seconds in found.items()}
    others = [name for name in scores if name != PYTORCH and len(found[name]) == len(sizes)]
    stays = {name: scores[name] * (staying if RUNTIMES[name].name == same else 1.0) for name in others}
    best = min(stays, key=lambda name: stays[name]) if stays else PYTORCH
    gain = GAIN if torch.get_num_threads() == 1 else GAIN_BESIDE_OPENMP
    if PYTORCH in scores and others and scores[best] > gain * scores[PYTORCH]:
        best = PYTORCH
    names = {name: RUNTIMES[name].name if name in RUNTIMES else "PyTorch" for name in scores}
    slower = [f"{names[name]} takes {scores[name] / scores[best]:.2f}×" for name in scores if name != best]
    shown = what if best == PYTORCH else names[best]
    return best, f"{shown} ({', '.join(slower)})" if slower else shown


def has_large_images(net: EarlyExitNet) -> bool:
    """Whether it is measured how many of a network's images go through a stage together."""
    return 4 * prod(net.input_shape) >= LARGE


def uses_openmp(stage: nn.Module) -> bool:
    """Whether a stage runs on PyTorch's threads, which go on spinning after their work."""
    return not isinstance(stage, RuntimeStage)


def has_head(stage: nn.Module) -> bool:
    """Whether it is a stage with its head."""
    return bool(getattr(stage, "with_head", False))


def chunk_in_libraries(features: int) -> int:
    """Small images that go through a stage together at most; features: bytes of an image's, before or after it."""
    return min(max(CHUNK, int(MEGABYTES * 2**20 / features)), CHUNK_IN_LIBRARIES)


def fastest_chunk(stage: nn.Module, known: Seconds, seen: Tensor, layout: torch.memory_format) -> int:
    """Images that should go through a stage together at most.

    known: seconds at `SIZES_IN_CHUNKS`, which tell whether to try larger or smaller ones. Of those that are as fast the
    largest.
    """
    seconds, (few, many) = dict(known), SIZES_IN_CHUNKS

    def measure(n: int) -> None:
        seconds[n] = probe.seconds_on_cpu([partial(_run, stage, _some(n, seen, layout))])[0] / n

    if seconds[many] <= seconds[few]:
        for n in LARGER:
            least = min(seconds.values())
            measure(n)
            if seconds[n] > least or (n * seconds[n] > LONG and seconds[n] * ENOUGH > least):
                break
    else:
        for n in BETWEEN:
            measure(n)
    return max(n for n, s in seconds.items() if s <= ENOUGH * min(seconds.values()))


def _some(n: int, seen: Tensor, layout: torch.memory_format) -> Tensor:
    return _in(layout, seen[torch.arange(n) % len(seen)])


def _run(stage: nn.Module, *batches: Tensor) -> None:
    # A copy into another layout must not wake threads that spin beside the library's, as it does not in the engine.
    with torch.no_grad(), one_thread(not uses_openmp(stage)):
        for features in batches:
            stage(features.contiguous(memory_format=layout_of(stage)))
