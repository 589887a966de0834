"""Layers done with less memory traffic."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders import products


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, with_gelu: bool = False, residual: Tensor | None = None
) -> Tensor:
    """Linear layer with what follows it: residual + GELU(x W' + b).

    Where oneDNN's product is the faster one (:mod:`hspsam_monai.encoders.products`), bias, GELU and residual are added
    while the result is still in the cache. float32 only, no gradient.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,) or ``None``.
        with_gelu: apply the exact GELU.
        residual: (..., D) to add at the end, left as it is.

    Returns:
        (..., D).
    """
    if products.suits(x, weight, bias, residual):
        return products.linear(x, weight, bias, with_gelu, residual)
    return _finish(F.linear(x, weight, bias), with_gelu, residual)


def apply_linear(module: nn.Module, x: Tensor, with_gelu: bool = False, residual: Tensor | None = None) -> Tensor:
    """:func:`linear` with a module's parameters; a module of another class (LoRA, quantised) computes its own part."""
    if type(module) is nn.Linear:
        return linear(x, module.weight, module.bias, with_gelu, residual)
    return _finish(module(x), with_gelu, residual)


def _finish(y: Tensor, with_gelu: bool, residual: Tensor | None) -> Tensor:
    """Residual + GELU of a layer's own output (..., D), whose memory may be written to."""
    y = gelu(y) if with_gelu else y
    return y if residual is None else add(residual, y)


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, with_gelu: bool = False, residual: Tensor | None = None
) -> Tensor:
    """1x1 convolution as a matrix product on the cells, so that channels-last stays channels-last.

    Args:
        x: (B, C, H, W).
        weight: (D, C, 1, 1).
        bias: (D,) or ``None``.
        with_gelu: see :func:`linear`.
        residual: (B, D, H, W), see :func:`linear`.

    Returns:
        (B, D, H, W), channels-last in memory.
    """
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias, with_gelu, residual).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, (B, C, H, W) -> (B, D, H, W), by :func:`pointwise`."""

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__(channels, width, 1, bias=bias)

    def forward(self, x: Tensor, with_gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, D, H, W), see :func:`pointwise`."""
        return pointwise(x, self.weight, self.bias, with_gelu, residual)


def gelu(x: Tensor) -> Tensor:
    """GELU, in place where no gradient will ask for ``x`` again: a stage's maps are larger than any cache.

    ``x`` must be the caller's own intermediate, not an input somebody else still reads.
    """
    return F.gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)


def add(x: Tensor, own: Tensor) -> Tensor:
    """Sum of two tensors of any one shape, into the memory of ``own`` where no gradient asks for it.

    ``own`` must be the caller's own intermediate, not an input somebody else still reads.
    """
    if own.requires_grad or x.requires_grad or own.dtype != x.dtype or own.shape != x.shape:
        return x + own
    return own.add_(x)
