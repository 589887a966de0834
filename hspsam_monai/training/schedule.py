"""Optimiser groups and learning-rate schedule."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

from hspsam_monai.errors import ConfigError

logger = logging.getLogger(__name__)

#: How names of parameters end that have several axes and yet are positions or tokens, not matrices.
_UNDECAYED = (
    "pos_embed", "rel_pos_h", "rel_pos_w", "attention_biases", "_token", "_tokens", "classes", "log_rates", "share",
)  # fmt: skip


def parameter_groups(
    network: nn.Module, lr: float, encoder_lr_scale: float = 1.0, weight_decay: float = 0.1
) -> list[dict]:
    """Groups for AdamW: only what is trained; no decay on vectors; the encoder's own weights at a scaled rate.

    Args:
        network: a network with an ``encoder``.
        lr: learning rate of everything that is new (decoder, prompts, LoRA).
        encoder_lr_scale: factor for pretrained encoder weights.
        weight_decay: decay of matrices; norms, biases, positions, tokens, prompts, a scan's rates and shares get none.

    Raises:
        ConfigError: nothing is trainable.
    """
    module = getattr(network, "module", network)  # DistributedDataParallel
    # SAM keeps its tokens, points and masks' absences in tables.
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    pretrained = {id(p) for name, p in module.encoder.named_parameters() if "lora_" not in name}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        decayed = p.ndim > 1 and id(p) not in tables and not name.endswith(_UNDECAYED) and "queries" not in name
        groups.setdefault((id(p) in pretrained, decayed), []).append(p)
    if not groups:
        raise ConfigError(
            "No parameter of the network is trained; set adapt to 'lora' or 'full', or train the decoder."
        )
    return [
        {
            "params": params,
            "lr": lr * (encoder_lr_scale if encoder else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (encoder, decayed), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def warmup_poly(
    optimizer: torch.optim.Optimizer, total: int, warmup: int = 250, power: float = 5.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over ``warmup`` iterations, then (1 - t/T)^power down to zero at ``total`` iterations.

    250 and 5 are the paper's values. A run shorter than ten warm-ups warms up over a tenth of its length.
    """
    asked, warmup = warmup, max(1, min(warmup, total // 10))
    if warmup < asked:
        logger.info("The run has %d iterations: it warms up over %d instead of %d.", total, warmup, asked)
    span = max(1, total - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, 1.0 - (step - warmup) / span) ** power

    return _EveryIteration(optimizer, factor)


class _EveryIteration(torch.optim.lr_scheduler.LambdaLR):
    """Steps with every batch, also while gradients of several add up, of which PyTorch warns."""

    def step(self, epoch: int | None = None) -> None:
        """Go to the next rate."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            super().step(epoch)
