"""What the supports say of a pixel before anything is learned, as a prior of SAM's mask.

Ours, not the paper's (arXiv 2502.03501). SAM's frozen decoder knows where things end, but not which thing is meant; a
generator trained on some tasks points at other tasks' objects less surely than the share of mask in the support cells
most alike, which needs no training. So SAM's mask corrects that share instead of replacing it.

The share of a small object stays low even where it is right, since its few cells are outnumbered, and it has holes. How
much share makes an object, given the shares around, is learned by three small convolutions that see nothing else: no
appearance that they could remember a task by.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Shares are kept this far from 0 and 1, so that a mask can overrule them.
_MARGIN = 0.01


class SharePrior(nn.Module):
    """Mask logits and share -> mask logits: gate * mask + z + refine(z), with z the logit of the share.

    Args:
        hidden: channels of ``refine``.

    Attributes:
        gate: weight of the mask. It starts near 0 (choice: 0.02, not 0, so that the generator has a gradient): an
            untrained generator's mask is noise, and what the share says must not be unlearned before there is
            something better.
    """

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.02))
        self.refine = nn.Sequential(
            nn.Conv2d(1, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, 1, 3, padding=1),
        )
        nn.init.normal_(self.refine[-1].weight, std=1e-2)
        nn.init.zeros_(self.refine[-1].bias)

    def forward(self, masks: Tensor, share: Tensor) -> Tensor:
        """Logits (B, N, H, W) and share (B, N, 1, h, w) in [0, 1] -> logits (B, N, H, W), float32."""
        z = torch.logit(share.float().clamp(_MARGIN, 1 - _MARGIN)).flatten(0, 1)
        known = (z + self.refine(z.to(self.gate.dtype))).float().unflatten(0, share.shape[:2])[:, :, 0]
        known = F.interpolate(known, masks.shape[-2:], mode="bilinear", align_corners=False)
        return self.gate * masks.float() + known
