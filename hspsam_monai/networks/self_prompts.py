"""From a predicted mask to the prompt of the next pass: box, mask logits, points. Batched, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.sam_decoder import ABSENT, Prompts

KINDS = ("box", "mask", "points")


def tight_boxes(mask: Tensor, stride: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tight box of each mask.

    Args:
        mask: (..., h, w) bool.
        stride: pixels of the network's input per pixel of the mask.

    Returns:
        (..., 4) x0, y0, x1, y1 in pixels of the network's input (first and last pixel that is covered), zeros where
        the mask is empty; and (...) bool, whether there is anything.
    """
    rows, columns = mask.any(-1), mask.any(-2)

    def span(line: Tensor) -> tuple[Tensor, Tensor]:
        first = line.to(torch.uint8).argmax(-1)
        last = line.shape[-1] - 1 - line.flip(-1).to(torch.uint8).argmax(-1)
        return first, last

    (y0, y1), (x0, x1) = span(rows), span(columns)
    found = rows.any(-1)
    boxes = torch.stack([x0 * stride, y0 * stride, (x1 + 1) * stride - 1, (y1 + 1) * stride - 1], dim=-1)
    return torch.where(found[..., None], boxes.float(), torch.zeros_like(boxes, dtype=torch.float)), found


def squared_distance(mask: Tensor) -> Tensor:
    """Exact squared Euclidean distance of each pixel of a mask to the nearest pixel outside it.

    Args:
        mask: (..., h, w) bool. Everything beyond the border counts as outside.

    Returns:
        (..., h, w) float32, 0 outside the mask. Cost h * h * w a mask (separable minimum), no loop over pixels.
    """
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    h, w = padded.shape[-2:]
    # Along each row: distance to the nearest outside pixel to the left and to the right.
    index = torch.arange(w, device=mask.device).expand(padded.shape)
    left = torch.where(padded, -w, index).cummax(-1).values
    right = torch.where(padded, 2 * w, index).flip(-1).cummin(-1).values.flip(-1)
    g = torch.minimum(index - left, right - index).float().square()
    # Across rows: min over y' of g(y', x)^2 + (y - y')^2.
    rows = torch.arange(h, device=mask.device, dtype=torch.float)
    step = (rows[:, None] - rows[None, :]).square()  # (y, y')
    distance = (g.unsqueeze(-3) + step[..., None]).amin(-2)
    return distance[..., 1:-1, 1:-1] * mask


def central_points(mask: Tensor, stride: float = 1.0, count: int = 1) -> tuple[Tensor, Tensor]:
    """Points deep inside each mask: the maxima of the distance transform, each disc around a point removed in turn.

    Args:
        mask: (..., h, w) bool.
        stride: pixels of the network's input per pixel of the mask.
        count: P points a mask.

    Returns:
        (..., P, 2) x, y in pixels of the network's input, and labels (..., P): 1, or ``ABSENT`` where nothing is left.
    """
    h, w = mask.shape[-2:]
    ys = torch.arange(h, device=mask.device)[:, None]
    xs = torch.arange(w, device=mask.device)[None, :]
    distance = squared_distance(mask)
    points, labels = [], []
    for _ in range(count):
        best, index = distance.flatten(-2).max(-1)
        y, x = index // w, index % w
        points.append(torch.stack([(x + 0.5) * stride - 0.5, (y + 0.5) * stride - 0.5], dim=-1))
        labels.append(torch.where(best > 0, 1, ABSENT))
        far = (ys - y[..., None, None]).square() + (xs - x[..., None, None]).square() > best[..., None, None]
        distance = distance * far
    return torch.stack(points, dim=-2), torch.stack(labels, dim=-1)


def self_prompts(logits: Tensor, kinds: tuple[str, ...], stride: float, points: int = 1) -> Prompts:
    """The prompt that a prediction is for the next pass; gradients stop here.

    Args:
        logits: (B, N, h, w) mask logits of N objects; the mask is where they exceed 0.
        kinds: any of :data:`KINDS`.
        stride: pixels of the network's input per pixel of the logits.
        points: points an object, for the kind ``points``.

    Returns:
        :class:`Prompts`; objects with an empty mask get none.

    Raises:
        ConfigError: an unknown kind.
    """
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise ConfigError(f"Unknown self-prompts {wrong}; expected some of {', '.join(KINDS)}.")
    logits = logits.detach()
    mask = logits > 0
    parts = {}
    if "box" in kinds:
        parts["boxes"], parts["has_box"] = tight_boxes(mask, stride)
    if "mask" in kinds:
        parts["masks"], parts["has_mask"] = logits, mask.flatten(-2).any(-1)
    if "points" in kinds:
        parts["points"], parts["labels"] = central_points(mask, stride, points)
    return Prompts(**parts)
