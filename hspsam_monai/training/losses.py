"""The supervised loss of HSP-SAM: 0.2 cross entropy + 0.8 soft Dice, always in float32."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn


class DiceCE(nn.Module):
    """0.2 CE + 0.8 Dice on full-resolution logits (HSP-SAM's trainer; the weights are SAMed's).

    Dice: softmax, squared denominator, mean over all classes with background, pooled over the batch, so a batch
    with empty masks stays well defined. Sums run in float32 whatever the network computes in: half precision
    overflows on a 512 x 512 mask.

    Args:
        ce: weight of the cross entropy.
        dice: weight of the Dice loss.
    """

    def __init__(self, ce: float = 0.2, dice: float = 0.8) -> None:
        super().__init__()
        self.loss = DiceCELoss(
            to_onehot_y=True, softmax=True, squared_pred=True, batch=True, lambda_ce=ce, lambda_dice=dice
        )

    def forward(self, output: Tensor | tuple, label: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            output: logits (B, K, H, W), or a named tuple whose first field they are.
            label: class indices (B, 1, H, W).
        """
        logits = output[0] if isinstance(output, tuple) else output
        with torch.autocast(logits.device.type, enabled=False):
            return self.loss(logits.float(), label)
