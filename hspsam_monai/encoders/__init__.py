"""Image encoders: image -> pyramid of features, official weights, learned prompt tokens, LoRA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature

from hspsam_monai.encoders.base import Encoded, Encoder, Features, Level
from hspsam_monai.encoders.sam_vit import SamViT
from hspsam_monai.encoders.tiny_vit import TinyViT
from hspsam_monai.errors import ConfigError

__all__ = ["ENCODERS", "Encoded", "Encoder", "Features", "Level", "SamViT", "TinyViT", "build_encoder"]

#: Every encoder by name; a new one is one file and one line here.
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "sam_vit_b": partial(SamViT, "b"),
    "sam_vit_l": partial(SamViT, "l"),
    "sam_vit_h": partial(SamViT, "h"),
    "mobile_sam": partial(TinyViT, variant="mobile_sam"),
    "lite_medsam": partial(TinyViT, variant="lite_medsam"),
}


def build_encoder(name: str, image_size: int = 1024, **options: object) -> Encoder:
    """Build an image encoder with random weights; no file and no network access.

    Args:
        name: a key of :data:`ENCODERS`.
        image_size: nominal side of the input in pixels, a multiple of 32.
        **options: what the encoder takes, for example ``lora_rank`` or ``return_tokens``. ``checkpointing`` (recompute
            blocks in the backward pass) is SAM's ViT's alone; the small encoders need no such thing.

    Raises:
        ConfigError: the name is unknown or an option does not fit.
    """
    if name not in ENCODERS:
        raise ConfigError(f"Encoder {name!r} is unknown; expected one of {', '.join(ENCODERS)}.")
    if "checkpointing" not in signature(ENCODERS[name]).parameters and options.pop("checkpointing", False):
        raise ConfigError(f"Encoder {name!r} has no checkpointing; only SAM's ViTs have. Set checkpointing to false.")
    return ENCODERS[name](image_size=image_size, **options)
