"""Supports as they are given: checked one by one, and their masks at the network's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hspsam_monai.errors import ConfigError, DataError

_ROUNDING = 1e-4  # resampling white leaves 1 + 2^-23


def checked(
    images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor], num_classes: int, like: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Look through supports; every fault is named with its support's number.

    Args:
        images: K images (3, H, W) in [0, 1], each of its own size.
        masks: K masks (H, W) or (1, H, W) of class indices, each of its image's size.
        num_classes: background included.
        like: whose device and number type the images get.

    Returns:
        Pairs of an image (3, H, W) in [0, 1] and its mask (H, W) of class indices.

    Raises:
        ConfigError: no support, numbers or shapes that disagree, a grey image.
        DataError: values out of range, a mask without any object, a class that no support shows.
    """
    if not len(images) or len(images) != len(masks):
        raise ConfigError(f"{len(images)} support images and {len(masks)} masks given; expected K >= 1 of each.")
    pairs, seen = [], set()
    for number, (given, labels) in enumerate(zip(images, masks, strict=True), start=1):
        image, mask = given.to(like.device, like.dtype), labels.to(like.device)
        mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
        if image.ndim != 3 or len(image) != 3 or mask.shape != image.shape[1:]:
            raise ConfigError(
                f"Support {number} has an image of shape {tuple(image.shape)} and a mask of {tuple(mask.shape)}; "
                "expected (3, H, W) and (H, W). Repeat a grey image over three channels."
            )
        if not (image.min() >= -_ROUNDING and image.max() <= 1 + _ROUNDING):  # also catches NaN
            raise DataError(
                f"Support image {number} has values in [{image.min():g}, {image.max():g}]; expected [0, 1]. "
                "Divide 8-bit values by 255."
            )
        found = set(mask.unique().tolist())
        unknown = sorted(found - set(range(num_classes)))
        if unknown:
            raise DataError(
                f"Support mask {number} has the values {unknown[:8]}; expected classes 0..{num_classes - 1}."
            )
        if not found - {0}:
            raise DataError(
                f"Support mask {number} shows no object; expected at least one pixel of a class. Leave this "
                "support out, or correct its mask."
            )
        seen |= found
        pairs.append((image.clamp(0, 1), mask))
    absent = sorted(set(range(1, num_classes)) - seen)
    if absent:
        raise DataError(f"No support shows class {absent[0]}; expected every class in at least one support.")
    return pairs


def objects_of(masks: Tensor, num_classes: int, image_size: int) -> Tensor:
    """Masks (S, H, W) of class indices -> one mask an object (S, N, size, size), float32 in {0, 1}.

    An object too small for the samples keeps every cell it touches.
    """
    size = (image_size, image_size)
    labels = (masks.round() if masks.is_floating_point() else masks)[:, None]
    objects = (labels == torch.arange(1, num_classes, device=masks.device)[:, None, None]).float()
    if tuple(objects.shape[-2:]) == size:
        return objects
    sampled, touched = F.interpolate(objects, size, mode="nearest-exact"), F.adaptive_max_pool2d(objects, size)
    return torch.where(sampled.amax((-2, -1), keepdim=True) > 0, sampled, touched)
