"""The resident engine's program → the program of some of its stages: rows of its tables, the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..ops import Kind
from ..ops.resident_steps import Step
from .program import ResidentProgram


def part(program: ResidentProgram, first: int, last: int, channels: Sequence[int]) -> ResidentProgram:
    """Stages first … last, whose exits become 0 … last - first; what goes on after an early exit `last` is stored.

    first: 0 for a program that takes images; else it takes the features before stage `first`, [N, C, H, W] float32 or,
        of integers, uint8.
    channels: of the features after every stage.
    Raises `ValueError` where more than one map goes from stage to stage.
    """
    steps = [Step(*row) for row in program.steps.tolist()]
    exits = {step.target: row for row, step in enumerate(steps) if step.kind == Kind.EXIT}
    kept = steps[exits[first - 1] + 1 if first else 0 : exits[last] + 1]
    maps = program.maps.tolist()
    image, section, loads = maps[0], 0, list[Step]()
    if first:
        loaded = _map_between(steps, exits[first - 1], first - 1)
        section = maps[loaded][1]
        image = [channels[first - 1], -1, *([0] if program.image is not None else [])]
        loads = [_PLAIN._replace(kind=Kind.LOAD, source=0, target=loaded, section=section)]
    stores = list[Step]()
    if last < max(exits):
        stored = _map_between(steps, exits[last], last)
        if maps[stored][1] != kept[-1].section:
            raise ValueError(_no_part(last, "its head makes maps of other sizes"))
        stores = [_PLAIN._replace(kind=Kind.STORE, source=stored, target=-1, section=maps[stored][1])]
    kept = [*loads, *kept, *stores]
    number = {-1: -1, 0: 0}
    for step in kept:
        for used in (step.source, step.residual, *(() if step.kind in (Kind.EXIT, Kind.STORE) else (step.target,))):
            number.setdefault(used, len(number) - 1)
    end = kept[-1].section + 1
    rows = [
        step._replace(
            source=number[step.source],
            target=step.target - first if step.kind == Kind.EXIT else number[step.target],
            residual=number[step.residual],
            section=step.section - section,
        )
        for step in kept
    ]
    placed = [[maps[used][0], maps[used][1] - section, *maps[used][2:]] for used in list(number)[2:]]
    pixels = program.image
    if pixels is not None and first:
        pixels = pixels.new_zeros(2, channels[first - 1])
    return replace(
        program,
        steps=torch.tensor(rows, dtype=torch.int64),
        maps=torch.tensor([image, *placed], dtype=torch.int64),
        groups=program.groups[section:end].clone(),
        algorithms=program.algorithms[section:end],
        group_sizes=program.group_sizes[section:end],
        image=pixels,
    )


_PLAIN = Step(
    kind=-1, source=0, target=0, residual=-1, activation=0, kernel=1, stride=1, padding=0, winograd=0, weight=0,
    packed=0, section=0, groups=1, channel=0, row=0,
)  # fmt: skip


def map_sizes(program: ResidentProgram, height: int, width: int) -> dict[int, tuple[int, int]]:
    """(H, W) of every map for images, or features, of height × width; that of the features that are stored is at -1."""
    sizes = {0: (height, width)}
    for step in (Step(*row) for row in program.steps.tolist()):
        height, width = sizes[step.source]
        if step.kind in (Kind.CONVOLUTION, Kind.MAX_POOL):
            rows, above = (1, 0) if step.row else (step.kernel, step.padding)
            height = (height + 2 * above - rows) // step.stride + 1
            width = (width + 2 * step.padding - step.kernel) // step.stride + 1
        if step.kind != Kind.EXIT:
            sizes[step.target] = (1, 1) if step.kind == Kind.MEAN else (height, width)
    return sizes


def _map_between(steps: Sequence[Step], row: int, exit_index: int) -> int:
    """The one map that steps after `row`, that of an exit, read and do not write before."""
    read, written = set[int](), set[int]()
    for step in steps[row + 1 :]:
        read |= _sources(step) - written
        if step.kind != Kind.EXIT:
            written.add(step.target)
    if len(read) != 1 or 0 in read:
        raise ValueError(_no_part(exit_index, f"{len(read)} maps go on from there"))
    (found,) = read
    # Layers that make smaller maps run early; those of the next stage must not have run.
    needed = {steps[row].source}
    for step in reversed(steps[:row]):
        if step.kind == Kind.EXIT:
            continue
        if step.target == found and found not in needed:
            raise ValueError(_no_part(exit_index, "its head makes maps of other sizes"))
        if step.target == found:
            break
        if step.target in needed:
            needed = (needed - {step.target}) | _sources(step)
    return found


def _sources(step: Step) -> set[int]:
    """The maps that a step reads; a part of what it joins to is there before."""
    joined = {step.target} if step.kind == Kind.JOIN and step.channel else set()
    return ({step.source, step.residual} | joined) - {-1}


def _no_part(exit_index: int, why: str) -> str:
    return f"the resident engine cannot stop after exit {exit_index}: {why}; use engine='compact'"
