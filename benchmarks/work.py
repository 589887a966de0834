"""Work of the encoders counted by hand, and the matrix products whose speed bounds them.

``real`` work is what the result needs: tokens of the image, in windows their real keys and one key for all padding of
a window. ``padded`` work is what the published arrangement does: every window at its full size. Norms, activations and
softmax are not counted. FLOPs are 2 x multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hspsam_monai.encoders.layers import linear
from hspsam_monai.encoders.sam_vit import Variant

_PATCH, _WINDOW, _EMBEDDING = 16, 14, 256
#: TinyViT-5M: channels, blocks, window and stride against the input of each stage (arXiv 2207.10666; MobileSAM keeps
#: the last stage at stride 16). The first stage is convolutional.
_TINY = ((64, 2, 0, 4), (128, 2, 7, 8), (160, 6, 14, 16), (320, 2, 7, 16))


def vit_flops(variant: Variant, size: int, *, padded: bool = False) -> float:
    """FLOPs of SAM's ViT on one image.

    Args:
        variant: from :data:`hspsam_monai.encoders.sam_vit.VARIANTS`.
        size: side of the image in pixels.
        padded: the published arrangement instead of the real work.
    """
    side, width = size // _PATCH, variant.width
    tokens = side * side
    inside = (-(-side // _WINDOW) * _WINDOW) ** 2 if padded else tokens  # tokens that pass a windowed block's attention
    macs = tokens * 3 * _PATCH**2 * width
    macs += tokens * width * _EMBEDDING + tokens * 9 * _EMBEDDING**2
    for index in range(variant.depth):
        macs += 8 * tokens * width**2  # MLP of expansion 4
        if index in variant.global_blocks:
            macs += 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * side * tokens * width
        else:
            macs += 4 * inside * width**2 + width * _window_pairs(side, _WINDOW, padded)
            macs += 2 * _WINDOW * inside * width  # relative position of every query along both axes
    return 2.0 * macs


def _window_pairs(side: int, window: int, padded: bool) -> int:
    """Count 2 x (query, key) pairs of all windows of a grid: once for the logits, once for the values."""
    if padded:
        return 2 * (-(-side // window)) ** 2 * window**4
    strips = [window] * (side // window) + ([side % window] if side % window else [])
    pairs = 0
    for rows in strips:
        for columns in strips:
            real = rows * columns
            pairs += real * (real + (real < window**2))
    return 2 * pairs


def tiny_flops(size: int, *, padded: bool = False) -> float:
    """FLOPs of MobileSAM's TinyViT-5M on one image of ``size`` pixels a side; see :func:`vit_flops`."""
    first = _TINY[0][0]
    macs = (size // 2) ** 2 * 27 * (first // 2) + (size // 4) ** 2 * 9 * (first // 2) * first  # stem
    for width, blocks, window, stride in _TINY:
        side = size // stride
        tokens = side * side
        if not window:  # inverted bottleneck of expansion 4
            macs += blocks * tokens * (8 * width**2 + 9 * 4 * width)
            continue
        inside = (-(-side // window) * window) ** 2 if padded else tokens
        block = 4 * inside * width**2 + width * _window_pairs(side, window, padded)
        macs += blocks * (block + tokens * (9 * width + 8 * width**2))
    for (width, _, _, stride), (wider, _, _, next_stride) in pairwise(_TINY):
        before, after = (size // stride) ** 2, (size // next_stride) ** 2
        macs += before * width * wider + after * (9 * wider + wider**2)
    last = (size // 16) ** 2
    return 2.0 * (macs + last * _TINY[-1][0] * _EMBEDDING + last * 9 * _EMBEDDING**2)


def vit_products(variant: Variant, size: int, batch: int) -> list[tuple[int, int, int]]:
    """Shapes (rows, in, out) of the linear layers of one block, on real tokens."""
    rows, d = batch * (size // _PATCH) ** 2, variant.width
    return [(rows, d, 3 * d), (rows, d, d), (rows, d, 4 * d), (rows, 4 * d, d)]


def tiny_products(size: int, batch: int) -> list[tuple[int, int, int]]:
    """Shapes (rows, in, out) of the linear layers of one block of each attention stage, on real tokens."""
    shapes = []
    for d, _, window, stride in _TINY:
        if window:
            rows = batch * (size // stride) ** 2
            shapes += [(rows, d, 3 * d), (rows, d, d), (rows, d, 4 * d), (rows, 4 * d, d)]
    return shapes


def roofline(
    shapes: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], float]:
    """Make the matrix products that an encoder's speed is measured against.

    Args:
        shapes: (rows, in, out) of each product.
        device: where to multiply.
        dtype: of both factors.

    Returns:
        A function that multiplies all of them once, with the faster library where there are two, and their FLOPs.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    factors = [(draw(rows, a), draw(b, a)) for rows, a, b in shapes]

    def run() -> Tensor:
        with torch.inference_mode():
            for x, weight in factors:
                y = linear(x, weight)
        return y

    return run, float(sum(2 * rows * a * b for rows, a, b in shapes))
