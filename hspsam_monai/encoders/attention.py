"""The mathematics of SAM's attention: decomposed relative position, padded windows, extra keys.

SAM adds to the logit of query q and key (i, j) of a grid the bias ``rel_h[q, i] + rel_w[q, j]``, where
``rel_h[q, i] = q . R_h[y_q - i]`` with the *unscaled* q. Three exact ways lead to PyTorch's fused attention:

``mask``
    add the bias as an attention mask: heads * N^2 numbers of memory, no further work.
``heads``
    the same, one head after another in one buffer of N^2 numbers, which is written and read while it is warm. No
    gradient passes.
``fold``
    write the bias as a dot product, Q' = [scale q, rel_h, rel_w], K' = [k, onehot(i), onehot(j)]: the head
    grows by H + W dimensions, and no N^2 tensor exists, forward or backward.

Nothing here is kept between calls. What depends on weights alone is kept by the encoders, which know when that is safe
(:mod:`hspsam_monai.encoders.constants`); what all blocks share lives in a ``memo`` that one forward pass owns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Tokens a side up to which the bias of all heads at once is the fastest on a CPU, with its gradient and without.
_TINY, _SMALL = 16, 28

#: Numbers of a head's bias that exist at once (64 MiB in float32, all of a grid of 64); larger grids go in parts.
_BIAS = 2**24

#: Fused kernels on GPUs want the head dimension in multiples of this.
_ALIGN = 8


def choose(device_type: str, grid: tuple[int, int], grad: bool = False) -> str:
    """Tell which of the exact ways is fastest, ``"fold"``, ``"mask"`` or ``"heads"``.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        grid: (h, w) tokens that attend to each other, a window or the whole image.
        grad: a gradient of the bias will be asked for.

    Measured with ViT-B's 12 heads, fp32, 2 CPU threads, torch 2.13, one global attention, medians in ms of mask, fold
    and heads: grid 16: 2.4, 3.6, 4.9; grid 28: 20, 29, 29; grid 32: 50, 48, 33; grid 64: 832, 1131, 515 (without any
    bias 398). PyTorch's CPU kernel takes no mask that needs a gradient and falls back to N^2 matrices kept for the
    backward pass, hence ``grad``; with gradients elsewhere the mask of a grid of 48 to 64 is faster than the fold,
    above it alone takes gigabytes. A loop over heads would fill an exported graph, so what is traced or compiled has
    none. Other devices fold by reasoning, not yet by measurement: flash kernels take no mask.
    """
    if device_type != "cpu":
        return "fold"
    longest = max(grid)
    if longest <= _TINY or (longest <= _SMALL and not grad):
        return "mask"
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return "heads"
    return "mask" if 48 <= longest <= 64 and not grad else "fold"


def relative_table(rel_pos: Tensor, size: int) -> Tensor:
    """Lay out relative position embeddings for all pairs of query and key along one axis.

    Args:
        rel_pos: (L, d) embeddings of the distances -(L-1)/2 ... (L-1)/2.
        size: tokens along the axis; if L is not 2 size - 1, ``rel_pos`` is resampled linearly, as SAM does.

    Returns:
        (size, d, size), axes: query position, channel, key position.
    """
    if rel_pos.shape[0] != 2 * size - 1:
        rel_pos = resample_rel_pos(rel_pos, size)
    # Entry (y, i) is row y - i + size - 1: windows of ``size`` rows read backwards, so no index tensor is
    # needed.
    return rel_pos.unfold(0, size, 1).flip(-1)


def resample_rel_pos(rel_pos: Tensor, size: int) -> Tensor:
    """Resample relative position embeddings (L, d) linearly to (2 size - 1, d), in float32."""
    resized = F.interpolate(rel_pos.float().t()[None], size=2 * size - 1, mode="linear")
    return resized[0].t().to(rel_pos.dtype)


def resample_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample absolute position embeddings (1, H, W, D) to (1, h, w, D), bicubic, in float32."""
    resized = F.interpolate(pos_embed.float().permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(pos_embed.dtype)


def relative_logits(q: Tensor, table_h: Tensor, table_w: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products of every query with the embeddings of its distance to every key row and column.

    Args:
        q: (N, heads, h, w, d), unscaled.
        table_h: (h, d, key rows), see :func:`relative_table`.
        table_w: (w, d, key columns).

    Returns:
        ``rel_h`` (N, heads, h, w, key rows) and ``rel_w`` (N, heads, h, w, key columns).
    """
    rel_h = torch.einsum("nayxc,yci->nayxi", q, table_h)
    rel_w = torch.einsum("nayxc,xcj->nayxj", q, table_w)
    return rel_h, rel_w


def padding_logit(rel_h: Tensor, rel_w: Tensor, h: int, w: int) -> Tensor:
    """Gather all padded keys of a window into the bias of one key. Exact, not an approximation.

    Padding has equal k and v everywhere, so its part of the softmax is exp(q.k) * sum exp(rel_h[i] +
    rel_w[j]) over the L-shaped padded set: rows i >= h with all columns, and rows i < h with columns j >= w.
    Both parts are products of sums of positive terms; nothing is subtracted, so nothing cancels.

    Args:
        rel_h: (..., window) over real and padded key rows.
        rel_w: (..., window) over real and padded key columns.
        h: real rows of the window.
        w: real columns; h or w is smaller than the window.

    Returns:
        (..., 1), the logarithm of that sum.
    """
    rel_h, rel_w = rel_h.float(), rel_w.float()
    parts = []
    if h < rel_h.shape[-1]:
        parts.append(rel_h[..., h:].logsumexp(-1, keepdim=True) + rel_w.logsumexp(-1, keepdim=True))
    if w < rel_w.shape[-1]:
        parts.append(rel_h[..., :h].logsumexp(-1, keepdim=True) + rel_w[..., w:].logsumexp(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.logaddexp(*parts)


class Extra(NamedTuple):
    """Keys (and perhaps queries) outside the grid: learned prompts, or the padding of a window.

    ``k`` and ``v`` (N, heads, E, d); ``logit`` (N, heads, h, w, 1) added to every extra key's logit
    (``None``: 0); ``q`` (N, heads, E, d) queries that attend to all keys without bias (``None``: no extra
    queries).
    """

    k: Tensor
    v: Tensor
    logit: Tensor | None = None
    q: Tensor | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra: Extra | None = None,
    way: str = "fold",
    memo: dict | None = None,
) -> Tensor:
    """Attention over a grid of tokens with decomposed relative position, and over extra keys beside it.

    Args:
        q: (N, heads, h, w, d).
        k: like q.
        v: like q.
        rel_h: (N, heads, h, w, h), see :func:`relative_logits`.
        rel_w: (N, heads, h, w, w).
        extra: keys and queries outside the grid.
        way: ``"fold"``, ``"mask"`` or ``"heads"``, see :func:`choose`.
        memo: constants shared by the calls of one forward pass; filled here.

    Returns:
        (N, heads, h * w, d), followed along axis 2 by the extra queries' rows if there are any.
    """
    if way == "mask":
        return _attend_masked(q, k, v, rel_h, rel_w, extra)
    if way == "heads":
        return _attend_by_heads(q, k, v, rel_h, rel_w, extra)
    return _attend_folded(q, k, v, rel_h, rel_w, extra, {} if memo is None else memo)


def _attend_folded(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, extra: Extra | None, memo: dict
) -> Tensor:
    n, heads, h, w, d = q.shape
    parts = [q * d**-0.5, rel_h.to(q.dtype), rel_w.to(q.dtype)]
    if extra is not None and extra.logit is not None:
        parts.append(extra.logit.to(q.dtype))
    used = sum(part.shape[-1] for part in parts)
    added = -(-used // _ALIGN) * _ALIGN - d
    if d + added > used:
        parts.append(q.new_zeros(()).expand(n, heads, h, w, d + added - used))
    queries = torch.cat(parts, -1).flatten(2, 3)
    keys, values, outside = k.flatten(2, 3), v.flatten(2, 3), 0
    if extra is not None:
        keys, values = torch.cat([keys, extra.k], 2), torch.cat([values, extra.v], 2)
        outside = extra.k.shape[2]
        if extra.q is not None:
            queries = torch.cat([queries, F.pad(extra.q * d**-0.5, (0, added))], 2)
    name = (h, w, added, outside, q.dtype)
    if name not in memo:
        memo[name] = _one_hot(h, w, added, outside, q)
    keys = torch.cat([keys, memo[name].expand(n, heads, -1, -1)], -1)
    return F.scaled_dot_product_attention(queries, keys, F.pad(values, (0, added)), scale=1.0)[..., :d]


def _one_hot(h: int, w: int, width: int, outside: int, like: Tensor) -> Tensor:
    """Make the columns that keys gain, (h * w + outside, width): [onehot(i), onehot(j), 0 ...].

    Rows of keys outside the grid hold 1 in column h + w, where queries carry the logit of those keys (or
    zero).
    """
    rows = like.new_zeros(h * w + outside, width)
    grid = rows[: h * w].view(h, w, width)
    grid[..., :h] = torch.eye(h, dtype=like.dtype, device=like.device)[:, None]
    grid[..., h : h + w] = torch.eye(w, dtype=like.dtype, device=like.device)
    rows[h * w :, h + w : h + w + 1] = 1
    return rows


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, extra: Extra | None) -> Tensor:
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(4, 5).flatten(2, 3).to(q.dtype)
    queries, keys, values = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
    if extra is not None:
        keys, values = torch.cat([keys, extra.k], 2), torch.cat([values, extra.v], 2)
        count = extra.k.shape[2]
        if extra.logit is None:
            bias = F.pad(bias, (0, count))
        else:
            bias = torch.cat([bias, extra.logit.flatten(2, 3).to(q.dtype).expand(-1, -1, -1, count)], -1)
        if extra.q is not None:
            queries = torch.cat([queries, extra.q], 2)
            bias = F.pad(bias, (0, 0, 0, extra.q.shape[2]))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)


@torch.no_grad()
def _attend_by_heads(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, extra: Extra | None) -> Tensor:
    n, heads, h, w, d = q.shape
    queries, keys, values, logit = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), None
    rel_h, rel_w = rel_h.flatten(2, 3), rel_w.flatten(2, 3)
    if extra is not None:
        keys, values = torch.cat([keys, extra.k], 2), torch.cat([values, extra.v], 2)
        logit = None if extra.logit is None else extra.logit.flatten(2, 3)
    tokens, others = h * w, keys.shape[2]
    step = max(1, min(tokens, _BIAS // others))
    bias = q.new_zeros(step, others)  # columns of extra keys without a logit stay zero
    count = 0 if extra is None or extra.q is None else extra.q.shape[2]
    out = q.new_empty(n, heads, tokens + count, d)
    for image in range(n):
        for head in range(heads):
            one = (slice(image, image + 1), slice(head, head + 1))  # the fused kernel wants four axes
            for start in range(0, tokens, step):
                part = slice(start, min(start + step, tokens))
                used = bias[: part.stop - start]
                torch.add(
                    rel_h[image, head, part, :, None],
                    rel_w[image, head, part, None, :],
                    out=used[:, :tokens].unflatten(1, (h, w)),
                )
                if logit is not None:
                    used[:, tokens:] = logit[image, head, part]
                out[(*one, part)] = F.scaled_dot_product_attention(
                    queries[(*one, part)], keys[one], values[one], attn_mask=used
                )
    if count:
        out[:, :, tokens:] = F.scaled_dot_product_attention(extra.q, keys, values)
    return out
