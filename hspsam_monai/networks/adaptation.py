"""How much of a pretrained encoder is trained: nothing, low-rank updates, or all of it."""

from __future__ import annotations

from torch import nn

from hspsam_monai.errors import ConfigError

ADAPTATIONS = ("frozen", "lora", "full")

#: HSP-SAM's LoRA rank (paper's development code).
LORA_RANK = 32


def set_adaptation(encoder: nn.Module, adapt: str) -> None:
    """Mark the encoder's parameters as trained or not.

    Args:
        encoder: an encoder built with ``lora_rank > 0`` where ``adapt`` is ``lora``.
        adapt: ``frozen`` (nothing but SAM's own neck, which the paper fine-tunes for the deepest level),
            ``lora`` (the same, and the low-rank updates) or ``full`` (everything).

    Raises:
        ConfigError: unknown mode, or ``lora`` without any low-rank update.
    """
    if adapt not in ADAPTATIONS:
        raise ConfigError(f"adapt is {adapt!r}; expected one of {', '.join(ADAPTATIONS)}.")
    if adapt == "lora" and not any("lora_" in name for name, _ in encoder.named_parameters()):
        raise ConfigError("adapt is 'lora' and lora_rank 0; expected a rank of 1 or more, or adapt 'frozen'.")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(adapt == "full" or (adapt == "lora" and "lora_" in name) or name.startswith("neck."))
