"""The one contract every encoder keeps: image in [0, 1] -> pyramid, embedding, attended prompt tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hspsam_monai.encoders.constants import Constants, KeepsConstants
from hspsam_monai.errors import ConfigError


class Level(NamedTuple):
    """What an encoder says of one level before it sees an image.

    ``channels`` C_l of the feature map, ``stride`` in input pixels, ``prompt_dim`` D_l of a learned prompt
    token that can join this level's attention (``None``: the level has no attention to join).
    """

    channels: int
    stride: int
    prompt_dim: int | None


class Features(NamedTuple):
    """What an encoder returns.

    Attributes:
        levels: feature maps from shallow to deep, each (B, C_l, H / stride_l, W / stride_l).
        embedding: SAM's image embedding (B, 256, H/16, W/16), or ``None`` if the encoder was built without
            its neck.
        tokens: attended prompt tokens of each level, (B, P, D_l), or ``None`` where no prompt joined.
    """

    levels: list[Tensor]
    embedding: Tensor | None
    tokens: list[Tensor | None]


class Encoded(NamedTuple):
    """An image that went through the encoder: what a network's ``encode`` returns and its ``decode`` takes.

    Attributes:
        features: the encoder's. Of stored features only those the network reads are there, the others are ``None``.
        size: (H, W) of the encoder's input; the network answers at this size.
        original: (H, W) of the picture before it was brought to ``size``, at which an inferer answers; ``None``: the
            same.
    """

    features: Features
    size: tuple[int, int]
    original: tuple[int, int] | None = None

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return next(t for t in (*self.features.levels, self.features.embedding) if t is not None).device


class Encoder(KeepsConstants):
    """Base of all image encoders.

    Subclasses set ``levels`` (shallow to deep) and implement :meth:`encode`; this class applies the
    encoder's own pixel statistics, so that no configuration can train with one normalisation and serve
    with another.

    Args:
        image_size: nominal input size in pixels, a multiple of ``multiple``; other sizes that are
            multiples run too unless the subclass says otherwise.
        pixel_mean: mean of each RGB channel on the [0, 1] scale.
        pixel_std: standard deviation of each RGB channel on the [0, 1] scale.
    """

    #: Both sides of an input must be a multiple of this many pixels.
    multiple = 32
    #: Parameter-name prefix of this encoder in SAM-style checkpoints.
    checkpoint_prefix = "image_encoder."
    levels: tuple[Level, ...]
    #: SAM's neck, or ``None`` where the encoder was built without.
    neck: nn.Module | None

    def __init__(self, image_size: int, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> None:
        super().__init__()
        if image_size <= 0 or image_size % self.multiple:
            raise ConfigError(
                f"image_size is {image_size}; {type(self).__name__} needs a positive multiple of {self.multiple}."
            )
        self.image_size = image_size
        self._constants = Constants()
        # Constants of the architecture, not learned: kept out of the state dict so that official files match.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor, prompts: list[Tensor | None] | None = None) -> Features:
        """Encode a batch of images.

        Args:
            image: (B, 3, H, W) in [0, 1]; H and W multiples of ``self.multiple``.
            prompts: for each level (P, D_l) learned tokens that join its attention as extra keys and
                values, or ``None``. ``None`` for all: the official encoder, exactly.

        Returns:
            :class:`Features`.

        Raises:
            ConfigError: the image is not (B, 3, H, W) with valid sides, or not of floating point, or prompts do not fit
                the levels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % self.multiple or image.shape[3] % self.multiple:
            raise ConfigError(
                f"{type(self).__name__} got an image of shape {tuple(image.shape)}; expected (B, 3, H, W) with H "
                f"and W multiples of {self.multiple}. Resize the image first (ImageInferer does)."
            )
        if not image.is_floating_point():
            raise ConfigError(
                f"{type(self).__name__} got an image of {image.dtype}; expected floating point in [0, 1]. Divide 8-bit "
                "values by 255."
            )
        if prompts is not None:
            self._check_prompts(prompts)
        image = (image - self.pixel_mean) / self.pixel_std
        return self.encode(image, prompts if prompts is not None else [None] * len(self.levels))

    def encode(self, image: Tensor, prompts: list[Tensor | None]) -> Features:
        """Encode normalised images (B, 3, H, W); one entry of ``prompts`` per level."""
        raise NotImplementedError

    def embed(self, level: Tensor) -> Tensor:
        """SAM's neck: the deepest level (B, C, H/16, W/16) -> embedding (B, 256, H/16, W/16)."""
        return self.neck(level)

    def embedding_of(self, features: Features) -> Tensor:
        """The embedding (B, 256, H/16, W/16), made from the deepest level where the features do not hold it."""
        return self.embed(features.levels[-1]) if features.embedding is None else features.embedding

    def official_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn the encoder part of an official checkpoint (prefix removed) into this module's state.

        Subclasses resample what depends on the input size and drop what has no counterpart here.
        """
        return state

    def _check_prompts(self, prompts: list[Tensor | None]) -> None:
        if len(prompts) != len(self.levels):
            raise ConfigError(f"{len(prompts)} prompt sets given; this encoder has {len(self.levels)} levels.")
        for index, (prompt, level) in enumerate(zip(prompts, self.levels, strict=True)):
            if prompt is None:
                continue
            if level.prompt_dim is None:
                raise ConfigError(f"Level {index} has no attention for prompts to join; pass None there.")
            if prompt.ndim != 2 or prompt.shape[1] != level.prompt_dim:
                raise ConfigError(
                    f"Prompts of level {index} have shape {tuple(prompt.shape)}; expected (P, {level.prompt_dim})."
                )
