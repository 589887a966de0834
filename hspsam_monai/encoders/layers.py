"""Layers done with less memory traffic on channels-last maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution as a matrix product on the cells, so that channels-last stays channels-last.

    Args:
        x: (B, C, H, W).
        weight: (D, C, 1, 1).
        bias: (D,) or ``None``.

    Returns:
        (B, D, H, W), channels-last in memory.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, (B, C, H, W) -> (B, D, H, W), by :func:`pointwise`."""

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__(channels, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H, W)."""
        return pointwise(x, self.weight, self.bias)


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
