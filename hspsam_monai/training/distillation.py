"""SAM-SP's loss: every pass learns from the truth, the first also from the last (arXiv 2408.12364)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.training.losses import DiceCE


class SelfDistillation(nn.Module):
    """L = sum_s w_s L_sup(y_s, y) + weight * ramp * T^2 * KL(softmax(stopgrad y_S / T) || softmax(y_0 / T)).

    L_sup is HSP-SAM's 0.2 CE + 0.8 Dice. What a simulated person's corrections give (``SAMSP(corrections=...)``) adds
    its mean L_sup, times ``correction_weight``. The paper draws the distillation without its formula; direction
    (prompted teaches unprompted), form, temperature and ramp are our choices.

    Args:
        weight: weight of the distillation; 0 leaves it out.
        temperature: T.
        ramp: iterations over which the distillation grows linearly from 0 to its weight.
        pass_weights: w_s of the supervised terms, first pass to last; ``None`` weighs all 1.
        correction_weight: weight of the corrected masks' supervised term.

    Attach it to the trainer (as a handler) so that it knows the iteration; without, the ramp counts as done.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 2.0,
        ramp: int = 500,
        pass_weights: Sequence[float] | None = None,
        correction_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.supervised = DiceCE()
        self.weight, self.temperature, self.ramp = weight, temperature, ramp
        self.pass_weights, self.correction_weight = pass_weights, correction_weight
        self.progress = 1.0

    def attach(self, engine: Engine) -> None:
        """Follow the trainer's iterations."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._follow)

    def _follow(self, engine: Engine) -> None:
        self.progress = min(1.0, engine.state.iteration / self.ramp) if self.ramp else 1.0

    def forward(self, output: Any, label: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            output: ``SAMSPOutput`` of the network in training, or logits (B, K, H, W) of a single pass.
            label: class indices (B, 1, H, W).
        """
        passes = output.passes if hasattr(output, "passes") else [output]
        weights = self.pass_weights or [1.0] * len(passes)
        loss = sum(w * self.supervised(logits, label) for w, logits in zip(weights, passes, strict=True))
        if self.weight and len(passes) > 1:
            loss = loss + self.weight * self.progress * self.distillation(passes[0], passes[-1])
        if corrected := getattr(output, "corrected", ()):
            supervised = sum(self.supervised(logits, label) for logits in corrected) / len(corrected)
            loss = loss + self.correction_weight * supervised
        return loss

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 KL(teacher || student), mean over pixels; no gradient reaches the teacher."""
        t = self.temperature
        with torch.autocast(student.device.type, enabled=False):
            log_student = F.log_softmax(student.float() / t, dim=1)
            log_teacher = F.log_softmax(teacher.detach().float() / t, dim=1)
            return t * t * (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()
