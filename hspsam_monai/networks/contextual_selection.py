"""CSM, the contextual selective module of Proxy Prompt: what the supports say of each cell of a target.

    masks + images, F_sup -> Vision Mamba -> bridge -> values that know the mask
    F_x, F_sup -> selective map (top k) -> E_ctx, the values of the support cells that speak for each target cell

Where the paper (arXiv 2502.03501) is silent the choices are ours (P: drawn in its figure): bidirectional scan over
row-major tokens; bridge 1x1 conv, LN, GELU, 3x3 conv; the map (P) is a softmax over the top k support cells of
-|k_s - k_x|^2 / sqrt(C) on features scaled to length sqrt(C), times one learned sharpness, since frozen features of
other lengths make it flat or hard.

Beside the learned values every support cell says how much of it the object covers. That one number needs no training,
so what the map reads of it points at the object from the first step on, and on tasks that no training has seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders.layers import linear
from hspsam_monai.networks.layers import LayerNorm2d, to_cells, to_map
from hspsam_monai.networks.sam_decoder import WIDTH
from hspsam_monai.networks.selective_scan import VisionMambaBlock

#: Of the map before training. At 1, the metric as published, a small object's few cells are drowned by their
#: neighbours: without any training the share finds 0.29 (Dice) of a spleen, at 3 to 6 0.50 to 0.51 (MobileSAM, 384
#: pixels, four supports, 12 validation images).
SHARPNESS = 4.0

_CHUNK = 4096  # cells compared at a time


class Context(NamedTuple):
    """What the supports say, for each of B images (or 1 for all): M = K h w cells.

    ``keys`` (B | 1, M, C) unit vectors; ``values`` (B | 1, M, N (C + 1)) for N objects: C learned numbers, then the
    share of the cell that the object covers, in [0, 1]; ``rules`` (B | 1, N, D + 1) of
    :mod:`~hspsam_monai.networks.linear_readout`, or ``None`` in a network without.
    """

    keys: Tensor
    values: Tensor
    rules: Tensor | None = None


def unit_cells(features: Tensor) -> Tensor:
    """Features (B, C, h, w) -> cells (B, h w, C) of length 1, float32."""
    return F.normalize(to_cells(features.float()), dim=-1)


def selective_map(
    queries: Tensor,
    keys: Tensor,
    top_k: int,
    sharpness: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """CSM's selective map: which support cells speak for each target cell, and how loudly.

    Softmax over the ``top_k`` nearest cells of -sharpness |k_s - k_x|^2 / sqrt(C) with features of length sqrt(C),
    which is 2 sqrt(C) (cos - 1).

    Args:
        queries: (B, Q, C) unit cells of the targets.
        keys: (B | 1, M, C) unit cells of the supports; no gradient reaches either (the encoder is frozen).
        top_k: k cells kept; all where M is smaller.
        sharpness: learned factor.

    Returns:
        Weights (B, Q, k) that sum to 1 and indices (B, Q, k) into M.

    Cost: O(B Q M C).
    """
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        queries, keys = queries.detach(), keys.detach()
        cosine = linear(queries, keys[0]) if len(keys) == 1 else queries @ keys.transpose(1, 2)
        best, index = cosine.topk(min(top_k, keys.shape[1]), dim=-1)
    return (sharpness * 2 * math.sqrt(queries.shape[-1]) * (best - 1)).softmax(-1), index


def choose_cells(keys: Tensor, shares: Tensor, count: int) -> Tensor:
    """Which of many support cells to keep, so that a target costs the same however many supports there are.

    Half of them at most show an object, spread evenly over the objects, so that a small one keeps all its cells. Of
    the background, the cells most like an object come first, for they decide where it ends; a third of what is left is
    drawn evenly, for what looks like nothing near an object. Drawn evenly altogether, a small object would lose what
    few cells it has.

    Args:
        keys: (M, C) unit vectors.
        shares: (M, N), how much of each cell each object covers, in [0, 1].
        count: cells to keep.

    Returns:
        Indices into M, ascending; all M where there are no more than ``count``. The same call gives the same cells.
    """
    total, objects = shares.shape
    if total <= count:
        return torch.arange(total, device=keys.device)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).to(keys.device)
    turn = torch.full((total,), total, device=keys.device)  # objects take turns: which turn reaches a cell
    for index in range(objects):
        own = order[shares[order, index] > 0]
        turn[own] = turn[own].minimum(torch.arange(len(own), device=keys.device))
    shown, background = order[turn[order] < total], order[turn[order] == total]
    kept = shown[turn[shown].argsort(stable=True)][: max(count // 2, count - len(background))]
    rest = count - len(kept)
    if not len(kept) or rest >= len(background):
        return torch.cat([kept, background[:rest]]).sort().values
    alike = torch.cat([(keys[part] @ keys[kept].T).amax(1) for part in background.split(_CHUNK)])
    ranked = background[alike.argsort(descending=True, stable=True)]
    near = ranked[: rest - rest // 3]
    even = background[~torch.isin(background, near)][: rest // 3]
    return torch.cat([kept, near, even]).sort().values


def read_values(values: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """E_ctx: the weighted sum of the chosen cells' values, without building the map or the gathered values.

    Args:
        values: (B | 1, M, V).
        weights: (B, Q, k) float32.
        index: (B, Q, k) into M.

    Returns:
        (B, Q, V) float32.
    """
    batch, queries, _ = index.shape
    if len(values) > 1:
        index = index + torch.arange(batch, device=index.device)[:, None, None] * values.shape[1]
    bags = F.embedding_bag(
        index.flatten(0, 1), values.float().flatten(0, 1), per_sample_weights=weights.flatten(0, 1), mode="sum"
    )
    return bags.unflatten(0, (batch, queries))


class ContextualSelectiveModule(nn.Module):
    """CSM: supports -> values that know the mask -> what they say of each target cell.

    Args:
        width: C of the encoder's embedding.
        value_width: C^v of the Vision Mamba encoder.
        stride: pixels per cell of the embedding, which is the patch of the Vision Mamba encoder.
        depth: Vision Mamba blocks.
        state: size of their state.
        top_k: support cells kept for each target cell.
    """

    def __init__(
        self,
        width: int = WIDTH,
        value_width: int = 192,
        stride: int = 16,
        depth: int = 2,
        state: int = 8,
        top_k: int = 32,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.patch = nn.Conv2d(4, value_width, stride, stride)
        self.blocks = nn.Sequential(*(VisionMambaBlock(value_width, state) for _ in range(depth)))
        self.norm = nn.LayerNorm(value_width)
        hidden = width // 2
        self.bridge = nn.Sequential(
            nn.Conv2d(value_width + width, hidden, 1),
            LayerNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, width, 3, padding=1),
        )
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS)))

    def encode(self, images: Tensor, masks: Tensor) -> Tensor:
        """CSM 1, images (S, 3, H, W) in [0, 1] and masks of one object each (S, H, W) in {0, 1} -> V (S, C^v, h, w)."""
        given = torch.cat([images, masks[:, None].to(images.dtype)], dim=1) * 2 - 1
        x = self.patch(given.to(self.patch.weight.dtype))
        return to_map(self.norm(self.blocks(to_cells(x))), tuple(x.shape[-2:]))

    def aggregate(self, images: Tensor, masks: Tensor, features: Tensor) -> Tensor:
        """CSM 1 and 2: the values of S supports for N objects.

        Args:
            images: (S, 3, H, W) in [0, 1].
            masks: (S, N, H, W) in {0, 1}, one an object.
            features: (S, C, h, w) frozen.

        Returns:
            (S, N, C + 1, h, w): A_agg, and last the share of each cell that the object covers.
        """
        supports, objects = masks.shape[:2]
        repeated = images[:, None].expand(-1, objects, -1, -1, -1).flatten(0, 1)
        v = self.encode(repeated, masks.flatten(0, 1))
        features = features[:, None].expand(-1, objects, -1, -1, -1).flatten(0, 1)
        a_agg = self.bridge(torch.cat([v, features.to(v.dtype)], dim=1)).unflatten(0, (supports, objects))
        share = F.adaptive_avg_pool2d(masks.to(a_agg.dtype), tuple(v.shape[-2:]))
        return torch.cat([a_agg, share[:, :, None]], dim=2)

    def forward(self, features: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """CSM 3, target features (B, C, h, w) -> E_ctx (B, N, C, h, w) and share (B, N, 1, h, w), both float32.

        The share in [0, 1] is the object's in the support cells that speak for a target cell.
        """
        weights, index = selective_map(unit_cells(features), context.keys, self.top_k, self.log_sharpness.float().exp())
        read = read_values(context.values, weights, index)  # (B, h w, N (C + 1))
        width, grid = features.shape[1], tuple(features.shape[-2:])
        read = read.unflatten(2, (-1, width + 1)).permute(0, 2, 3, 1).unflatten(3, grid)
        return read[:, :, :width], read[:, :, width:]
