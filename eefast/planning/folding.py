"""Make inference copies of stages and heads: BatchNorm folded into its neighbour, channels-last, in one dtype."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..heads import ExitHead
from ..modules.tracing import Tracer, Twins, attributes, graph_module, recompile


class UnsupportedError(ValueError):
    """An engine cannot run something in the network; the message names it."""


def inference_copy(module: nn.Module, evaluating: bool = True) -> nn.Module:
    """A copy with tensors of its own, in eval mode or with the flags as they are, which computes what `module` does.

    Weights that `weight_norm`, `spectral_norm`, `prune` or `parametrize` compute at every call are computed once.
    """

    def own(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied

    with torch.inference_mode(False), torch.no_grad():
        copied = Twins(module, own).of(module)
        copied = copied.eval() if evaluating else copied
        for part in list(copied.modules()):
            _settle(part)
    return copied


def _settle(module: nn.Module) -> None:
    """Replace weights that are computed at every call by their values."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if is_computing_hook(hook):
            hook(module, ())
            del module._forward_pre_hooks[key]
            name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else cast(Any, hook).name
            module.register_parameter(name, nn.Parameter(module.__dict__.pop(name).detach(), requires_grad=False))
    if parametrize.is_parametrized(module):
        lists = cast(nn.ModuleDict, module.parametrizations)
        values = {name: (getattr(module, name).detach().clone(), list(p.parameters())) for name, p in lists.items()}
        # `remove_parametrizations` would change the class, which the original shares.
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        for name, (value, parameters) in values.items():
            if parameters:
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(name, value)


def is_computing_hook(hook: Any) -> bool:
    """Whether a forward-pre-hook only computes a weight from parameters, as PyTorch's normalisations do."""
    return isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod)


def computes_as(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module computes exactly what `kind` does: no other forward, in its class or itself, and no hooks."""
    if not isinstance(module, kind) or module._forward_hooks or module._forward_pre_hooks:
        return False
    names = "forward", "_conv_forward", "__call__"
    same = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in names)
    return same and not any(name in module.__dict__ for name in names)


def fold_stage(stage: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """An eval copy of `stage` in `dtype` and channels-last, every BatchNorm behind a convolution folded into it.

    Returns the copy and what was done: "folded", or why the copy computes its BatchNorms as they stand. Each call of a
    convolution is folded by itself, so that modules that are called more than once, or have several names, stay right.
    """
    stage = inference_copy(stage)
    # A trained network's float16 weights are folded in float32 or more, so that folding adds one rounding and no more.
    stage = stage.to(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        # In a Sequential, since torch.fx would look into a module of PyTorch's own that is traced itself.
        root = nn.Sequential(stage)
        graph = Tracer().trace(root)
        folded = graph_module(attributes(root, graph), graph)
        _fold(folded.eval())
        return channels_last(folded, dtype), "folded"
    except Exception as error:  # torch.fx raises whatever the traced code does
        what = f"not folded: torch.fx cannot trace it ({type(error).__name__})"
        return channels_last(stage, dtype), what


def channels_last(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same module in `dtype`, its weights of four dimensions channels-last."""
    for tensor in module.to(dtype).parameters():
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


_PAIRS = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))


def _fold(module: fx.GraphModule) -> None:
    """Give every convolution that only a BatchNorm reads a module of its own, with the BatchNorm in it."""
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target in ("view", "view_as") and not _is_dtype(node.args[1:]):
            node.target = node.target.replace("view", "reshape")  # channels-last maps cannot be viewed otherwise
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = (module.get_submodule(str(n.target)) for n in (source, node))
        if any(computes_as(conv, c) and computes_as(norm, n) for c, n in _PAIRS) and _fits(conv, norm):
            name = f"folded_{source.name}"
            module.add_submodule(name, _folded(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)))
            source.target = name
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    recompile(module)


def _is_dtype(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(a, torch.dtype) for a in arguments)


def _fits(conv: Any, norm: Any) -> bool:
    """Without statistics of training, a BatchNorm takes those of the batch."""
    return norm.running_var is not None and norm.running_mean is not None and len(norm.running_mean) == len(conv.weight)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution of its own that computes both, in the convolution's dtype."""
    scale, shift = affine(norm)
    weight = conv.weight.detach().double()
    bias = 0.0 if conv.bias is None else conv.bias.detach().double()
    kind = next(c for c, _ in _PAIRS if isinstance(conv, c))
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    sizes = weight.shape[1] * conv.groups, len(weight)
    made = kind(*sizes, *geometry, padding_mode=conv.padding_mode, device="meta")  # type: ignore[arg-type]
    for name, value in (("weight", weight * scale.view(-1, *[1] * (weight.dim() - 1))), ("bias", bias * scale + shift)):
        setattr(made, name, nn.Parameter(value.to(conv.weight.dtype), requires_grad=False))
    return cast(nn.Conv2d, made.eval())


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] float64 of a BatchNorm with running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else norm.weight.detach().double() * scale
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else norm.bias.detach().double() + shift


def pack_conv(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Weight [C, C_in, 3, 3] in `dtype` and bias [C] float32 of a head's conv3x3 → BatchNorm → ReLU, BatchNorm folded.

    None where `block` is something else.
    """
    block = inference_copy(block)
    conv, norm, relu = block if isinstance(block, nn.Sequential) and len(block) == 3 else (None, None, None)
    parts = (conv, nn.Conv2d), (norm, nn.BatchNorm2d), (relu, nn.ReLU)
    if not computes_as(block, nn.Sequential) or not all(computes_as(*part) for part in parts) or not _fits(conv, norm):
        return None
    conv = cast(nn.Conv2d, conv)
    fixed = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if fixed != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return None
    fused = _folded(conv.float(), cast(nn.BatchNorm2d, norm))
    assert fused.bias is not None
    return fused.weight.to(dtype, memory_format=torch.channels_last), fused.bias.clone()


def head_obstacle(head: nn.Module, number: int) -> str:
    """Why the head of an exit cannot be packed, "" if it can: what `pack_head` would get wrong, part by part.

    An `ExitHead` may have another pooling that is the mean at every size, BatchNorm or nothing as norm, linears without
    a bias, and convolutions of any kind.
    """
    where = f"the head of exit {number}"
    if type(head) is not ExitHead:
        return f"{where} is a {type(head).__name__}, not an eefast.heads.ExitHead"
    if not computes_as(head, ExitHead):
        return f"{where} has a forward or hooks of its own"
    head = inference_copy(head)
    assert isinstance(head, ExitHead)
    if not computes_as(head.convs, nn.Sequential):
        return f"{where} has {_brief(head.convs)} as convs, not nn.Sequential"
    if not (computes_as(head.norm, nn.Identity) or computes_as(head.norm, nn.BatchNorm2d)):
        return f"{where} has {_brief(head.norm)} as norm, not nn.Identity or nn.BatchNorm2d"
    if isinstance(head.norm, nn.BatchNorm2d) and head.norm.running_var is None:
        return f"{where} has a BatchNorm without running statistics as norm"
    for name in ("classifier", "confidence"):
        linear = getattr(head, name)
        if not _is_linear(linear):
            return f"{where} has {_brief(linear)} as {name}, not nn.Linear"
        if linear.weight.shape[1] != head.num_features:
            return f"{where} has a {name} for {linear.weight.shape[1]} features, not {head.num_features}"
    if len(head.confidence.weight) != 1:
        return f"{where} has {len(head.confidence.weight)} rows as confidence, not 1"
    return "" if _pools(head) else f"{where} has {_brief(head.pool)} as pool, not what head={head.kind!r} has"


def _brief(module: Any) -> str:
    return f"{module}".partition("\n")[0].rstrip("(") if isinstance(module, nn.Module) else type(module).__name__


@torch.no_grad()
def _is_linear(linear: Any) -> bool:
    """Whether a module computes as `nn.Linear`; tried where it is a subclass with a forward of its own, as timm's."""
    if computes_as(linear, nn.Linear) or not isinstance(linear, nn.Linear):
        return isinstance(linear, nn.Linear)
    x = torch.randn(2, linear.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(linear.weight)
    try:
        out = linear(x)
    except Exception:  # it takes something else
        return False
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    return out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def _pools(head: ExitHead) -> bool:
    """Whether the pooling flattens or averages its maps, tried at two sizes, since there are many ways to write it."""
    channels, height, width = head.feature_shape
    plain = head.kind == "plain"
    for size in [(height, width)] if plain else [(height, width), (height + 3, width + 2)]:
        x = 100 * torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        try:
            out = head.pool(x.clone())
        except Exception:  # a pooling for one size, for instance
            return False
        expected = x.flatten(1) if plain else x.mean((2, 3))
        if out.shape != expected.shape or not torch.allclose(out.double(), expected, rtol=0, atol=1e-3):
            return False
    return True


def pack_head(head: ExitHead) -> tuple[Tensor, Tensor]:
    """Weight [K + 1, C] and bias [K + 1], float32, of what `head` does behind its convolutions and its pooling.

    Class rows first, then the confidence row. A "bnpool" head's BatchNorm is affine per channel, so it commutes with
    the pooling and goes into the linear; a "plain" head's columns are reordered from (C, H, W) to channels-last
    (H, W, C).
    """
    head = cast(ExitHead, inference_copy(head))
    linears = head.classifier, head.confidence
    weight = torch.cat([part.weight for part in linears]).double()
    zeros = (part.weight.new_zeros(len(part.weight)) for part in linears)
    bias = torch.cat([z if part.bias is None else part.bias for part, z in zip(linears, zeros, strict=True)]).double()
    channels, height, width = head.feature_shape
    if isinstance(head.norm, nn.BatchNorm2d):
        scale, shift = (part.repeat_interleave(weight.shape[1] // channels) for part in affine(head.norm))
        weight, bias = weight * scale, bias + weight @ shift
    if head.kind == "plain":
        weight = weight.view(-1, channels, height, width).permute(0, 2, 3, 1).flatten(1)
    return weight.float().contiguous(), bias.float()
