"""A person's corrections, simulated from the truth, so that a network learns to follow marks while it is trained.

A network that only ever sees prompts made of its own masks learns that they tell it nothing new, and later ignores a
person's. As in SAM's own training (arXiv 2304.02643, appendix A) a simulated person clicks where mask and truth differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hspsam_monai.networks.sam_decoder import ABSENT, Prompts
from hspsam_monai.networks.self_prompts import squared_distance, tight_boxes

#: Share of the objects whose first mark is a box around the truth; the others get a click.
BOX_SHARE = 0.25
#: Shares of the objects whose mask, before a person corrects it, is taken for missing or for another image's: rare on
#: images that are trained on, frequent in use, where a click must count for more than the mask.
MISSED_SHARE, ELSEWHERE_SHARE = 0.25, 0.15
#: Logit of a mask in which nothing is found.
_NOTHING = -10.0
#: A person's box is off by up to this share of the object's side at each of its sides.
BOX_ERROR = 0.1


def objects_of(label: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Each object's own mask, at the size of a decoder's masks.

    Args:
        label: class indices (B, 1, H, W), background 0.
        count: N = K - 1 objects.
        size: (h, w).

    Returns:
        (B, N, h, w) bool.
    """
    small = F.interpolate(label.float(), size, mode="nearest-exact")
    return small == torch.arange(1, count + 1, device=label.device)[:, None, None]


def with_mistakes(masks: Tensor) -> Tensor:
    """What the person sees first: the automatic masks, some missing and some in another place.

    Args:
        masks: (B, N, h, w) logits.

    Returns:
        The same, :data:`MISSED_SHARE` of the objects without any mask, :data:`ELSEWHERE_SHARE` with that of the next
        image's object. No gradient.
    """
    masks = masks.detach()
    draw = torch.rand(*masks.shape[:2], 1, 1, device=masks.device)
    seen = torch.where(draw < MISSED_SHARE + ELSEWHERE_SHARE, masks.roll(1, 0), masks)
    return torch.where(draw < MISSED_SHARE, _NOTHING, seen)


def one_more_mark(given: Prompts | None, masks: Tensor, truth: Tensor, stride: float) -> Prompts:
    """What a person who sees the masks adds to the marks so far.

    The first mark is a box around the object for some (:data:`BOX_SHARE`), for the others, and from then on for all, a
    click where mask and truth differ, the likelier the farther inside the difference. Right masks get no mark.

    Args:
        given: the marks so far; ``None`` at first.
        masks: (B, N, h, w) logits of what the person sees; an object's mask is where they exceed 0.
        truth: (B, N, h, w) bool.
        stride: pixels of the network's input per pixel of the masks.

    Returns:
        :class:`Prompts` for (B, N), with one more slot of points than were given.
    """
    wrong = (masks > 0) != truth
    point, label = _click(wrong, truth, stride)
    if given is None:
        boxes, has_box = tight_boxes(truth, stride)
        side = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        boxes = boxes + (torch.rand_like(boxes) * 2 - 1) * BOX_ERROR * side
        has_box = has_box & (torch.rand(has_box.shape, device=has_box.device) < BOX_SHARE) & wrong.flatten(2).any(-1)
        label = torch.where(has_box[..., None], ABSENT, label)
        return Prompts(points=point, labels=label, boxes=boxes, has_box=has_box)
    return given._replace(
        points=torch.cat([given.points, point], dim=2), labels=torch.cat([given.labels, label], dim=2)
    )


def _click(wrong: Tensor, truth: Tensor, stride: float) -> tuple[Tensor, Tensor]:
    """One point (B, N, 1, 2) inside each region ``wrong`` and its label (B, N, 1), absent where there is none."""
    width = wrong.shape[-1]
    weight = squared_distance(wrong).flatten(2)
    found = weight.sum(-1, keepdim=True) > 0
    # A draw needs some weight; where nothing is wrong it is thrown away.
    index = torch.multinomial(torch.where(found, weight, 1.0).flatten(0, 1), 1).view(found.shape)
    point = torch.stack([index % width, index // width], dim=-1)
    label = torch.where(found, truth.flatten(2).gather(-1, index).long(), ABSENT)
    return (point + 0.5) * stride - 0.5, label
