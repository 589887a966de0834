"""Learning curves, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.files import atomic_write
from hspsam_monai.report.gallery import font, text

# Okabe and Ito's colours without the yellow, too faint for a line on white.
_LINES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (120, 120, 120))
_INK, _FAINT, _GRID = (28, 30, 36), (110, 116, 128), (228, 231, 236)
#: Everything is drawn this many times larger and shrunk at the end: smooth lines without a plotting library.
_SCALE = 2


def learning_curve_png(
    path: str | Path,
    epochs: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str = "",
    best: str | None = None,
    size: tuple[int, int] = (900, 380),
) -> Path:
    """Draw how losses and scores went over the epochs; the best epoch is marked.

    Series with ``loss`` in their name share the left panel, all others the right one; a panel without series
    is left out.

    Args:
        path: the PNG to write, whole or not at all.
        epochs: epoch numbers, at least one, rising.
        series: name -> one value for each epoch; ``None`` or nan where it was not measured.
        title: heading.
        best: name of the series that picks the best epoch (the highest value, of a loss the lowest); ``None``
            takes the first score, else the first loss.
        size: width and height in pixels.

    Raises:
        DataError: no epoch, no series, or a series of another length.
        ConfigError: ``best`` names no series.
    """
    if not len(epochs) or not series:
        raise DataError("A learning curve needs at least one epoch and one series.")
    odd = {name: len(values) for name, values in series.items() if len(values) != len(epochs)}
    if odd:
        raise DataError(f"{len(epochs)} epochs, but series of length {odd}; give one value for each epoch.")
    if best is not None and best not in series:
        raise ConfigError(f"best={best!r} is no series; expected one of {', '.join(series)}.")
    # None becomes nan, infinities too: neither has a place on an axis.
    lines = {name: np.array([np.nan if v is None else v for v in values], float) for name, values in series.items()}
    lines = {name: np.where(np.isfinite(values), values, np.nan) for name, values in lines.items()}
    steps = np.asarray(epochs, float)
    groups = [{n: v for n, v in lines.items() if ("loss" in n.lower()) is loss} for loss in (True, False)]
    leader = best or next(iter(groups[1] or groups[0]))
    mark = _best_index(lines[leader], lower="loss" in leader.lower())
    groups = [group for group in groups if group]

    width, height = size[0] * _SCALE, size[1] * _SCALE
    picture = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    words = "" if mark is None else f"best epoch {steps[mark]:g}: {leader} {lines[leader][mark]:.4g}"
    used = text(draw, (18 * _SCALE, 12 * _SCALE), title, 18 * _SCALE, _INK, width * 0.6) if title else 0
    text(
        draw,
        (18 * _SCALE + used + (14 * _SCALE if used else 0), 15 * _SCALE),
        words,
        14 * _SCALE,
        _FAINT,
        width,
    )
    for i, group in enumerate(groups):
        left, right = width * i // len(groups), width * (i + 1) // len(groups)
        box = (left + 62 * _SCALE, 72 * _SCALE, right - 22 * _SCALE, height - 48 * _SCALE)
        colours = {name: _LINES[list(lines).index(name) % len(_LINES)] for name in group}
        _panel(draw, box, steps, group, colours, mark)
    with atomic_write(path) as part:
        picture.resize(size, Image.Resampling.LANCZOS).save(part, format="PNG", optimize=True)
    return Path(path)


def _best_index(values: np.ndarray, lower: bool) -> int | None:
    if np.isnan(values).all():
        return None
    return int(np.nanargmin(values) if lower else np.nanargmax(values))


def _panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    steps: np.ndarray,
    lines: Mapping[str, np.ndarray],
    colours: Mapping[str, tuple[int, int, int]],
    mark: int | None,
) -> None:
    """One pair of axes with its grid, lines and key; ``box`` is left, top, right, bottom of the axes."""
    left, top, right, bottom = box
    values = np.concatenate(list(lines.values()))
    values = values[~np.isnan(values)]
    y_ticks = nice_ticks(values.min(), values.max()) if values.size else [0.0, 1.0]
    x_ticks = [t for t in nice_ticks(steps[0], steps[-1], 6) if steps[0] <= t <= steps[-1]]
    # Small numbers of epochs: a tick between two epochs would mean nothing.
    x_ticks = [t for t in x_ticks if t == int(t)] or [steps[0]]
    span = max(steps[-1] - steps[0], 1e-12)

    def x_of(step: float) -> float:
        return left + (right - left) * (0.5 if len(steps) == 1 else (step - steps[0]) / span)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    small = font(12 * _SCALE)
    digits = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))
    for tick in y_ticks:
        draw.line((left, y_of(tick), right, y_of(tick)), fill=_GRID, width=_SCALE)
        label = f"{tick:.{digits}f}" if 1e-4 < y_ticks[-1] - y_ticks[0] < 1e5 else f"{tick:.2g}"
        draw.text((left - 8 * _SCALE, y_of(tick)), label, font=small, fill=_FAINT, anchor="rm")
    for tick in x_ticks:
        draw.line((x_of(tick), bottom, x_of(tick), bottom + 5 * _SCALE), fill=_FAINT, width=_SCALE)
        draw.text((x_of(tick), bottom + 8 * _SCALE), f"{tick:g}", font=small, fill=_FAINT, anchor="mt")
    draw.line((left, bottom, right, bottom), fill=_FAINT, width=_SCALE)
    draw.text(((left + right) / 2, bottom + 26 * _SCALE), "epoch", font=small, fill=_INK, anchor="mt")
    if mark is not None:
        x = x_of(steps[mark])
        for y in range(top, bottom, 8 * _SCALE):  # dashes
            draw.line((x, y, x, min(y + 4 * _SCALE, bottom)), fill=_FAINT, width=_SCALE)

    key = float(left)
    for name, line in lines.items():
        points = [(x_of(s), y_of(v)) for s, v in zip(steps, line, strict=True) if not np.isnan(v)]
        if len(points) > 1:
            draw.line(points, fill=colours[name], width=2 * _SCALE + 1, joint="curve")
        if len(points) == 1 or len(points) <= 12:
            for x, y in points:
                _dot(draw, x, y, 3 * _SCALE, colours[name])
        if mark is not None and not np.isnan(line[mark]):
            x, y = x_of(steps[mark]), y_of(line[mark])
            _dot(draw, x, y, 6 * _SCALE, (255, 255, 255))
            _dot(draw, x, y, 4.5 * _SCALE, colours[name])
        y = top - 18 * _SCALE
        draw.line((key, y, key + 18 * _SCALE, y), fill=colours[name], width=3 * _SCALE)
        room = max(right - key - 24 * _SCALE, 20 * _SCALE)
        key += 24 * _SCALE + text(draw, (key + 24 * _SCALE, y - 8 * _SCALE), name, 13 * _SCALE, _INK, room)
        key += 18 * _SCALE


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At least two round numbers that enclose ``low … high``: steps of 1, 2 or 5 times a power of ten."""
    low, high = float(low), float(high)
    if high - low < 1e-9 * max(abs(low), abs(high), 1.0):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 3 - math.floor(math.log10(step)))  # cuts the dust of binary fractions: 0.30000000000000004
    return [round(k * step, digits) for k in range(first, max(last, first + 1) + 1)]
