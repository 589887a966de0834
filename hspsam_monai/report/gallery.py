"""A contact sheet: every case as image, truth and prediction, worst first, on one PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.files import atomic_write
from hspsam_monai.inference.mask_files import PALETTE
from hspsam_monai.report.overlay import (
    CONFUSED,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    TRUTH_COLOUR,
    overlay,
    to_rgb,
)
from hspsam_monai.scores import CaseScore

#: An array, or a function that loads it when its turn comes, so that a large cohort never fills memory.
Plane = np.ndarray | Callable[[], np.ndarray]

_PAPER, _INK, _FAINT, _GOOD, _BAD = (
    (255, 255, 255),
    (28, 30, 36),
    (110, 116, 128),
    (0, 114, 102),
    (190, 60, 0),
)


@dataclass(frozen=True)
class GalleryItem:
    """One case of a gallery.

    Attributes:
        case: its name.
        image: (H, W, 3) or (H, W), uint8 or float in [0, 1].
        truth: (H, W) class indices, ``None`` where there is none.
        prediction: (H, W) class indices.
        scores: its row of the table, ``None`` without truth.
        confidence: the model's own, in [0, 1]; ``None`` takes that of ``scores``.
        note: what a reader should know of the case, under its name on the page.

    ``image``, ``truth`` and ``prediction`` may be functions that return the array.
    """

    case: str
    image: Plane
    truth: Plane | None
    prediction: Plane
    scores: CaseScore | None = None
    confidence: float | None = None
    note: str = ""

    @property
    def dice(self) -> float | None:
        """Mean Dice over the classes, where scored."""
        return None if self.scores is None else self.scores.mean_dice

    @property
    def certainty(self) -> float | None:
        """The item's confidence, else its row's."""
        if self.confidence is not None or self.scores is None:
            return self.confidence
        return self.scores.confidence

    @property
    def multiclass(self) -> bool:
        """Whether its scores tell of more than one foreground class."""
        return self.scores is not None and len(self.scores.dice) > 1

    def panels(self, size: int | None = None, palette: np.ndarray = PALETTE) -> list[np.ndarray]:
        """Draw the case.

        Args:
            size: scale the longest side to this many pixels; ``None`` keeps the size.
            palette: (N, 3) uint8 RGB.

        Returns:
            (h, w, 3) uint8 pictures: image, truth, prediction with the truth's outline, error map; without a
            truth only image and prediction.

        Raises:
            DataError: image and masks differ in size.
        """
        image, prediction = to_rgb(_load(self.image)), _load(self.prediction)
        truth = None if self.truth is None else _load(self.truth)
        for name, mask in (("prediction", prediction), ("truth", truth)):
            if mask is not None and mask.shape != image.shape[:2]:
                raise DataError(f"{self.case}: the {name} is {mask.shape}, the image {image.shape[:2]}.")
        # Scaled before drawing: lines keep their width and their anti-aliasing.
        shape = _fitted(image.shape[:2], size)
        image = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.LANCZOS))
        prediction = _nearest(prediction, shape)
        if truth is None:
            return [image, overlay(image, prediction, palette=palette, fill=0.3)]
        truth = _nearest(truth, shape)
        # One class: yellow is the truth. Several: the truth shows which is which, in the classes' colours.
        several = self.multiclass or max(truth.max(), prediction.max()) > 1
        of_truth = (truth, None) if several else (None, truth)
        return [
            image,
            overlay(image, *of_truth, palette, fill=0.3),
            overlay(image, prediction, truth, palette),
            overlay(image, prediction, truth, palette, errors=True),
        ]


def panel_names(with_truth: bool) -> list[str]:
    """Captions of :meth:`GalleryItem.panels`."""
    return ["Image", "Truth", "Prediction", "Errors"] if with_truth else ["Image", "Prediction"]


def colour_key(items: Sequence[GalleryItem]) -> list[tuple[str, tuple[int, int, int]]]:
    """Name the colours that the panels of these cases use: (meaning, RGB)."""
    several = any(item.multiclass for item in items)
    red, green, blue = (int(v) for v in PALETTE[1])
    key = [("prediction (a colour for each class)" if several else "prediction", (red, green, blue))]
    if any(item.truth is not None for item in items):
        key = [("truth", TRUTH_COLOUR), *key]
        key += [("predicted, not true", FALSE_POSITIVE), ("missed", FALSE_NEGATIVE)]
        key += [("wrong class", CONFUSED)] if several else []
    return key


def worst_first(items: Iterable[GalleryItem]) -> list[GalleryItem]:
    """Sort by Dice, lowest first; then the cases without score, by confidence or else as given."""

    def key(item: GalleryItem) -> tuple[bool, float, str]:
        value = item.dice if item.dice is not None else item.certainty
        return item.dice is None, 2.0 if value is None else value, "" if value is None else item.case

    return sorted(items, key=key)


def gallery_png(
    path: str | Path,
    items: Sequence[GalleryItem],
    columns: int = 2,
    title: str = "",
    *,
    max_rows: int = 12,
    panel: int = 200,
    palette: np.ndarray = PALETTE,
) -> Path:
    """Write a contact sheet, worst cases first.

    Args:
        path: the PNG to write, whole or not at all.
        items: at least one case; those beyond ``columns * max_rows`` are left out, and the sheet says so.
        columns: cases side by side.
        title: heading of the sheet.
        max_rows: rows of cases.
        panel: width of one picture in pixels.
        palette: (N, 3) uint8 RGB.

    Raises:
        DataError: no case, or image and masks of a case differ in size.
        ConfigError: a count below 1, or panels too small to read (under 64 pixels).
    """
    if not items:
        raise DataError("A gallery needs at least one case.")
    if columns < 1 or max_rows < 1 or panel < 64:
        raise ConfigError(f"columns={columns}, max_rows={max_rows}, panel={panel}; expected 1, 1, 64 or more.")
    shown = worst_first(items)[: columns * max_rows]
    drawn = [item.panels(panel, palette) for item in shown]
    # One height for all rows, that of the tallest picture, keeps the grid straight.
    height = max(picture.shape[0] for pictures in drawn for picture in pictures)
    count = max(len(pictures) for pictures in drawn)
    sheet = _Sheet(columns, -(-len(shown) // columns), count, panel, height)
    sheet.head(title, _note(items, shown), colour_key(shown))
    for index, (item, pictures) in enumerate(zip(shown, drawn, strict=True)):
        sheet.case(index, item, pictures)
    with atomic_write(path) as part:
        sheet.picture.save(part, format="PNG", optimize=True)
    return Path(path)


def _note(items: Sequence[GalleryItem], shown: Sequence[GalleryItem]) -> str:
    dice = [item.dice for item in items if item.dice is not None]
    words = [f"{len(items)} case{'s' * (len(items) != 1)}"]
    if dice:
        words.append(f"mean Dice {np.mean(dice):.3f}")
        words.append("worst first")
    if len(shown) < len(items):
        words.append(f"{len(items) - len(shown)} not shown")
    return "  ·  ".join(words)


class _Sheet:
    """The page: margins, heading, and a grid of cells, each a caption above its panels."""

    margin, gap, gutter, head_height, caption_height = 28, 4, 28, 108, 46

    def __init__(self, columns: int, rows: int, panels: int, panel: int, height: int) -> None:
        self.columns, self.panel, self.height = columns, panel, height
        self.cell_width = panels * panel + (panels - 1) * self.gap
        self.cell_height = self.caption_height + height + 18
        width = 2 * self.margin + columns * self.cell_width + (columns - 1) * self.gutter
        self.picture = Image.new("RGB", (width, self.head_height + rows * self.cell_height + 12), _PAPER)
        self.draw = ImageDraw.Draw(self.picture)

    def head(self, title: str, note: str, key: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
        """Write title, note and the key of the colours."""
        room = self.picture.width - 2 * self.margin
        text(self.draw, (self.margin, 18), title or "Cases", 26, _INK, room)
        text(self.draw, (self.margin, 54), note, 15, _FAINT, room)
        x = self.margin
        for name, colour in key:
            self.draw.rounded_rectangle((x, 81, x + 18, 91), 3, fill=colour, outline=_INK)
            x += 25 + text(self.draw, (x + 25, 78), name, 14, _INK, room) + 22

    def case(self, index: int, item: GalleryItem, pictures: Sequence[np.ndarray]) -> None:
        """Draw one case into its cell."""
        row, column = divmod(index, self.columns)
        left = self.margin + column * (self.cell_width + self.gutter)
        top = self.head_height + row * self.cell_height
        right = left + self.cell_width
        label, colour = _label(item)
        taken = self.draw.textlength(label, font=font(16))
        text(self.draw, (right - taken, top + 4), label, 16, colour, self.cell_width)
        text(self.draw, (left, top + 4), item.case, 16, _INK, self.cell_width - taken - 16)
        for i, picture in enumerate(pictures):
            x = left + i * (self.panel + self.gap) + (self.panel - picture.shape[1]) // 2
            y = top + self.caption_height
            text(self.draw, (x, y - 18), panel_names(item.truth is not None)[i], 12, _FAINT, self.panel)
            self.picture.paste(Image.fromarray(picture), (x, y))


def _label(item: GalleryItem) -> tuple[str, tuple[int, int, int]]:
    if item.dice is not None:
        return f"Dice {item.dice:.3f}", _GOOD if item.dice >= 0.5 else _BAD
    return ("" if item.certainty is None else f"confidence {item.certainty:.2f}"), _FAINT


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font: the same on every machine, no font file to find."""
    return ImageFont.load_default(size=size)


def text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    words: str,
    size: int,
    colour: tuple[int, int, int],
    room: float,
) -> float:
    """Write one line, cut in its middle where longer than ``room`` pixels; return the width it took."""
    face = font(size)
    words = "".join(c if c.isprintable() else "?" for c in words)
    kept = len(words)
    line = words
    while kept > 1 and draw.textlength(line, font=face) > room:
        kept -= 1  # both ends of a file name tell cases apart, its middle seldom does
        line = f"{words[: (kept + 1) // 2]}…{words[len(words) - kept // 2 :]}"
    draw.text(at, line, font=face, fill=colour)
    return draw.textlength(line, font=face)


def _load(plane: Plane) -> np.ndarray:
    return np.asarray(plane() if callable(plane) else plane)


def _fitted(shape: tuple[int, ...], size: int | None) -> tuple[int, int]:
    scale = 1.0 if size is None else size / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _nearest(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) class indices at another size: the value at each pixel's centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(shape, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]
