"""Hostile calls of every op, seeded: arguments of any shape, stride, dtype, device and memory, and corrupted programs.

    python tests/helpers/hostile_ops.py 0 10000 exit_head resident_forward    # seeds 0 … 9,999 of each

prints each call before it is made, so that the last line of a process that has died is the call to repeat.
"""

from __future__ import annotations

import math
import random
import re
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import int8_calls
import torch
from exit_cases import CRITERIA
from resident_calls import victim
from resident_cases import small
from torch import Tensor

from eefast import EarlyExitNet, ops
from eefast.ops.resident_steps import COLUMNS
from eefast.planning.lowering import lower
from eefast.planning.packing import cuda_program

Arguments = dict[str, Any]
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 16, 17, 65, 2**14, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
)
VALUES = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0)
WRITTEN = ("logits", "confidence", "exits", "out", "seconds")
PYTORCH = ("tried to allocate", "Storage size calculation overflowed")
"""What PyTorch says where a result would be larger than memory, in place of an argument's name."""
ALLOWED = (RuntimeError, ValueError, TypeError, IndexError)


# What fits


def exit_arguments(r: random.Random) -> Arguments:
    m, c, h, w, k = r.randint(1, 40), r.choice((1, 3, 16, 17)), r.randint(1, 5), r.randint(1, 5), r.choice((1, 2, 10))
    size, n = r.randint(1, m), m + 2
    live = r.choice((size, size, r.randint(0, size)))
    each = of_each(r, n)
    found = {
        "features": torch.randn(m, c, h, w, dtype=r.choice((torch.float32, torch.float32, torch.bfloat16))),
        "weight": torch.randn(k + 1, c), "bias": torch.randn(k + 1),
        "threshold": r.choice((None, torch.tensor(r.choice((0.5, *VALUES))))),
        "rows": torch.randperm(m)[:size].int(), "positions": torch.randperm(n)[:size].int(),
        "live": torch.tensor([live]).int(),
        "criterion": r.choice(CRITERIA), "exit_index": r.randint(0, 9),
        "logits": torch.full((n, k), -7.0), "confidence": torch.full((n,), -7.0), "exits": torch.full((n,), -7),
    }  # fmt: skip
    return with_rule(r, found if each is None else found | {"threshold": each}, 9)


def exit_conv_arguments(r: random.Random) -> Arguments:
    found, c = exit_arguments(r), r.choice((1, 3, 8))
    features, inputs = found.pop("features"), found["weight"].shape[1]
    m, _, h, w = features.shape
    conv = {"conv_weight": torch.randn(inputs, c, 3, 3, dtype=features.dtype), "conv_bias": torch.randn(inputs)}
    return {"features": torch.randn(m, c, h, w, dtype=features.dtype), **conv, **found}


def gather_arguments(r: random.Random) -> Arguments:
    m, c, h, w = r.randint(1, 20), r.choice((1, 3, 16)), r.randint(1, 5), r.randint(1, 5)
    size = r.randint(1, m)
    live, memory = r.randint(0, size), r.choice((torch.contiguous_format, torch.channels_last))
    offset = r.choice((None, r.randint(0, 3)))
    return {
        "features": torch.randn(m, c, h, w).contiguous(memory_format=memory), "rows": torch.randperm(m)[:size].int(),
        "live": torch.tensor([live]).int(),
        "out": torch.zeros(size + 3 * (offset is not None), c, h, w).contiguous(memory_format=memory),
        "offset": None if offset is None else torch.tensor([offset]).int(),
    }  # fmt: skip


def conv_arguments(r: random.Random) -> Arguments:
    m, c, k, h, w = r.randint(1, 12), r.choice((1, 3, 8)), r.choice((1, 4)), r.randint(1, 6), r.randint(1, 6)
    stride, size, last = r.choice((1, 2)), r.randint(1, m), torch.channels_last
    rows = r.choice((None, torch.randperm(m)[:size].int()))
    shape = (m, k, -(-h // stride), -(-w // stride))
    kernel = r.choice((1, 3))
    return {
        "features": torch.randn(m, c, h, w).contiguous(memory_format=last),
        "weight": torch.randn(k, c, kernel, kernel).contiguous(memory_format=last), "bias": torch.randn(k),
        "residual": r.choice((None, torch.randn(*shape).contiguous(memory_format=last))), "rows": rows,
        "residual_through_rows": r.random() < 0.5, "live": torch.tensor([r.randint(0, size)]).int(),
        "stride": stride, "relu": r.random() < 0.5,
    }  # fmt: skip


def of_each(r: random.Random, count: int) -> Tensor | None:
    """Sometimes a threshold of each sample; with NaN one that is no number could exit early."""
    side = random.Random(
        repr((r.getstate()[1][0], r.getstate()[1][-1]))
    )  # so that the calls without them stay the same
    return (
        torch.tensor([side.choice((0.5, -math.inf, math.inf)) for _ in range(count)]) if side.random() < 0.3 else None
    )


def with_rule(r: random.Random, found: Arguments, *shape: int) -> Arguments:
    """Sometimes with a rule that carries, whose numbers are mostly 0."""
    state = r.getstate()[1]
    side = random.Random(repr((state[2], state[-2])))  # so that the calls without it stay the same
    if side.random() < 0.7:
        return found
    numbers = [side.choice((0.0, 0.0, 1.0, -0.5, *VALUES)) for _ in range(math.prod(shape))]
    return found | {"criterion": "carried", "rule": torch.tensor(numbers).view(shape)}


def network_arguments(r: random.Random) -> Arguments:
    found = victim(of_the_cpu=r.random() < 0.5) | {
        "threads": r.choice((0, 1, 1, 2, 3)),
        "seconds": None,
        "normalization": None,
    }
    found["criterion"] = r.choice(CRITERIA)
    found["thresholds"] = torch.tensor([r.choice((0.5, *VALUES))])
    if (each := of_each(r, len(found["images"]))) is not None:
        found["thresholds"] = each[None].expand(1, -1)
    if r.random() < 0.2:
        found |= {"threads": 1, "seconds": torch.zeros(len(found["groups"]), dtype=torch.float64)}
    return with_rule(r, found, len(found["thresholds"]) + 1, 9)


def int8_network_arguments(r: random.Random) -> Arguments:
    found = int8_calls.victim() | {
        "threads": r.choice((0, 1, 1, 2, 3)),
        "criterion": r.choice(CRITERIA),
        "seconds": None,
    }
    found["thresholds"] = torch.tensor([r.choice((0.5, *VALUES)), 0.5])
    if (each := of_each(r, len(found["images"]))) is not None:
        found["thresholds"] = torch.stack([each, each.flip(0)])
    if r.random() < 0.3:
        found["images"] = (60 * found["images"]).clamp(0, 255).to(torch.uint8)
    if r.random() < 0.2:
        found |= {"threads": 1, "seconds": torch.zeros(len(found["groups"]), dtype=torch.float64)}
    return with_rule(r, found, len(found["thresholds"]) + 1, 9)


@lru_cache(maxsize=1)
def cuda_network() -> tuple[Any, EarlyExitNet]:
    net = small(1, 7, (3, 9, 11), "pool", 1)
    return cuda_program(lower(net), torch.float16, torch.device("cpu")), net


def cuda_network_arguments(r: random.Random) -> Arguments:
    p, net = cuda_network()
    tables = {name: getattr(p, name).clone() for name in ("steps", "maps", "groups", "packed")}
    return {"images": torch.zeros(2, *net.input_shape), **tables, "thresholds": net.thresholds,
            "criterion": "learned", "num_classes": 7, "bfloat16": r.random() < 0.5}  # fmt: skip


# What does not


def expanded(r: random.Random, x: Tensor) -> Tensor:
    """One element along a dimension, repeated without memory: a few times or more often than any memory holds."""
    if x.numel() == 0 or x.dim() == 0:
        return x
    d = r.randrange(x.dim())
    times = r.choice((2, 5, 64, 2**33, 2**40, 2**61 // max(1, x.numel())))
    return x.narrow(d, 0, 1).expand(*(times if i == d else n for i, n in enumerate(x.shape)))


def without_elements(r: random.Random, x: Tensor) -> Tensor:
    """No element, so that sizes and strides may be anything."""
    sizes = [r.choice((n, 2**20, 2**40, 2**62)) for n in x.shape]
    if sizes:
        sizes[r.choice((0, r.randrange(len(sizes))))] = 0
    return (
        torch.empty(0, dtype=x.dtype).as_strided(sizes, [r.choice((0, 1, 2**40, 2**62)) for _ in sizes]) if sizes else x
    )


def strided(r: random.Random, x: Tensor) -> Tensor:
    """The same values in other memory: with gaps, turned round, at an odd address, any stride for a size of one."""
    way = r.randrange(5)
    if way == 0 and x.dim():
        return torch.stack([x, x], -1)[..., 0]
    if way == 1 and x.dim():
        order = r.sample(range(x.dim()), x.dim())
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    if way == 2 and x.dtype in (torch.float32, torch.int32, torch.int64):
        odd = torch.frombuffer(bytearray(x.nbytes + 9), dtype=x.dtype, offset=r.choice((1, 2, 4)), count=x.numel())
        return odd.view(x.shape).copy_(x)
    if way == 3:
        one = [1 if r.random() < 0.5 else n for n in x.shape]
        return x[tuple(slice(n) for n in one)].as_strided(
            one, [r.choice((0, 3, 2**62)) if n == 1 else s for n, s in zip(one, x.stride(), strict=True)]
        )
    return x.as_strided(x.shape, [r.choice((0, 1, s)) for s in x.stride()]) if x.numel() else x


def with_values(r: random.Random, x: Tensor) -> Tensor:
    if x.numel() == 0 or x.is_complex() or x.dtype == torch.bool:
        return x
    x = x.clone()
    for _ in range(r.randint(1, 3)):
        if x.is_floating_point():
            x.view(-1)[r.randrange(x.numel())] = r.choice(VALUES)
        else:
            near = (-(2**31), -1, 0, 1, 5, 40, 41, 2**31 - 1) if x.dtype != torch.int64 else INTEGERS
            i = r.randrange(x.numel())
            step = max(-(2**63), min(2**63 - 1, int(x.view(-1)[i]) + r.choice((-1, 1))))
            x.view(-1)[i] = r.choice(near) if r.random() < 0.6 else step
    return x


def reshaped(r: random.Random, x: Tensor) -> Tensor:
    d = r.randrange(x.dim()) if x.dim() else 0
    ways: list[Callable[[], Tensor]] = [lambda: x[None], lambda: x.flatten(), lambda: x.reshape(-1)[:1].view(())]
    if x.dim() and x.shape[d]:
        ways += [lambda: x.narrow(d, 0, r.randrange(x.shape[d])), lambda: torch.cat([x, x], d), lambda: x.select(d, 0)]
        ways += [lambda: x.narrow(d, 0, x.shape[d] - 1)] * 2
    return r.choice(ways)() if x.numel() else x


TENSORS: tuple[Callable[[random.Random, Tensor], Any], ...] = (
    *(with_values, with_values, reshaped, reshaped, expanded, without_elements, strided, strided),
    lambda r, x: x.to(r.choice(DTYPES)),
    lambda r, x: x.to("meta"),
    lambda r, x: x.clone().requires_grad_() if x.is_floating_point() else x,
    lambda r, x: x.to_sparse() if x.dim() else x,
    lambda r, x: x.to_mkldnn() if x.dtype == torch.float32 and x.dim() else x,
    lambda r, x: None,
)


def share(r: random.Random, arguments: Arguments) -> None:
    """What is written shares memory with something else."""
    names = [n for n, x in arguments.items() if isinstance(x, Tensor) and x.device.type == "cpu" and x.numel()]
    names = [n for n in names if arguments[n].layout == torch.strided and arguments[n].numel() < 10**6]
    outputs = [n for n in names if n in WRITTEN]
    if not outputs or len(names) < 2:
        return
    a = r.choice(outputs)
    b = r.choice([n for n in names if n != a])
    sizes = [arguments[n].numel() * arguments[n].element_size() for n in (a, b)]
    buffer = torch.zeros(sum(sizes) + 64, dtype=torch.uint8)
    for name, size, begin in ((a, sizes[0], 0), (b, sizes[1], 8 * r.randint(0, sizes[0] // 8))):
        x = arguments[name]
        arguments[name] = buffer[begin : begin + size].view(x.dtype).view(x.shape).copy_(x.detach())


def free(r: random.Random, arguments: Arguments) -> None:
    """The storage of one tensor is made smaller, as sharding libraries do."""
    name = r.choice([n for n, x in arguments.items() if isinstance(x, Tensor)])
    x = arguments[name]
    if x.layout == torch.strided and x.device.type == "cpu" and 0 < x.numel() < 10**6:
        arguments[name] = x.detach().clone()
        arguments[name].untyped_storage().resize_(r.choice((0, x.nbytes // 2)))


def corrupt(r: random.Random, arguments: Arguments) -> None:
    """Other entries, or other rows, in the tables of a network."""
    for _ in range(r.randint(1, 4)):
        name = r.choice(("steps", "steps", "steps", "steps", "maps", "groups"))
        table = arguments[name]
        if (
            not isinstance(table, Tensor)
            or table.dtype != torch.int64
            or table.is_meta
            or not 0 < table.numel() < 10**6
        ):
            continue
        if r.random() < 0.15 and table.dim() == 2:
            arguments[name] = table[[r.randrange(len(table)) for _ in range(r.choice((1, len(table), len(table) + 3)))]]
        elif r.random() < 0.15 and table.dim() == 2:
            order = list(range(len(table)))
            i, j = r.randrange(len(table)), r.randrange(len(table))
            order[i], order[j] = j, i
            arguments[name] = table[order]
        else:
            arguments[name] = with_values(r, table)


def chain(r: random.Random, arguments: Arguments) -> None:
    """Poolings that make a map larger step by step, or sections one after the other, as many as it takes."""
    steps, maps, place = [[0, 0, 1, -1, 0, 3, 1, 1, 0, 0, 0, 0, 1, 0]], [[3, -1], [16, 0]], 0
    n, wide = r.choice((1, 3, 200, 300, 5000)), r.random() < 0.5
    if wide:
        kernel = 3 if n <= 3 else 128
        maps += [[16, 0]] * n
        steps += [[2, 1 + i, 2 + i, -1, 0, kernel, 1, kernel, 0, 0, 0, 0, 1, 0] for i in range(n)]
    else:
        maps += [[16, 1 + i] for i in range(n)]
        steps += [[1, 1 + i, 2 + i, -1, 1, 0, 1, 0, 0, 0, 0, 1 + i, 1, 0] for i in range(n)]
        place = n
    steps.append([3, n + 1, len(arguments["thresholds"]), -1, 0, 0, 1, 0, 0, 0, 0, place, 1, 0])
    columns = torch.tensor(maps)
    if "image" in arguments:
        columns = torch.cat([columns, torch.zeros(len(maps), 1, dtype=torch.int64)], 1)
    arguments |= {"steps": torch.tensor(steps), "maps": columns}
    arguments["groups"] = torch.full((1 + place,), r.choice((1, 2, 64)))


def cost(arguments: Arguments) -> float:
    """Multiplications that a network would take at most, so that what only takes long is left out."""
    images, steps, maps = arguments["images"], arguments["steps"], arguments["maps"]
    if not all(isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta for x in (images, steps, maps)):
        return 0
    if steps.dtype != torch.int64 or maps.dtype != torch.int64:
        return 0
    if images.dim() != 4 or steps.dim() != 2 or steps.shape[1] != len(COLUMNS) or maps.dim() != 2 or 0 in maps.shape:
        return 0
    if any(x.untyped_storage().nbytes() < x.nbytes for x in (steps, maps)):
        return 0
    side, total, channels = float(max(images.shape[2:])), 0.0, maps[:, 0].tolist()
    for kind, source, target, _, _, kernel, stride, padding, *_ in steps[:400].tolist():
        if not (0 < kernel <= 128 and 0 < stride <= 128 and 0 <= padding <= kernel) or side > 2**15:
            continue
        wide = [min(max(channels[i], 1), 2**15) if 0 <= i < len(channels) else 1 for i in (source, target)]
        side = max(side, (side + 2 * padding - kernel) / stride + 1)
        total += side**2 * (kernel**2 * wide[0] * (wide[1] if kind == 0 else 1) + max(wide))
    return 0 if side > 2**15 else total * min(len(images), 2**20)


# A call


def exit_answer(arguments: Arguments, found: tuple[Tensor, ...]) -> None:
    rows, positions, live = found
    assert 0 <= int(live) <= int(arguments["live"]) <= len(rows), live
    for name, answer in (("rows", rows), ("positions", positions)):
        assert sorted(answer.tolist()) == sorted(arguments[name].tolist()), name


def network_answer(arguments: Arguments, found: tuple[Tensor, ...]) -> None:
    logits, confidence, exits = found
    n, last = len(arguments["images"]), len(arguments["thresholds"])
    assert logits.shape == (n, arguments["num_classes"])
    assert confidence.shape == exits.shape == (n,)
    assert set(exits.tolist()) <= set(range(last + 1))
    assert not confidence[exits < last].isnan().any()


def nothing_to_say(arguments: Arguments, found: Any) -> None:
    """No answer but None or a tensor whose shape PyTorch has made."""


OPS: dict[str, tuple[Callable[[random.Random], Arguments], tuple[Callable[..., Any], ...], Callable[..., None]]] = {
    "exit_head": (
        exit_arguments,
        (ops.exit_head.run, torch.ops.eefast.exit_head.default),
        exit_answer,
    ),
    "exit_conv_head": (
        exit_conv_arguments,
        (ops.exit_conv_head.run, torch.ops.eefast.exit_conv_head.default),
        exit_answer,
    ),
    "gather_survivors": (
        gather_arguments,
        (ops.gather_survivors.run, torch.ops.eefast.gather_survivors.default),
        nothing_to_say,
    ),
    "indexed_conv": (conv_arguments, (ops.indexed_conv.run, torch.ops.eefast.indexed_conv.default), nothing_to_say),
    "resident_forward": (
        network_arguments,
        (ops.resident_forward.run, torch.ops.eefast.resident_forward.default),
        network_answer,
    ),
    "resident_int8": (
        int8_network_arguments,
        (ops.resident_int8.run, torch.ops.eefast.resident_int8.default),
        network_answer,
    ),
}
if ops.CUDA_MISSING is None:
    OPS["resident_network"] = (cuda_network_arguments, (ops.resident_shared_memory,), nothing_to_say)


def change(r: random.Random, arguments: Arguments) -> None:
    """One change of one or two arguments; an error where PyTorch has no such tensor."""
    way, tables = r.random(), "steps" in arguments
    if way < 0.15:
        return share(r, arguments)
    if tables and way < 0.5:
        return corrupt(r, arguments)
    if tables and way < 0.53:
        return chain(r, arguments)
    name = r.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, Tensor) and value.numel() < 10**6:  # to change more would take memory
        arguments[name] = r.choice(TENSORS)(r, value)
    elif isinstance(value, bool):
        arguments[name] = r.choice((True, False, 2, None))
    elif isinstance(value, int):
        arguments[name] = r.choice(INTEGERS)
    elif isinstance(value, str):
        arguments[name] = r.choice(("best", "", "\0", "learned\0", "x" * 10_000, 3))


def arguments_of(op: str, seed: int) -> tuple[random.Random, Arguments, set[str]]:
    """The arguments of a call, and the names of those that were changed."""
    r = random.Random(f"{op} {seed}")
    torch.manual_seed(seed)
    fitting = OPS[op][0](r)
    while True:
        arguments = dict(fitting)
        for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
            try:
                change(r, arguments)
            except (*ALLOWED, AttributeError):
                continue
        # Last, since PyTorch's operations do not survive it.
        if r.random() < 0.06:
            free(r, arguments)
        # Much work is no fault.
        features = arguments.get("features")
        many = isinstance(features, Tensor) and features.numel() > 10**6 and features.shape[0] > 0
        if not many and ("threads" not in arguments or cost(arguments) < 1e7):
            return r, arguments, {n for n in arguments if arguments[n] is not fitting[n]}


def call(op: str, seed: int) -> str:
    """What the error said, or that there was an answer; `AssertionError` for what may not be."""
    r, arguments, changed = arguments_of(op, seed)
    run = r.choice(OPS[op][1])
    try:
        with torch.set_grad_enabled(r.random() < 0.5):
            found = run(*arguments.values())
        refused = None
    except ALLOWED as error:
        refused = error
    if refused is not None:
        said = [name for name in (*arguments, *PYTORCH) if re.search(rf"\b{name}\b", str(refused))]
        assert changed, f"{type(refused).__name__} for what fits: {refused}"
        assert said, f"{type(refused).__name__} names none of {', '.join(changed)}: {refused}"
        return str(refused)
    if not any(isinstance(x, Tensor) and x.is_meta for x in arguments.values()):
        OPS[op][2](arguments, found)
    return "answered"


def main(first: int, count: int, *names: str) -> None:
    """Runs the calls; prints each beforehand, then how many of them were answered."""
    torch.set_num_threads(2)
    for name in names or tuple(OPS):
        answered = 0
        for seed in range(first, first + count):
            print(f"from hostile_ops import call; call({name!r}, {seed})", flush=True)
            answered += call(name, seed) == "answered"
        print(f"{name}: {count} calls, {answered} answered", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    # Memory is short, so that what asks for too much is refused and not begun; AddressSanitizer needs all addresses.
    if "libasan" not in Path("/proc/self/maps").read_text():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
