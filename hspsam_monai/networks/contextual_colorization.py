"""CCM, the contextual colorization module of Proxy Prompt: target features coloured by the context -> proxy tokens.

Four blocks of dual-reverse cross-attention, drawn in the paper's figure (arXiv 2502.03501). Where it is silent the
choices are ours: each block halves the tokens by a learned weighting of neighbours (the paper: 16 in all), SAM's
position encoding is added to both streams, attention is half as wide as the tokens, as in SAM's decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders.layers import apply_linear
from hspsam_monai.networks.layers import mlp
from hspsam_monai.networks.sam_decoder import WIDTH

#: Colorization blocks (paper); each halves the tokens.
BLOCKS = 4


class TokenMerge(nn.Module):
    """Strided merging: two neighbours along one axis, each channel in its own proportion, then a projection.

    An odd last row or column is paired with itself.
    """

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.share = nn.Parameter(torch.full((2, width), 0.5))
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) to half of h (axis 1) or w (axis 2), rounded up."""
        if x.shape[self.axis] % 2:
            x = torch.cat([x, x.narrow(self.axis, x.shape[self.axis] - 1, 1)], dim=self.axis)
        first, second = x.unflatten(self.axis, (-1, 2)).unbind(self.axis + 1)
        return apply_linear(self.project, first * self.share[0] + second * self.share[1])


class CrossAttention(nn.Module):
    """x + attention of LN(x) to LN(other), then x + FFN(LN(x)): one half of a colorization block."""

    def __init__(self, width: int, heads: int, ffn_width: int) -> None:
        super().__init__()
        inner = width // 2
        self.heads = heads
        self.norm_x, self.norm_other, self.norm_ffn = (nn.LayerNorm(width) for _ in range(3))
        # A bias of the keys would add the same to all scores of a query: softmax does not see it.
        self.q, self.v, self.k = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.ffn = mlp([width, ffn_width, width], nn.GELU)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Tokens x (B, T, C) attend to others (B, T', C)."""
        other = self.norm_other(other)
        q, k, v = (
            apply_linear(layer, t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, self.norm_x(x)), (self.k, other), (self.v, other))
        )
        x = apply_linear(self.out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), residual=x)
        enter, _, leave = self.ffn
        return apply_linear(leave, apply_linear(enter, self.norm_ffn(x), with_gelu=True), residual=x)


class ColorizationBlock(nn.Module):
    """Dual-reverse cross-attention: x attends to e, then e to the updated x; both residuals start at the projection."""

    def __init__(self, width: int, heads: int, ffn_width: int, axis: int) -> None:
        super().__init__()
        self.merge_x, self.merge_e = TokenMerge(width, axis), TokenMerge(width, axis)
        self.x_to_e, self.e_to_x = CrossAttention(width, heads, ffn_width), CrossAttention(width, heads, ffn_width)

    def forward(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Both (B, h, w, C) with half of one axis afterwards."""
        x, e = self.merge_x(x), self.merge_e(e)
        grid = tuple(x.shape[1:3])
        x, e = x.flatten(1, 2), e.flatten(1, 2)
        x = self.x_to_e(x, e)
        e = self.e_to_x(e, x)
        return x.unflatten(1, grid), e.unflatten(1, grid)


class ContextualColorizationModule(nn.Module):
    """CCM: target features coloured by the context -> proxy tokens.

    Args:
        width: C.
        heads: of each attention.
        ffn_width: inside the feed-forward layers.
    """

    def __init__(self, width: int = WIDTH, heads: int = 8, ffn_width: int = 256) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ColorizationBlock(width, heads, ffn_width, 2 - i % 2) for i in range(BLOCKS))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, context: Tensor, position: Tensor) -> Tensor:
        """Make the prompt.

        Args:
            features: F_x (B, C, h, w).
            context: E_ctx (B, N, C, h, w).
            position: (C, h, w), SAM's encoding of each cell.

        Returns:
            (B N, ceil(h/4) ceil(w/4), C).
        """
        objects = context.shape[1]
        x = (features + position)[:, None].expand(-1, objects, -1, -1, -1).flatten(0, 1).permute(0, 2, 3, 1)
        e = (context.to(features.dtype) + position).flatten(0, 1).permute(0, 2, 3, 1)
        for block in self.blocks:
            x, e = block(x, e)
        return self.norm(e.flatten(1, 2))
