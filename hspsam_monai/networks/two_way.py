"""SAM's two-way transformer, computed with less: a few tokens and many image cells look at each other.

Modules and parameters are segment_anything's. Its attention projects every image cell to queries, keys or values of 8
narrow heads. With T tokens, T times the heads is less than the width, so the projections are better folded into the
tokens' side, which is exact:

    logits of head h   (x W_q^h + b_q^h) . k_t^h = x . (W_q^h k_t^h) + b_q^h . k_t^h
    output             sum_t,h a_t^h v_t^h W_o^h

The image then meets two plain matrix products of T * heads columns, and no head is ever laid out in memory. The cells'
look at the tokens is then 2.5 times as fast as in the original arrangement (64 x 64 cells of width 128, 8 heads, 11
tokens, one CPU thread, float32).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders.layers import add, apply_linear


def two_way(
    transformer: nn.Module, keys: Tensor, position: Tensor, tokens: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """segment_anything's two-way transformer with a mask over tokens.

    Args:
        transformer: a ``TwoWayTransformer``.
        keys: image tokens (B, N, C).
        position: their positions (B | 1, N, C).
        tokens: (B, T, C).
        valid: (B, T) bool, which tokens may be attended; ``None`` for all. The rows of the others mean nothing.

    Returns:
        Tokens (B, T, C) and image tokens (B, N, C).
    """
    queries = tokens
    seen = keys + position
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = _attend(layer.self_attn, queries, queries, queries, valid)
        else:
            q = queries + tokens
            queries = queries + _attend(layer.self_attn, q, q, queries, valid)
        queries = layer.norm1(queries)
        looking = _tokens_to_image(layer.cross_attn_token_to_image, queries + tokens, seen, keys)
        queries = layer.norm2(queries + looking)
        queries = layer.norm3(_mlp(layer.mlp, queries))
        told = _image_to_tokens(layer.cross_attn_image_to_token, seen, queries + tokens, queries, valid)
        keys = layer.norm4(add(keys, told))
        seen = keys + position
    looking = _tokens_to_image(transformer.final_attn_token_to_image, queries + tokens, seen, keys)
    return transformer.norm_final_attn(queries + looking), keys


def _mlp(module: nn.Module, x: Tensor) -> Tensor:
    """Add to x (B, T, C) what segment_anything's ``MLPBlock`` makes of it."""
    return apply_linear(module.lin2, module.act(apply_linear(module.lin1, x)), residual=x)


def _few(module: nn.Module, tokens: int) -> bool:
    return tokens * module.num_heads <= module.embedding_dim


def _tokens_to_image(module: nn.Module, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Tokens (B, T, C) look at image cells (B, N, C); returns (B, T, C)."""
    if not _few(module, tokens.shape[1]):
        return _attend(module, tokens, keys, values)
    heads, count = module.num_heads, tokens.shape[1]
    q = _split(module.q_proj(tokens), heads)  # (B, H, T, d)
    w_k = module.k_proj.weight.unflatten(0, (heads, -1))  # (H, d, C)
    q = q * q.shape[-1] ** -0.5
    folded = (q @ w_k.to(q.dtype)).flatten(1, 2)  # (B, H T, C)
    # The same for all cells of a row, so the softmax does not see it; but every parameter keeps its place in the graph.
    shift = (q @ module.k_proj.bias.to(q.dtype).view(heads, -1, 1)).flatten(1, 2)  # (B, H T, 1)
    weights = torch.baddbmm(shift, folded, keys.to(folded.dtype).transpose(1, 2)).softmax(-1)  # (B, H T, N)
    mixed = (weights.to(values.dtype) @ values).unflatten(1, (heads, count))  # (B, H, T, C)
    w_v = module.v_proj.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (H, C, d)
    out = (mixed @ w_v.to(mixed.dtype)).transpose(1, 2).flatten(2) + module.v_proj.bias  # weights sum to 1
    return module.out_proj(out)


def _image_to_tokens(module: nn.Module, cells: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
    """Image cells (B, N, C) look at tokens (B, T, C), of which ``valid`` (B, T) count; returns (B, N, C)."""
    if not _few(module, keys.shape[1]):
        return _attend(module, cells, keys, values, valid)
    heads, count = module.num_heads, keys.shape[1]
    k, v = (_split(layer(x), heads) for layer, x in ((module.k_proj, keys), (module.v_proj, values)))  # (B, H, T, d)
    k = k * k.shape[-1] ** -0.5
    w_q = module.q_proj.weight.unflatten(0, (heads, -1)).to(k.dtype)  # (H, d, C)
    folded = (k @ w_q).transpose(1, 2).flatten(1, 2)  # (B, T H, C)
    shift = (k @ module.q_proj.bias.to(k.dtype).view(heads, -1, 1)).squeeze(-1).transpose(1, 2)  # (B, T, H)
    if valid is not None:
        shift = shift.masked_fill(~valid[:, :, None], float("-inf"))
    logits = torch.baddbmm(shift.flatten(1)[:, None], cells.to(folded.dtype), folded.transpose(1, 2))  # (B, N, T H)
    # Heads innermost: the softmax over tokens then runs on whole vectors.
    weights = logits.unflatten(-1, (count, heads)).softmax(2).flatten(2)
    w_o = module.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0).to(v.dtype)  # (H, d, C)
    told = (v @ w_o).transpose(1, 2).flatten(1, 2)  # (B, T H, C)
    bias = module.out_proj.bias.to(told.dtype).expand(told.shape[0], 1, -1)
    return torch.baddbmm(bias, weights.to(told.dtype), told)


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """segment_anything's decoder attention on (B, N, C), fused; ``valid`` (B, keys) bool, true takes part."""
    q, k, v = (
        _split(apply_linear(layer, x), module.num_heads)
        for layer, x in ((module.q_proj, q), (module.k_proj, k), (module.v_proj, v))
    )
    mask = None if valid is None else valid[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return apply_linear(module.out_proj, out)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
