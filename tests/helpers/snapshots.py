"""Everything that can be told about a module from outside, so that a test can say that nothing has changed."""

import random
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

# What an EarlyExitNet remembers of its thresholds between two calls.
MEMORY = {"_limits", "_checked"}
HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


def tensor(t):
    if t is None:
        return None
    values = t.detach().clone() if not t.is_meta else tuple(t.shape)
    grad = None if not t.is_leaf or t.grad is None else (id(t.grad), t.grad.clone())
    return id(t), type(t), t.dtype, str(t.device), t.stride(), t.requires_grad, grad, sorted(vars(t)), values


def snapshot(module):
    """Identities, values, flags and attributes of all modules in `module`, under all of their names."""
    found = {}
    for name, m in module.named_modules(remove_duplicate=False):
        attributes = {
            key: value if isinstance(value, bool | int | float | str) else id(value)
            for key, value in vars(m).items()
            if key not in MEMORY
        }
        plain = {key: tensor(value) for key, value in vars(m).items() if isinstance(value, torch.Tensor)}
        found[name] = {
            "class": (id(m), type(m)),
            "attributes": {key: value for key, value in attributes.items() if key not in plain},
            "training": m.training,
            "children": [(key, id(child)) for key, child in m._modules.items()],
            "parameters": {key: tensor(p) for key, p in m._parameters.items()},
            "buffers": {key: tensor(b) for key, b in m._buffers.items()},
            "tensors": plain,
            "hooks": {
                key: [(k, id(v)) for k, v in vars(m)[key].items()] for key in HOOKS if hasattr(vars(m)[key], "items")
            },
        }
    return found


def surroundings():
    """What the process shares."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "threads": torch.get_num_threads(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "mkldnn": torch.backends.mkldnn.enabled,
        "global hooks": [
            len(getattr(torch.nn.modules.module, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
        ],
        "calls": (nn.Module.__call__, nn.Module.__getattr__),
    }


def differences(before, after, where=""):
    """The paths at which two snapshots differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        if list(before) != list(after):
            return [f"{where}: keys {list(before)} became {list(after)}"]
        return [d for key in before for d in differences(before[key], after[key], f"{where}/{key}")]
    if isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        return [d for i, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(before, torch.Tensor | np.ndarray) and type(before) is type(after):
        before, after = torch.as_tensor(before), torch.as_tensor(after)
        same = before.shape == after.shape and torch.equal(bits(before), bits(after))
    else:
        same = type(before) is type(after) and before == after
    return [] if same else [f"{where}: {before} became {after}"]


def bits(t):
    return torch.view_as_real(t) if t.is_complex() else t.contiguous().flatten().view(torch.uint8)


@contextmanager
def unchanged(*modules, random_numbers=True):
    """The modules, and what the process shares, are afterwards what they were before, to the last bit."""
    before = [snapshot(m) for m in modules], surroundings()
    yield
    after = [snapshot(m) for m in modules], surroundings()
    if not random_numbers:
        before[1].pop("torch"), after[1].pop("torch")
    assert differences(before[0], after[0]) + differences(before[1], after[1]) == []
