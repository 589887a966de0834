"""Picture files -> arrays: photographs as RGB in [0, 1], masks as class indices.

Spatial order is always rows, columns (H, W), with the camera's EXIF rotation undone for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hspsam_monai.data.decode import FileFault, Picture, decode
from hspsam_monai.errors import ConfigError, DataError

_PERCENTILES = (0.5, 99.5)  # clips hot pixels; the range MONAI's own intensity examples use
_JPEG_THRESHOLD = 127
_JPEG_GREY_TOLERANCE = 8  # chroma rounding of a grey mask saved as RGB JPEG
_JPEG_MIDTONES = (32, 224)
_JPEG_MAX_MIDTONES = 0.25  # a photograph has more than half, a mask only its ringing edges
_LISTED = 8


def read_image(path: str | Path) -> np.ndarray:
    """Read one photograph.

    Grey is repeated to three channels; palettes are looked up; CMYK is converted; transparency is laid on
    black. 8-bit values are divided by 255. Data with more than 8 bits (16-bit, 32-bit, float) have no fixed
    white, so they are scaled by the percentiles 0.5 and 99.5 of the whole picture, all channels together (the
    colour balance stays), and clipped; where these coincide, by minimum and maximum; a constant picture
    becomes zeros.

    Args:
        path: PNG, JPEG, TIFF, BMP, WebP …; the content decides, not the suffix.

    Returns:
        (H, W, 3) float32 in [0, 1], upright.

    Raises:
        DataError: missing, zero bytes, no picture, truncated, several pages, NaN, unsupported layout.
    """
    picture = decode(path)
    values = _unit_range(picture)
    if picture.alpha is not None:
        values = values * picture.alpha[..., None]
    # A copy, because a broadcast view is read-only and torch refuses to share it.
    return np.array(np.broadcast_to(values, (*values.shape[:2], 3)), dtype=np.float32, order="C")


def _unit_range(picture: Picture) -> np.ndarray:
    values = picture.values
    if values.dtype == bool:
        return values.astype(np.float32)
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 255
    wide = values.astype(np.float64)  # 32-bit integers do not fit into float32
    # Colours under full transparency are arbitrary and must not set the range.
    visible = wide if picture.alpha is None else wide[picture.alpha > 0]
    if visible.size == 0:
        return np.zeros(values.shape, np.float32)
    low, high = np.percentile(visible, _PERCENTILES)
    if high <= low:
        low, high = visible.min(), visible.max()
    if high <= low:
        return np.zeros(values.shape, np.float32)
    return np.clip((wide - low) / (high - low), 0, 1).astype(np.float32)


def read_mask(path: str | Path | Sequence[str | Path], num_classes: int = 2) -> np.ndarray:
    """Read one mask, or several masks of one case merged by maximum.

    ========================  ==========================================================================
    file                      meaning
    ========================  ==========================================================================
    palette                   the index is the class
    grey, RGB(A) alike        the value is the class; binary tasks also read {0, 255} as {0, 1}
    JPEG, lossy WebP          binary tasks only: above 127 is 1
    anything else             refused, with the unknown values and how many pixels have them
    ========================  ==========================================================================

    Args:
        path: one file, or several files of equal size.
        num_classes: classes with background, 2 to 256.

    Returns:
        (H, W) uint8, each value below `num_classes`, upright.

    Raises:
        DataError: unreadable file, unknown values, colour-coded mask, masks of different sizes.
        ConfigError: `num_classes` out of range.
    """
    if not 2 <= num_classes <= 256:
        raise ConfigError(f"num_classes is {num_classes}; expected 2 to 256, background included.")
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ConfigError("read_mask got an empty list of files; expected at least one mask.")
    merged: np.ndarray | None = None
    for one in paths:
        mask = _read_one_mask(Path(one), num_classes)
        if merged is not None and mask.shape != merged.shape:
            raise FileFault(
                one,
                "size_mismatch",
                f"a mask of {size_text(mask)} pixels",
                f"{size_text(merged)} as in {paths[0]}",
                "All masks of a case must have the size of its image.",
            )
        merged = mask if merged is None else np.maximum(merged, mask)
    return merged


def mask_values(path: str | Path | Sequence[str | Path]) -> set[int]:
    """Values of a mask whose number of classes is not known; a mask of 0 and 255 has the values 0 and 1.

    Args:
        path: one file, or several files of one case.

    Raises:
        DataError: see :func:`read_mask`.
    """
    try:
        mask = read_mask(path, 2)
    except DataError as error:
        try:
            mask = read_mask(path, 256)
        except DataError:
            raise error from None  # what is wrong with it as a mask of one object
    return set(np.unique(mask).tolist())


def size_text(array: np.ndarray) -> str:
    """Width x height of an (H, W, …) array, as people write picture sizes."""
    return f"{array.shape[1]}x{array.shape[0]}"


def _read_one_mask(path: Path, num_classes: int) -> np.ndarray:
    picture = decode(path, indices=True)
    values = _single_channel(path, picture)
    if picture.inverted_palette and num_classes == 2:
        raise FileFault(
            path,
            "unknown_label",
            "a two-colour palette whose index 0 is white and 1 black",
            "index 0 for background",
            "Save the mask as 8-bit grey with 0 and 255, so that it cannot be read inverted.",
        )
    if picture.lossy and num_classes > 2:
        raise FileFault(
            path,
            "unknown_label",
            "a JPEG or lossy WebP mask",
            f"exact class numbers 0..{num_classes - 1}",
            "Lossy files blend classes at their borders: export the mask as PNG.",
        )
    present, counts = np.unique(values, return_counts=True)
    if num_classes == 2 and set(present.tolist()) <= {0, 255}:
        return (values != 0).astype(np.uint8)
    known = (present >= 0) & (present < num_classes) & (present == np.floor(present))
    if known.all():
        return values.astype(np.uint8)
    if picture.lossy:
        return _threshold_lossy(path, values)
    unknown, pixels = present[~known], int(counts[~known].sum())
    listed = ", ".join(f"{value:g}" for value in unknown[:_LISTED].tolist())
    more = f" and {unknown.size - _LISTED} more" if unknown.size > _LISTED else ""
    binary = "0 and 1, or 0 and 255" if num_classes == 2 else f"class numbers 0..{num_classes - 1}"
    raise FileFault(
        path,
        "unknown_label",
        f"unknown label {listed}{more} in {pixels} of {values.size} pixels",
        binary,
        "Relabel the mask, or raise the number of classes.",
    )


def _single_channel(path: Path, picture: Picture) -> np.ndarray:
    """(H, W) values of a mask stored as grey or as equal colour channels."""
    values, alpha = picture.values, picture.alpha
    if alpha is not None and values.min() == values.max():
        raise FileFault(
            path,
            "unknown_label",
            "one colour everywhere and a shape in the transparency only",
            "the mask in the values",
            "Flatten the mask on black before saving.",
        )
    first = values[..., 0]
    if values.shape[-1] == 3:
        spread = values.max(-1).astype(np.int64) - values.min(-1)
        if spread.max() > (_JPEG_GREY_TOLERANCE if picture.lossy else 0):
            raise FileFault(
                path,
                "unknown_label",
                f"a colour-coded mask ({int((spread > 0).sum())} coloured pixels)",
                "grey values or palette indices",
                "Convert the colours to class numbers.",
            )
    return first.astype(np.uint8) if first.dtype == bool else first


def _threshold_lossy(path: Path, values: np.ndarray) -> np.ndarray:
    low, high = _JPEG_MIDTONES
    midtones = float(((values > low) & (values < high)).mean())
    if midtones > _JPEG_MAX_MIDTONES or values.max() <= _JPEG_THRESHOLD:
        raise FileFault(
            path,
            "unknown_label",
            f"a JPEG with {midtones:.0%} mid-grey pixels and a maximum of {int(values.max())}",
            "nearly all pixels close to 0 or 255",
            "This looks like a photograph or like class numbers: export the mask as PNG.",
        )
    return (values > _JPEG_THRESHOLD).astype(np.uint8)
