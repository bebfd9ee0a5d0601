"""A module on rows [N, C, L] → the same on maps of one row [N, C, 1, L], with the same tensors."""

from __future__ import annotations

from typing import Any

from torch import nn

from .tree_copy import TreeCopy


def on_maps(module: nn.Module) -> nn.Module:
    """A copy whose one-dimensional layers are two-dimensional ones of one row; it shares all weights and buffers.

    Layers of other classes stay as they are, and may fail on maps, as may calls that count dimensions: what comes out
    must be compared with what the module itself returns.
    """
    # A module of its own, so that every layer has a parent.
    whole = nn.ModuleList([TreeCopy(module).of(module)])
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(whole.modules()):
        for name, child in parent._modules.items():
            if child is not None and type(child) in _LAYERS:
                if child not in made:
                    made[child] = _LAYERS[type(child)](child)
                    made[child].training = child.training
                parent._modules[name] = made[child]
    return whole[0]


def _convolution(conv: nn.Conv1d) -> nn.Module:
    padding: Any = conv.padding if isinstance(conv.padding, str) else (0, *conv.padding)
    (kernel,), (stride,), (dilation,) = conv.kernel_size, conv.stride, conv.dilation
    made = nn.Conv2d(
        conv.in_channels, conv.out_channels, (1, kernel), stride, padding, (1, dilation), conv.groups,
        conv.bias is not None, conv.padding_mode, device="meta",
    )  # fmt: skip
    made.weight = nn.Parameter(conv.weight.detach().unsqueeze(2), requires_grad=False)
    made.bias = conv.bias
    return made


def _norm(norm: nn.BatchNorm1d) -> nn.Module:
    more = norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    made = nn.BatchNorm2d(norm.num_features, *more, device="meta")
    made._parameters, made._buffers = norm._parameters.copy(), norm._buffers.copy()
    return made


def _number(value: Any) -> Any:
    """Of a window along a row, an int or a tuple of one."""
    return value[0] if isinstance(value, tuple) else value


def _max_pool(pool: nn.MaxPool1d) -> nn.Module:
    kernel, stride, padding, dilation = map(_number, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    return nn.MaxPool2d((1, kernel), stride, (0, padding), (1, dilation), pool.return_indices, pool.ceil_mode)


def _average_pool(pool: nn.AvgPool1d) -> nn.Module:
    kernel, stride, padding = map(_number, (pool.kernel_size, pool.stride, pool.padding))
    return nn.AvgPool2d((1, kernel), stride, (0, padding), pool.ceil_mode, pool.count_include_pad)


_LAYERS: dict[type[nn.Module], Any] = {
    nn.Conv1d: _convolution,
    nn.BatchNorm1d: _norm,
    nn.MaxPool1d: _max_pool,
    nn.AvgPool1d: _average_pool,
    nn.AdaptiveAvgPool1d: lambda pool: nn.AdaptiveAvgPool2d((1, _number(pool.output_size))),
    nn.AdaptiveMaxPool1d: lambda pool: nn.AdaptiveMaxPool2d((1, _number(pool.output_size)), pool.return_indices),
    nn.Dropout1d: lambda dropout: nn.Dropout2d(dropout.p),
}
