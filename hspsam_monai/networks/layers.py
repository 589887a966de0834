"""Small layers the networks share."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders.layers import Pointwise, gelu


class PositionEncoding(PositionEmbeddingRandom):
    """SAM's position encoding, computed in float32 whatever the module's own type or autocast: it is all phases."""

    def _pe_encoding(self, coords: Tensor) -> Tensor:
        matrix = self.positional_encoding_gaussian_matrix
        precise = torch.promote_types(matrix.dtype, torch.float32)
        with torch.autocast(matrix.device.type, enabled=False):
            phases = 2 * math.pi * ((2 * coords.to(precise) - 1) @ matrix.to(precise))
            return torch.cat([phases.sin(), phases.cos()], dim=-1).to(matrix.dtype)


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of (B, C, H, W); SAM's parameters and values, one fused kernel."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C; channels-last in memory stays channels-last."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class NormGELU(LayerNorm2d):
    """SAM's LN2d + GELU pair between transposed convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C and apply GELU."""
        return gelu(super().forward(x))


class OwnGELU(nn.GELU):
    """GELU that may overwrite its input, which must be the output of the layer before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply GELU to a tensor of any shape."""
        return gelu(x)


def to_cells(x: Tensor) -> Tensor:
    """Map (B, C, h, w) -> its cells (B, h w, C), row by row."""
    return x.flatten(2).transpose(1, 2)


def to_map(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells (B, h w, C) -> their map (B, C, h, w) of ``size`` (h, w), channels-last without a copy.

    Written this way round: the strides of ``transpose`` and ``unflatten`` do not count as channels-last for a batch of
    one, and interpolation and convolutions then bring the map into the other order and back.
    """
    return cells.unflatten(1, size).permute(0, 3, 1, 2)


def mlp(widths: list[int], activation: type[nn.Module] = nn.ReLU, **options: float) -> nn.Sequential:
    """Linear layers of the given widths with ``activation`` between them (none after the last)."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation(**options)]
    return nn.Sequential(*layers[:-1])


class SeparableResidual(nn.Module):
    """x + W2 GELU(W1 LN(depthwise 3x3 (x))): local mixing at a cost linear in the channels' square only once.

    The last projection starts at zero, so a fresh block passes its input through.
    """

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.expand = Pointwise(channels, expansion * channels)
        self.project = Pointwise(expansion * channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return self.project(self.expand(self.norm(self.depthwise(x)), with_gelu=True), residual=x)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, C, H, W) to ``size``; returns ``x`` itself where the size already fits."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
