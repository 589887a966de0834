"""What a context says of each cell, as SAM's dense prompt: where SAM's prompt encoder would embed a coarse mask.

The proxy tokens stand for hw/16 places, too few to tell where an object ends; SAM's decoder takes that from its dense
prompt. The paper (arXiv 2502.03501) puts the proxy "in place of the prompt encoder's output", which has both parts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hspsam_monai.networks.layers import LayerNorm2d


class DensePrompt(nn.Module):
    """Target features, context and share -> what is added to SAM's "no mask" embedding; starts near nothing.

    Args:
        width: C.
        hidden: channels inside.
    """

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.norm_x, self.norm_e = LayerNorm2d(width), LayerNorm2d(width)
        self.join = nn.Conv2d(2 * width + 1, hidden, 1)
        self.body = nn.Sequential(
            LayerNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            LayerNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, width, 3, padding=1),
        )
        nn.init.normal_(self.body[-1].weight, std=1e-3)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, features: Tensor, context: Tensor, share: Tensor) -> Tensor:
        """Features (B, C, h, w), context (B, N, C, h, w) and share (B, N, 1, h, w) in [0, 1] -> (B, N, C, h, w)."""
        objects = context.shape[1]
        x = self.norm_x(features)[:, None].expand(-1, objects, -1, -1, -1)
        e = self.norm_e(context.flatten(0, 1).to(x.dtype)).unflatten(0, context.shape[:2])
        joined = torch.cat([x, e, share.to(x.dtype)], dim=2).flatten(0, 1)
        return self.body(self.join(joined)).unflatten(0, context.shape[:2])
