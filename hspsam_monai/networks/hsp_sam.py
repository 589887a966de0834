"""HSP-SAM: hierarchical self-prompting SAM (arXiv 2506.02854).

    image -> encoder (+ Q_l as extra keys and values at every level) -> F_1..F_4
    Q_l   -> Q -> A generator -> A_l
    F_4..F_1, A_4..A_1 -> hierarchical decoder -> logits of K classes

No click, no box: the prompts are learned from the task. Built from plain arguments, without file or network
access; SAM's weights are loaded afterwards (:func:`hspsam_monai.networks.load_pretrained`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders import Encoded, build_encoder
from hspsam_monai.networks.adaptation import LORA_RANK, set_adaptation
from hspsam_monai.networks.arguments import check_arguments
from hspsam_monai.networks.hierarchical_decoder import HierarchicalDecoder
from hspsam_monai.networks.prompter import HierarchicalPrompter
from hspsam_monai.networks.stored import level_names


class HSPSAM(nn.Module):
    """Hierarchical self-prompting SAM.

    Args:
        encoder: name of the image encoder, see :func:`hspsam_monai.encoders.build_encoder`.
        image_size: nominal side of the square input, a multiple of 32.
        num_classes: K classes, background first.
        prompts_per_level: P learned prompts per level; ``None`` for the paper's choice, P = K.
        prompt_source: ``static`` (paper), ``image`` (ours: the prompts that feed the decoder have attended the
            image) or ``none`` (ablation without prompts).
        decoder: ``paper`` or ``slim`` (ours, for small encoders).
        adapt: what of the encoder is trained: ``lora`` (paper), ``full`` or ``frozen``.
        lora_rank: rank of the updates on q and v when ``adapt`` is ``lora``.
        dropout: probability of dropping channels of the encoder's levels, in train mode only. It is the only thing that
            train mode changes, so Monte-Carlo dropout measures nothing else.
        inject: let the prompts join the encoder's attention (paper). Without, they feed the decoder alone and the
            encoder is the official one, whose features can be stored (:mod:`hspsam_monai.networks.stored`).
        checkpointing: recompute the blocks of SAM's ViT in the backward pass, to save memory.
        in_channels: must be 3; grey images are repeated over the channels by the transforms.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: str = "sam_vit_b",
        image_size: int = 512,
        num_classes: int = 2,
        prompts_per_level: int | None = None,
        prompt_source: str = "static",
        decoder: str = "paper",
        adapt: str = "lora",
        lora_rank: int = LORA_RANK,
        dropout: float = 0.0,
        in_channels: int = 3,
        inject: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(num_classes, dropout, in_channels)
        self.encoder = build_encoder(
            encoder,
            image_size=image_size,
            lora_rank=lora_rank if adapt == "lora" else 0,
            return_tokens=prompt_source == "image",
            # The paper fine-tunes SAM's own neck as the neck of the deepest level; the slim decoder has its own.
            embedding=decoder == "paper",
            checkpointing=checkpointing,
        )
        levels = self.encoder.levels
        self.decoder = HierarchicalDecoder(
            levels, num_classes, [level.prompt_dim is not None for level in levels], decoder
        )
        self.prompter = HierarchicalPrompter(
            levels,
            self.decoder.width,
            num_classes if prompts_per_level is None else prompts_per_level,
            prompt_source,
            inject,
        )
        self.image_size, self.num_classes, self.dropout = image_size, num_classes, dropout
        set_adaptation(self.encoder, adapt)

    def forward(self, image: Tensor | Encoded) -> Tensor:
        """Segment a batch.

        Args:
            image: (B, 3, H, W) in [0, 1], H and W multiples of 32; or what :meth:`encode` made of it.

        Returns:
            Logits (B, K, H, W) in float32; softmax over K gives class probabilities.
        """
        return self.decode(image if isinstance(image, Encoded) else self.encode(image))

    @property
    def stored(self) -> tuple[str, ...]:
        """What :meth:`decode` reads, see :mod:`hspsam_monai.networks.stored`."""
        return level_names(self.encoder)

    def encode(self, image: Tensor) -> Encoded:
        """The encoder's part of the forward pass, on (B, 3, H, W) in [0, 1]."""
        return Encoded(self.encoder(image, self.prompter.encoder_prompts()), tuple(image.shape[-2:]))

    def decode(self, encoded: Encoded) -> Tensor:
        """The rest of the forward pass: prompts and decoder."""
        features = encoded.features
        prompts = self.prompter(features.tokens)
        levels = list(features.levels)
        if self.encoder.neck is not None:
            levels[-1] = self.encoder.embedding_of(features)
        if self.dropout and self.training:
            levels = [F.dropout2d(level, self.dropout) for level in levels]
        return self.decoder(levels, prompts, encoded.size)

    @torch.no_grad()
    def load_sam(self, state: dict[str, Tensor]) -> list[str]:
        """Take everything but the encoder from SAM's own state; returns the keys used."""
        return self.decoder.load_sam(state)
