"""What the supports say of a pixel before anything is learned, as a prior of SAM's mask.

Ours, not the paper's (arXiv 2502.03501). SAM's frozen decoder knows where things end, but not which thing is meant; a
generator trained on some tasks points at other tasks' objects less surely than the share of mask in the support cells
most alike, which needs no training. So SAM's mask corrects that share instead of replacing it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Shares are kept this far from 0 and 1, so that a mask can overrule them.
_MARGIN = 0.01


class SharePrior(nn.Module):
    """Mask logits and share -> mask logits: a weighted sum of the mask and of the share's logit.

    Attributes:
        weights: of the mask and of the share. SAM's logits reach 20 and the share's 4.6: 1/4 makes them equals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.25, 1.0]))

    def forward(self, masks: Tensor, share: Tensor) -> Tensor:
        """Logits (B, N, H, W) and share (B, N, 1, h, w) in [0, 1] -> logits (B, N, H, W), float32."""
        known = F.interpolate(share[:, :, 0].float(), masks.shape[-2:], mode="bilinear", align_corners=False)
        return self.weights[0] * masks.float() + self.weights[1] * torch.logit(known.clamp(_MARGIN, 1 - _MARGIN))
