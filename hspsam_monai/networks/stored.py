"""Features that are computed once and stored: what a frozen encoder said of an image, as plain tensors.

A network takes part by three members:

* ``encode(image) -> Encoded``: everything up to the features. What it returns for storing must not depend on anything
  that is trained, or it would be stale after one step.
* ``decode(encoded, ...)``: the rest. ``forward`` accepts an :class:`~hspsam_monai.encoders.Encoded` in place of the
  image, so that engines, inferers and parallel wrappers call it as always.
* ``stored``: names of what ``decode`` reads, among ``level_0`` .. ``level_3`` (:func:`level_names`) and ``embedding``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hspsam_monai.encoders import Encoded, Encoder, Features
from hspsam_monai.errors import ConfigError

_LEVEL, _EMBEDDING = "level_", "embedding"


def level_names(encoder: Encoder) -> tuple[str, ...]:
    """Names of an encoder's levels, shallow to deep."""
    return tuple(f"{_LEVEL}{index}" for index in range(len(encoder.levels)))


def pack(features: Features, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Pick the named tensors of some features."""
    return {
        name: features.embedding if name == _EMBEDDING else features.levels[int(name.removeprefix(_LEVEL))]
        for name in names
    }


def unpack(tensors: Mapping[str, Tensor]) -> Features:
    """Features of stored tensors, each (B, C, H, W); levels that were not stored are ``None``."""
    found = {int(name.removeprefix(_LEVEL)): tensor for name, tensor in tensors.items() if name.startswith(_LEVEL)}
    count = max(found, default=-1) + 1
    return Features([found.get(i) for i in range(count)], tensors.get(_EMBEDDING), [None] * count)


def encoded_of(batch: Mapping[str, Tensor]) -> Encoded:
    """What a batch of stored features stands for.

    Args:
        batch: features by name, each (B, C, H, W); ``size`` (B, 2), rows and columns of the encoder's input, equal
            for all; and perhaps ``original`` (B, 2), those of the pictures. Every value has the batch as its first
            axis, which is what MONAI's engines take apart.
    """
    size, original = (tuple(batch[key][0].tolist()) if key in batch else None for key in ("size", "original"))
    return Encoded(unpack(batch), size, original)


def require_storable(network: nn.Module, image: Tensor) -> None:
    """Refuse a network whose features change while it is trained.

    Nothing is assumed of the network: one image is encoded, and whatever was learned on the way shows in the gradient.

    Args:
        network: see the module's description.
        image: (B, 3, H, W) in [0, 1] on the network's device.

    Raises:
        ConfigError: the network has no ``encode`` and ``decode``, or what it stores depends on trained parameters.
    """
    name = type(network).__name__
    if not all(hasattr(network, part) for part in ("encode", "decode", "stored")):
        raise ConfigError(f"{name} has no encode, decode and stored, so its features cannot be stored; train without.")
    with torch.enable_grad():
        learned = [key for key, tensor in pack(network.encode(image).features, network.stored).items()
                   if tensor.requires_grad]  # fmt: skip
    if learned:
        trained = [key for key, p in network.encoder.named_parameters() if p.requires_grad]
        cause = f"{len(trained)} parameters of its encoder are trained ({', '.join(trained[:3])}, ...)"
        raise ConfigError(
            f"The features of {name} cannot be stored: {', '.join(learned)} depend on what is trained; "
            f"{cause if trained else 'learned prompts join the encoder'}. Expected a frozen encoder without injected "
            "prompts: set adapt to 'frozen' (and inject to false for HSPSAM), or train without stored features."
        )


def features_digest(network: nn.Module) -> str:
    """Sha256 of everything in the network that stored features depend on: the encoder's kind and frozen weights."""
    encoder = network.encoder
    digest = hashlib.sha256(repr((type(encoder).__qualname__, encoder.levels, tuple(network.stored))).encode())
    frozen = [(key, p) for key, p in encoder.named_parameters() if not p.requires_grad]
    for key, tensor in sorted([*frozen, *encoder.named_buffers()]):
        value = tensor.detach().cpu().contiguous()
        digest.update(repr((key, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
