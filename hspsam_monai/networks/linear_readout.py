"""What the supports say of each cell by a linear rule, solved in closed form from all levels of the frozen encoder.

Ours, not the paper's (arXiv 2502.03501). The selective map asks which support cells a target cell resembles as a whole,
and most of what makes cells alike has nothing to do with the object. A ridge regression of the supports' masks on their
features finds the directions that tell object from background. It is solved once for each context (products and linear
equations, no iterations), costs a target one dot product a cell, and gains from every further support.

    x = unit cells of every level but the first, and of the embedding, side by side at the finest grid
    w = argmin sum_cells c (w x + b - share)^2 + lambda sum_d var_d w_d^2,     lambda = 1 / K
    logit = GAIN (w x + b - 1/2 - threshold)

The weights c of object and background cells sum to :data:`_OBJECT` and the rest, however small the object is. That
makes masks too large or too small by task, so the threshold is the one at which supports that are left out of the
regression (the first sixteen given, each in turn) have their best mean Dice. Few supports say little of that, so it
is drawn towards what was best on other tasks, as if so many more supports had said that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hspsam_monai.encoders import Encoder, Features
from hspsam_monai.encoders.constants import is_fake
from hspsam_monai.networks.layers import resize
from hspsam_monai.networks.sam_decoder import WIDTH

#: Logits a unit of share.
GAIN = 8.0

_OBJECT = 0.3  # share of the regression's weight on cells of the object
_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(-8, 9))
#: Threshold of one support alone; of K the prior is this over the root of K. On eleven tasks of photographs, CT and MR
#: -0.2 was best with one support (of 0, -0.1, -0.2), -0.15 with two and -0.1 with four (of -0.2 to -0.05); with
#: sixteen, the nearer to 0 the better.
_ALONE = -0.2
#: Supports that this prior counts as. Dice of the readout alone on those tasks, without and with the prior: 0.578 and
#: 0.595 with four supports, 0.702 and 0.699 with sixteen.
_PRIOR = 4
_CALIBRATORS = 16  # supports that are left out in turn
_LOOK = 8  # cells a side by which images are told from their copies
_COPY = 1e-3  # relative distance below which two images are one; a copy's own is rounding, some 1e-6
_ROUNDING = 1e-3  # cells of an object; what is left of it after subtracting all that show it
_CONSTANT = 1e-6  # penalty of the constant, whose own weight is 1: next to free, and above rounding
_LEAST_VARIANCE = 1e-5  # of a feature; nearly all of MobileSAM's unit cells have 4e-4 to 2e-2


class _Support(NamedTuple):
    """One support, kept to be left out: cells x (h w, D + 1), share (N, h w), masks (N, H, W), the grid."""

    cells: Tensor
    shares: Tensor
    masks: Tensor
    grid: tuple[int, int]


class _Sums(NamedTuple):
    """Sums over cells for N objects, with x of D features and a one: all that the regression needs.

    ``all`` (D + 1, D + 1) of x x^T and ``shown`` (N, D + 1, D + 1) of share x x^T; ``object`` and ``rest`` (N, D + 1)
    of share^2 x and share (1 - share) x; ``count`` of cells and ``share`` (N,). float64.
    """

    all: Tensor
    shown: Tensor
    object: Tensor
    rest: Tensor
    count: Tensor
    share: Tensor

    @classmethod
    def of(cls, support: _Support) -> _Sums:
        """Of one support."""
        cells, shares = support.cells, support.shares
        shown = [(cells * share[:, None]).T @ cells for share in shares]
        sums = (cells.T @ cells, torch.stack(shown), shares.square() @ cells, (shares * (1 - shares)) @ cells)
        parts = (*sums, shares.new_tensor(len(cells)), shares.sum(1))
        # Apple's GPUs have no float64.
        return cls(*((part.cpu() if part.device.type == "mps" else part).double() for part in parts))

    def plus(self, other: _Sums) -> _Sums:
        """The sums of both."""
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: _Sums) -> _Sums:
        """The sums without ``other``'s."""
        return _Sums(*(a - b for a, b in zip(self, other, strict=True)))

    def solve(self, index: int, penalty: Tensor) -> Tensor:
        """The rule (D + 1,) of object ``index``; it says 0 where no cell shows the object."""
        p = _OBJECT / self.share[index].clamp_min(1e-6)
        # All cells without the object's are a difference of rounded sums: less than a cell of them is none.
        q = (1 - _OBJECT) / (self.count - self.share[index]).clamp_min(1)
        products = q * self.all + (p - q) * self.shown[index] + torch.diag(penalty)
        wanted = p * self.object[index] + q * self.rest[index]
        return torch.linalg.solve(products, wanted)  # not by Cholesky, which stops where rounding has the last word


class ReadoutFit:
    """Take supports one by one, then solve for the rules of N objects.

    Memory: 8 (N + 1) (D + 1)^2 bytes however many supports there are (while it solves, three times that), and cells and
    masks of the first sixteen, which alone are left out in turn.
    """

    def __init__(self) -> None:
        self._total: _Sums | None = None
        self._origin: Tensor | None = None  # of the cells: sums of squares about 0 would lose what little they vary
        self._kept: list[_Support] = []
        self._looks: list[Tensor] = []
        self._images: list[int] = []  # of each support, which image it shows: the first support that shows it

    @torch.no_grad()
    def add(self, levels: Sequence[Tensor], masks: Tensor) -> None:
        """Take one support.

        Args:
            levels: maps of :func:`readout_levels`, each (1, C, h, w).
            masks: (N, H, W) in {0, 1}, one an object, of any size.
        """
        with torch.autocast(masks.device.type, enabled=False):
            maps = [_unit(level) for level in levels]
            grid = tuple(maps[0].shape[-2:])
            cells = torch.cat([resize(x, grid)[0].flatten(1) for x in maps]).T
            self._origin = cells.mean(0) if self._origin is None else self._origin
            cells = torch.cat([cells - self._origin, cells.new_ones(len(cells), 1)], dim=1)
            shares = F.adaptive_avg_pool2d(masks[None].float(), grid)[0].flatten(1)
            support = _Support(cells, shares, masks, grid)
            sums = _Sums.of(support)
            look = F.adaptive_avg_pool2d(maps[-1], _LOOK).flatten()
        self._total = sums if self._total is None else self._total.plus(sums)
        if len(self._kept) < _CALIBRATORS:
            self._kept.append(support)
        known = [] if is_fake(look) else self._looks
        alike = (i for i, other in enumerate(known) if (look - other).norm() <= _COPY * other.norm())
        self._images.append(next(alike, len(self._looks)))
        self._looks.append(look)

    @torch.no_grad()
    def solve(self) -> Tensor:
        """Rules (N, D + 1) that give logits, float32, for :func:`read_out`."""
        total, origin = self._total, self._origin
        with torch.autocast(origin.device.type, enabled=False):
            mean = total.all[-1] / total.count
            variance = (total.all.diagonal() / total.count - mean.square()).clamp_min(_LEAST_VARIANCE)
            penalty = variance / len(set(self._images))
            penalty[-1] = _CONSTANT
            rules = [total.solve(index, penalty) for index in range(len(total.share))]
            rules = torch.stack(rules).float().to(origin.device)
            rules[:, -1] -= 0.5 + self._thresholds(penalty) + rules[:, :-1] @ origin
        return GAIN * rules

    def _thresholds(self, penalty: Tensor) -> Tensor:
        """Where supports that are left out have their best mean Dice, drawn towards the prior, (N,).

        Copies of an image are left out together: a rule that has seen one of them knows too well what another shows.
        """
        count = len(self._total.share)
        levels = self._origin.new_tensor(_THRESHOLDS)
        dice = levels.new_zeros(count, len(levels))  # sums over supports that are left out
        supports = levels.new_zeros(count)  # how many of them show the object, as others do
        for image in sorted(set(self._images)):
            members = [i for i, shown in enumerate(self._images) if shown == image]
            if members[-1] >= len(self._kept):
                continue  # a copy of it is among those that cannot be left out
            others = self._total
            for member in members:
                others = others.minus(_Sums.of(self._kept[member]))
            support = self._kept[image]
            for index in range(count):
                says = (support.shares[index].any() & (others.share[index] > _ROUNDING).to(levels.device)).float()
                rule = others.solve(index, penalty).float().to(support.cells.device)
                said = (support.cells @ rule - 0.5).unflatten(0, support.grid)
                truth = support.masks[index].float()
                said = resize(said[None, None], tuple(truth.shape)).flatten()
                masks, truth = (said > levels[:, None]).float(), truth.flatten()
                dice[index] += says * 2 * (masks @ truth) / (masks.sum(1) + truth.sum()).clamp_min(1)
                supports[index] += says
        prior = _ALONE / supports.clamp_min(1).sqrt()
        return (supports * levels[dice.argmax(1)] + _PRIOR * prior) / (supports + _PRIOR)


def readout_levels(encoder: Encoder, features: Features) -> list[Tensor]:
    """Maps that the rules read: every level but the first, which tells edges and colours, and SAM's embedding."""
    return [*features.levels[1:], encoder.embedding_of(features)]


def readout_width(encoder: Encoder) -> int:
    """D + 1, the numbers of one object's rule."""
    return sum(level.channels for level in encoder.levels[1:]) + WIDTH + 1


def read_out(levels: Sequence[Tensor], rules: Tensor) -> Tensor:
    """Apply rules to targets.

    Every level is read at its own resolution, since a linear rule and bilinear resizing may be exchanged.

    Args:
        levels: maps of :func:`readout_levels`, each (B, C, h, w).
        rules: (B | 1, N, D + 1) of :meth:`ReadoutFit.solve`.

    Returns:
        Logits (B, N, h, w) at the grid of the first, finest map, float32.
    """
    with torch.autocast(rules.device.type, enabled=False):
        parts = rules[..., :-1].split([level.shape[1] for level in levels], dim=-1)
        grid = tuple(levels[0].shape[-2:])
        said = rules[..., -1][..., None, None]
        for level, part in zip(levels, parts, strict=True):
            x = _unit(level)
            said = said + resize((part @ x.flatten(2)).unflatten(2, tuple(x.shape[-2:])), grid)
    return said


def _unit(level: Tensor) -> Tensor:
    """(B, C, h, w) with cells of length 1, float32."""
    return F.normalize(level.float(), dim=1)
