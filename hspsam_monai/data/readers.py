"""MONAI image readers over :mod:`hspsam_monai.data.images`, for ``LoadImage(d)``.

``LoadImage`` swallows whatever a reader's ``read`` raises and tries MONAI's own readers instead, which read a
faulty mask with another meaning. Decoding therefore happens in ``get_data``, whose errors reach the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.data.utils import is_supported_format
from monai.utils import MetaKeys, SpaceKeys

from hspsam_monai.data.images import read_image, read_mask
from hspsam_monai.data.layouts import IMAGE_SUFFIXES
from hspsam_monai.errors import ConfigError, DataError


class _PictureReader(ImageReader):
    """What both readers share: ``read`` keeps the file names, ``get_data`` decodes."""

    def verify_suffix(self, filename: Sequence[str | Path] | str | Path) -> bool:
        """Tell whether every file name ends like a picture's."""
        return is_supported_format(filename, [suffix.lstrip(".") for suffix in IMAGE_SUFFIXES])

    def read(self, data: Sequence[str | Path] | str | Path, **_: Any) -> list[str]:
        """Keep the file names; the module's first lines say why nothing is opened here."""
        return [str(data)] if isinstance(data, str | Path) else [str(path) for path in data]


class PhotoReader(_PictureReader):
    """Photographs as (H, W, 3) float32 in [0, 1]; rows stay rows, unlike with MONAI's ``PILReader``.

    Example:
        ``LoadImaged(keys="image", reader="hspsam_monai.data.PhotoReader", ensure_channel_first=True)`` gives
        a MetaTensor (3, H, W).
    """

    def get_data(self, img: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode what ``read`` kept.

        Args:
            img: one file name in a list.

        Returns:
            (H, W, 3) float32 in [0, 1], and the metadata MONAI expects.

        Raises:
            DataError: see :func:`read_image`; or more than one file.
        """
        if len(img) != 1:
            raise DataError(f"Found {len(img)} photographs for one case ({img[:3]} …); expected one file a case.")
        array = read_image(img[0])
        return array, _meta(array, -1, img)


class MaskReader(_PictureReader):
    """Masks as (H, W) class indices; several files of one case are merged by maximum.

    Args:
        num_classes: classes with background, 2 to 256.

    Raises:
        ConfigError: `num_classes` out of range.

    Example:
        ``LoadImaged(keys="label", reader="hspsam_monai.data.MaskReader", num_classes=2,
        ensure_channel_first=True)`` gives a MetaTensor (1, H, W).
    """

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        if not 2 <= num_classes <= 256:
            raise ConfigError(f"num_classes is {num_classes}; expected 2 to 256, background included.")
        self.num_classes = num_classes

    def get_data(self, img: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode and merge what ``read`` kept.

        Args:
            img: the file names of one case's masks.

        Returns:
            (H, W) uint8 below `num_classes`, and the metadata MONAI expects.

        Raises:
            DataError: see :func:`read_mask`.
        """
        array = read_mask(img, self.num_classes)
        return array, _meta(array, float("nan"), img)  # nan is MONAI's "no channel axis"


def _meta(array: np.ndarray, channel_dim: float, paths: list[str]) -> dict[str, Any]:
    return {
        MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape[:2]),
        MetaKeys.ORIGINAL_CHANNEL_DIM: channel_dim,
        MetaKeys.AFFINE: np.eye(4),  # pixels have no place in the patient
        MetaKeys.SPACE: SpaceKeys.RAS,
        "filename_or_obj": paths[0],
    }
