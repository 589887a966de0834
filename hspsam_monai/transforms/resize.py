"""The one way an image reaches the network's size, in training and in use."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor
from torch.nn import functional as F

from hspsam_monai.errors import DataError


def fit_image(image: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to ``size`` x ``size``: bilinear with antialiasing, aspect ratio not kept (HSP-SAM)."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    precise = torch.promote_types(image.dtype, torch.float32)  # antialiasing knows no 16-bit types on a CPU
    return F.interpolate(image.to(precise), (size, size), mode="bilinear", antialias=True).to(image.dtype)


class FitToNetworkd(MapTransform):
    """Bring one case to the network's size as plain tensors: image by :func:`fit_image`, label by nearest pixel.

    Args:
        image_size: side in pixels.
        image_key: key of the image (C, H, W).
        label_key: key of the label (1, H, W), or ``None``.
    """

    def __init__(self, image_size: int, image_key: str = "image", label_key: str | None = "label") -> None:
        super().__init__([image_key] if label_key is None else [image_key, label_key])
        self.image_size, self.image_key, self.label_key = image_size, image_key, label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize one case."""
        data = dict(data)
        data[self.image_key] = fit_image(plain(data[self.image_key])[None], self.image_size)[0]
        if self.label_key is not None:
            label = plain(data[self.label_key])[None]
            data[self.label_key] = F.interpolate(label, (self.image_size, self.image_size), mode="nearest-exact")[0]
        return data


class RequireSameSized(MapTransform):
    """Refuse a case whose label is of another size than its image: both would be stretched, and fit nowhere.

    Args:
        image_key: key of the image (C, H, W).
        label_key: key of the label (1, H, W).

    Raises:
        DataError: names the case and both sizes.
    """

    def __init__(self, image_key: str = "image", label_key: str = "label") -> None:
        super().__init__([image_key, label_key])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pass one case on as it is."""
        (height, width), (h, w) = (data[key].shape[-2:] for key in self.keys)
        if (h, w) != (height, width):
            raise DataError(
                f"{data.get('case', 'A case')}: found a mask of {w} x {h} pixels for an image of {width} x {height}; "
                "expected equal sizes. Export it again."
            )
        return dict(data)


def plain(x: Tensor) -> Tensor:
    """The tensor without MONAI's meta data, whose bookkeeping costs more than small operations do."""
    return x.as_tensor() if isinstance(x, MetaTensor) else x
