"""What a person adds to an automatic mask, clicks, boxes and scribbles, as SAM's prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.sam_decoder import ABSENT, Prompts

#: Points that stand for a scribble. SAM was trained with up to nine clicks an object (appendix A of its paper).
SCRIBBLE_POINTS = 5


def user_prompts(
    objects: int,
    clicks: Sequence[tuple[int, float, float, int]] = (),
    boxes: Sequence[tuple[int, float, float, float, float]] = (),
    scribbles: Sequence[tuple[int, Tensor | np.ndarray | Sequence[Sequence[float]], int]] = (),
    points: int = SCRIBBLE_POINTS,
) -> Prompts:
    """Collect the marks on one image.

    Positions are pixels of the image that is handed over with them, x before y:
    :class:`~hspsam_monai.inference.ImageInferer` scales them with it, a network takes those of its input. Mirror images
    (``flips``) cannot be averaged with them.

    Args:
        objects: N = K - 1 foreground classes.
        clicks: (object 1 … N, x, y, label), label 1 on the object, 0 off it.
        boxes: (object, x0, y0, x1, y1), at most one an object, drawn from any corner to the opposite one.
        scribbles: (object, line, label); a line is a polyline (n, 2) of x, y, or a bool mask (H, W) of its pixels.
        points: points that a scribble becomes.

    Returns:
        :class:`Prompts` of one image, (1, N, …). Objects without a mark have none.

    Raises:
        ConfigError: an object or label that does not exist, a second box, an empty or shapeless scribble, a position
            that is not finite.
    """
    marks: list[list[tuple[float, float, int]]] = [[] for _ in range(objects)]
    for index, x, y, label in clicks:
        marks[_object(index, objects)].append((*_finite(x, y), _label(label)))
    for index, line, label in scribbles:
        marks[_object(index, objects)] += [(x, y, _label(label)) for x, y in scribble_points(line, points).tolist()]
    parts: dict[str, Tensor] = {}
    longest = max((len(own) for own in marks), default=0)
    if longest:
        filled = [own + [(0.0, 0.0, ABSENT)] * (longest - len(own)) for own in marks]
        parts["points"] = torch.tensor([[mark[:2] for mark in own] for own in filled])[None]
        parts["labels"] = torch.tensor([[mark[2] for mark in own] for own in filled])[None]
    if boxes:
        parts["boxes"], parts["has_box"] = torch.zeros(1, objects, 4), torch.zeros(1, objects, dtype=torch.bool)
        for index, *corners in boxes:
            slot = _object(index, objects)
            if parts["has_box"][0, slot]:
                raise ConfigError(f"Object {index} has two boxes; expected at most one.")
            x0, y0, x1, y1 = _finite(*corners)
            # SAM takes a box by its upper left corner and its lower right one.
            ordered = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
            parts["boxes"][0, slot], parts["has_box"][0, slot] = torch.tensor(ordered), True
    return Prompts(**parts)


def scribble_points(line: Tensor | np.ndarray | Sequence[Sequence[float]], count: int = SCRIBBLE_POINTS) -> Tensor:
    """Points that stand for a scribble.

    Args:
        line: polyline (n, 2) of x, y: points at equal steps along it, both ends included (the middle for one point).
            Or a bool mask (H, W): pixels far from each other, the first the one nearest to the scribble's centre.
        count: P points; fewer where the mask has fewer pixels.

    Returns:
        (P, 2) float32 x, y.

    Raises:
        ConfigError: nothing drawn, neither of the two shapes, or a position that is not finite.
    """
    drawn = np.asarray(line.detach().cpu() if isinstance(line, Tensor) else line)
    if count < 1 or drawn.ndim != 2 or (drawn.dtype != bool and drawn.shape[1] != 2):
        raise ConfigError(
            f"A scribble has shape {drawn.shape} and type {drawn.dtype}, for {count} points; expected a polyline (n, 2)"
            " of x, y or a bool mask (H, W)."
        )
    if not (drawn.any() if drawn.dtype == bool else len(drawn)):
        raise ConfigError("A scribble is empty; expected at least one point.")
    if not np.isfinite(drawn).all():
        raise ConfigError("A scribble has a position that is not finite; expected pixels.")
    chosen = _spread(drawn, count) if drawn.dtype == bool else _along(drawn.astype(np.float64), count)
    return torch.from_numpy(chosen.astype(np.float32))


def _along(line: np.ndarray, count: int) -> np.ndarray:
    lengths = np.concatenate([[0.0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()])
    at = np.linspace(0, lengths[-1], count) if count > 1 else lengths[-1:] / 2
    return np.stack([np.interp(at, lengths, line[:, axis]) for axis in (0, 1)], axis=1)


def _spread(mask: np.ndarray, count: int) -> np.ndarray:
    """Farthest-point sampling of the mask's pixels."""
    pixels = np.argwhere(mask)[:, ::-1].astype(np.float64)  # x before y
    chosen = [int(((pixels - pixels.mean(0)) ** 2).sum(1).argmin())]
    distance = np.full(len(pixels), np.inf)
    while len(chosen) < min(count, len(pixels)):
        distance = np.minimum(distance, ((pixels - pixels[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return pixels[chosen]


def _object(index: int, objects: int) -> int:
    if not (1 <= index <= objects and index == int(index)):
        raise ConfigError(f"A mark is for object {index}; expected a whole number from 1 to {objects}.")
    return int(index) - 1


def _finite(*position: float) -> tuple[float, ...]:
    found = tuple(map(float, position))
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"A mark is at {', '.join(map(str, found))}; expected finite pixels.")
    return found


def _label(label: int) -> int:
    if label not in (0, 1):
        raise ConfigError(f"A mark has the label {label}; expected 1 (on the object) or 0 (off it).")
    return label
