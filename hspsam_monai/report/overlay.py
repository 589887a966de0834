"""Masks as pictures: outlines over an image, the error map, palette PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter

from hspsam_monai.errors import DataError
from hspsam_monai.files import atomic_write

# Chosen once by farthest-point search in CIELAB: each next colour maximises its smallest distance to all
# before it, to black, to white and to TRUTH_COLOUR, as seen with normal vision and with each of the three
# colour-vision deficiencies (Machado et al. 2009, full severity). The first eight keep a distance above 20
# in every view; more classes than about sixteen cannot be told apart by colour alone.
_CLASS_COLOURS = """
    33bbee e66100 aa44ff 5d8b74 a2e88b 5d468b a22e17 4600ff e8a2b9 005d5d 8ba25d 8b74a2
    5d74d1 5de8ff 17d146 4646b9 17ffb9 5d7446 a2ff74 8bb98b 465d46 e874d1 d15d2e 46a2ff
    5d2ed1 ff8b00 d18bb9 8be8e8 a24674 5d46a2 74d12e a217ff e82ee8 b9ff5d 8bd18b d15d74
    5d5d8b b9e8d1 2eb946 b92e00 8b462e 5d74b9 5d8bff 74d1ff ffb974 a2748b 8b8b5d 46b9a2
    17a2d1 d18b2e d14600 5d46d1 00d1d1 e8d1a2 b9462e 5d5dd1 b98b8b ffe8a2 46745d 748b46
    e817a2 e8a274 ffa2d1
"""

#: Colours of the classes, (64, 3) uint8 RGB; row 0 is the background, black.
PALETTE: np.ndarray = np.array(
    [(0, 0, 0), *(tuple(bytes.fromhex(colour)) for colour in _CLASS_COLOURS.split())], dtype=np.uint8
)
PALETTE.setflags(write=False)
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


def colour_mask(mask: np.ndarray, palette: np.ndarray = PALETTE) -> np.ndarray:
    """Paint class indices (H, W) in their colours on black: (H, W, 3) uint8."""
    return _table(palette)[np.asarray(mask).astype(np.uint8)]


def write_mask_png(path: str | Path, mask: np.ndarray, palette: np.ndarray = PALETTE) -> Path:
    """Write class indices as a palette PNG, whole or not at all.

    A viewer shows coloured classes on black; a reader gets the indices themselves.

    Args:
        path: the file to write.
        mask: (H, W) integers in 0 … 255.
        palette: (N, 3) uint8 RGB, row k for class k.

    Raises:
        DataError: the mask is not two-dimensional, not integer or out of range.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or mask.dtype.kind not in "bui":
        raise DataError(f"A mask PNG needs an (H, W) integer mask; this one is {mask.shape} {mask.dtype}.")
    if mask.min() < 0 or mask.max() > 255:
        raise DataError(f"A mask PNG holds 0 … 255; this mask has {mask.min()} … {mask.max()}.")
    height, width = mask.shape
    picture = Image.frombytes("P", (width, height), np.ascontiguousarray(mask, dtype=np.uint8).tobytes())
    # All 256 entries, so that the file keeps 8 bits a pixel: some readers misread packed 1, 2 or 4 bits.
    picture.putpalette(_table(palette).tobytes())
    with atomic_write(path) as part:
        picture.save(part, format="PNG")
    return Path(path)


def _table(palette: np.ndarray) -> np.ndarray:
    """(256, 3): the background, then the class colours over and over."""
    palette = np.asarray(palette, dtype=np.uint8)
    return np.concatenate([palette[:1], np.resize(palette[1:], (255, 3))])


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
