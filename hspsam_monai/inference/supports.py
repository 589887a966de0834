"""A folder of images and masks -> the context of a network that is prompted by examples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hspsam_monai.data import find_cases, mask_values, read_image, read_mask
from hspsam_monai.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def support_labels(folder: str | Path) -> dict[str, int]:
    """Classes that the masks of a folder of supports show: ``object``, or ``object_1`` … ``object_N``.

    Masks of 0 and 255 show one object; class ids and palettes as many as their highest value.

    Args:
        folder: supports, ``images/`` and ``masks/``.

    Returns:
        Class name -> index, background included.

    Raises:
        DataError: no supports, unreadable masks, or a number between that no mask holds.
    """
    found = _classes(folder, find_cases(folder))
    if len(found) == 1:
        return {"background": 0, "object": 1}
    return {"background": 0, **{f"object_{index}": index for index in found}}


def read_supports(folder: str | Path, num_classes: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Read a folder of supports.

    Args:
        folder: ``images/`` and ``masks/`` of equal names, as a data set; grey images are repeated over the channels,
            every image may have its own size.
        num_classes: K, background included.

    Returns:
        Images (3, H, W) in [0, 1], masks (H, W) of class indices, and the cases' names.

    Raises:
        DataError: no supports; a mask that is unreadable, of another size than its image or without any object; or
            the masks show another number of classes. The file is named.
    """
    cases = find_cases(folder)
    found = _classes(folder, cases)
    if len(found) != num_classes - 1:
        raise DataError(
            f"{folder}: the support masks show {len(found)} objects; expected the network's {num_classes - 1}. "
            "Correct the masks, or set labels to their classes."
        )
    images, masks = [], []
    for case in cases:
        image, mask = read_image(case["image"]), read_mask(case["label"], num_classes)
        if mask.shape != image.shape[:2]:
            raise DataError(
                f"{_name(case)}: found a mask of {mask.shape[1]}x{mask.shape[0]} pixels; expected "
                f"{image.shape[1]}x{image.shape[0]}, as {case['image']}. Draw the mask on this very image."
            )
        images.append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
        masks.append(torch.from_numpy(mask))
    return images, masks, [case["case"] for case in cases]


def give_context(network: nn.Module, folder: str | Path) -> None:
    """Compute the context of a folder of supports once and give it to the network.

    Args:
        network: a network with ``set_context``, on its device and with its weights loaded.
        folder: see :func:`read_supports`.

    Raises:
        ConfigError: the network takes no supports.
        DataError: see :func:`read_supports`.
    """
    if not hasattr(network, "set_context"):
        raise ConfigError(
            f"{type(network).__name__} takes no supports; expected a Proxy Prompt network. Leave --support out, or "
            "name a model trained with network/proxy_prompt.json."
        )
    images, masks, names = read_supports(folder, network.num_classes)
    network.set_context(images, masks)
    logger.info("Context of %d supports from %s.", len(names), folder)


def _classes(folder: str | Path, cases: list[dict[str, Any]]) -> list[int]:
    """Class indices 1 … N that the masks show together."""
    found: set[int] = set()
    for case in cases:
        values = mask_values(case["label"]) - {0}
        if not values:
            raise DataError(
                f"{_name(case)}: found no foreground; expected at least one pixel of an object in every support mask. "
                "Remove this support, or correct its mask."
            )
        found |= values
    if found != set(range(1, len(found) + 1)):
        raise DataError(
            f"{folder}: the support masks hold the values {', '.join(map(str, [0, *sorted(found)][:9]))}; expected 0 "
            "and 255 for one object, or 0 … N with each of the N classes in at least one support. Renumber them."
        )
    return sorted(found)


def _name(case: dict[str, Any]) -> str:
    label = case["label"]
    return str(label[0] if isinstance(label, list) else label)
