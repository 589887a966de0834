"""Masks as pictures: outlines over an image, the error map."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter

from hspsam_monai.errors import DataError
from hspsam_monai.inference.mask_files import PALETTE

#: Outline of the truth; no class has a colour near it.
TRUTH_COLOUR = (255, 221, 51)
#: Tints of the error map: predicted but not true, true but not predicted, predicted as another class.
FALSE_POSITIVE, FALSE_NEGATIVE, CONFUSED = (230, 97, 0), (64, 120, 255), (200, 60, 220)


def overlay(
    image: np.ndarray,
    mask: np.ndarray | None,
    truth: np.ndarray | None = None,
    palette: np.ndarray = PALETTE,
    *,
    fill: float = 0.0,
    errors: bool = False,
    line: float | None = None,
) -> np.ndarray:
    """Draw a predicted mask, and where given its truth, over an image.

    Every line is anti-aliased and lies on a dark seam, so it stands out on bright and dark tissue alike. The
    prediction has its classes' colours, the truth is yellow and lies below.

    Args:
        image: (H, W, 3) or (H, W); uint8, or float in [0, 1].
        mask: (H, W) predicted class indices; ``None`` draws the truth alone.
        truth: (H, W) true class indices.
        palette: (N, 3) uint8 RGB, row k for class k; classes beyond N - 1 repeat the rows from 1.
        fill: opacity in [0, 1] of the area of the prediction (of the truth, without a prediction).
        errors: tint the wrong pixels of a grey picture instead of filling: orange is predicted but not true,
            blue is missed, purple is the wrong class. Needs ``mask`` and ``truth``; the prediction's line is
            left out.
        line: width of the lines in pixels; ``None`` scales it to the image, 1 in 140.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: the shapes do not match, or ``errors`` lacks one of the masks.
    """
    canvas = to_rgb(image).astype(np.float32)
    for name, plane in (("mask", mask), ("truth", truth)):
        if plane is not None and plane.shape != canvas.shape[:2]:
            raise DataError(f"The {name} is {plane.shape}, the image {canvas.shape[:2]}; expected one size.")
    width = max(1.3, min(canvas.shape[:2]) / 140) if line is None else line
    if errors:
        if mask is None or truth is None:
            raise DataError("An error map needs a prediction and a truth.")
        # Grey, since orange on red tissue would not be seen.
        canvas[:] = (canvas @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        wrong = mask != truth
        _tint(canvas, wrong & (truth == 0), FALSE_POSITIVE, 0.65)
        _tint(canvas, wrong & (mask == 0), FALSE_NEGATIVE, 0.65)
        _tint(canvas, wrong & (truth != 0) & (mask != 0), CONFUSED, 0.65)
    elif fill > 0:
        area = mask if mask is not None else truth
        for k in _classes(area):
            colour = _colour(palette, k) if mask is not None else TRUTH_COLOUR
            _tint(canvas, area == k, colour, fill)
    if truth is not None:
        for k in _classes(truth):
            _outline(canvas, truth == k, TRUTH_COLOUR, width)
    if mask is not None and not errors:
        for k in _classes(mask):
            _outline(canvas, mask == k, _colour(palette, k), width)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def to_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 1 | 3 | 4), uint8 or float in [0, 1] -> (H, W, 3) uint8.

    Raises:
        DataError: another shape or another type.
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise DataError(f"A picture of shape {image.shape} cannot be drawn; expected (H, W) or (H, W, 3).")
    if image.dtype.kind == "f":
        # NaN marks a fault upstream; black shows it, a cast would be undefined.
        image = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    elif image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif image.dtype != np.uint8:
        raise DataError(f"A picture of {image.dtype} cannot be drawn; expected uint8, or float in [0, 1].")
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]


def _colour(palette: np.ndarray, k: int) -> np.ndarray:
    return palette[1 + (k - 1) % (len(palette) - 1)]


def _classes(mask: np.ndarray) -> list[int]:
    return [int(k) for k in np.unique(mask) if k > 0]


def _tint(canvas: np.ndarray, where: np.ndarray, colour: tuple[int, ...] | np.ndarray, opacity: float) -> None:
    """Blend a colour into ``canvas`` (H, W, 3) float, in place, where the bool mask holds."""
    canvas[where] += (np.asarray(colour, dtype=np.float32) - canvas[where]) * opacity


def _outline(canvas: np.ndarray, region: np.ndarray, colour: tuple[int, ...] | np.ndarray, width: float) -> None:
    """Draw the border of a bool region (H, W) on ``canvas`` (H, W, 3) float, in place.

    The line follows the zero of a signed distance, slightly smoothed: pixel stairs vanish and the coverage
    of a pixel, hence its opacity, comes from its distance to the line.
    """
    reach = int(np.ceil(2 * width)) + 4
    rows, columns = find_objects(region.astype(np.int8))[0]
    box = (
        slice(max(rows.start - reach, 0), rows.stop + reach),
        slice(max(columns.start - reach, 0), columns.stop + reach),
    )
    inside = region[box]
    if inside.all():
        return  # no border to draw
    # Half a pixel on either side puts the zero on the edge between two pixels.
    signed = np.where(inside, distance_transform_edt(inside) - 0.5, 0.5 - distance_transform_edt(~inside))
    distance = np.abs(gaussian_filter(signed, 0.35 + 0.25 * width))
    for tone, half, strength in (
        ((12, 12, 16), width / 2 + max(0.8, width * 0.45), 0.7),
        (colour, width / 2, 1.0),
    ):
        alpha = (np.clip(half + 0.5 - distance, 0, 1) * strength)[..., None].astype(np.float32)
        canvas[box] += (np.asarray(tone, dtype=np.float32) - canvas[box]) * alpha
