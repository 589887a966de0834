"""The plain peer: the same encoder under a convolutional pyramid decoder, no prompts.

Every claim about self-prompting is made against this network, trained with the same budget and augmentation.
Reference for the arrangement: feature pyramid networks, arXiv 1612.03144.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders import Encoded, build_encoder
from hspsam_monai.networks.adaptation import LORA_RANK, set_adaptation
from hspsam_monai.networks.arguments import check_arguments
from hspsam_monai.networks.layers import LayerNorm2d, resize
from hspsam_monai.networks.stored import level_names


class ConvPyramidSAM(nn.Module):
    """SAM's encoder under a feature pyramid: 1x1 laterals, top-down sums, 3x3 convolutions, head at stride 4.

    Args:
        encoder: name of the image encoder.
        image_size: nominal side of the square input.
        num_classes: K classes, background first.
        adapt: what of the encoder is trained: ``full``, ``lora`` or ``frozen``.
        lora_rank: rank of the updates when ``adapt`` is ``lora``.
        width: channels of the pyramid.
        dropout: probability of dropping channels before the head, in train mode only.
        checkpointing: recompute the blocks of SAM's ViT in the backward pass, to save memory.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: str = "mobile_sam",
        image_size: int = 512,
        num_classes: int = 2,
        adapt: str = "full",
        lora_rank: int = LORA_RANK,
        width: int = 128,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(num_classes, dropout)
        self.encoder = build_encoder(
            encoder,
            image_size=image_size,
            lora_rank=lora_rank if adapt == "lora" else 0,
            embedding=False,
            checkpointing=checkpointing,
        )
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, width, 1) for level in self.encoder.levels)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width), nn.GELU())
            for _ in self.encoder.levels
        )
        self.head = nn.Conv2d(width, num_classes, 1)
        self.image_size, self.num_classes, self.dropout = image_size, num_classes, dropout
        set_adaptation(self.encoder, adapt)

    def forward(self, image: Tensor | Encoded) -> Tensor:
        """Map (B, 3, H, W) in [0, 1], or what :meth:`encode` made of it, to logits (B, K, H, W) in float32."""
        return self.decode(image if isinstance(image, Encoded) else self.encode(image))

    @property
    def stored(self) -> tuple[str, ...]:
        """What :meth:`decode` reads, see :mod:`hspsam_monai.networks.stored`."""
        return level_names(self.encoder)

    def encode(self, image: Tensor) -> Encoded:
        """The encoder's part of the forward pass, on (B, 3, H, W) in [0, 1]."""
        return Encoded(self.encoder(image), tuple(image.shape[-2:]))

    def decode(self, encoded: Encoded) -> Tensor:
        """The rest of the forward pass."""
        levels = encoded.features.levels
        x: Tensor | None = None
        for level, lateral, smooth in zip(levels[::-1], self.lateral[::-1], self.smooth[::-1], strict=True):
            y = lateral(level)
            x = smooth(y if x is None else y + resize(x, y.shape[-2:]))
        if self.dropout and self.training:
            x = F.dropout2d(x, self.dropout)
        return resize(self.head(x).float(), encoded.size)

    def load_sam(self, state: dict[str, Tensor]) -> list[str]:
        """Nothing but the encoder comes from SAM here."""
        return []
