"""MobileSAM's and LiteMedSAM's image encoder: TinyViT-5M on kornia's modules, any size, padding-free windows.

kornia builds the parameters under their published names; the forward pass here is our own. It differs from
the published arrangement in four ways, none of which changes the result:

* Any input size. The published module fixes its token grids at construction.
* Windows without padding work. A window at the border holds real tokens and padding. All padded tokens of a
  window share one key and one value (padding is zero, so after the norm it is a constant), therefore they
  collapse into a single key whose bias is the log-sum-exp of their biases. Queries of padding are never needed.
* What depends on weights alone (folded convolutions, biases of windows, keys and values of padding and of prompts) is
  computed once and kept while no gradient is asked for.
* Batch normalisation always uses its stored statistics and is folded into the convolution before it, also in
  training: small batches of one hospital's images would only blur SAM's statistics, and Monte-Carlo dropout can
  switch the network to train mode without changing anything else.

Learned prompt tokens join the **last attention block of each attention stage** (strides 8, 16, 16), as in SAM's
ViT where a global block closes each quarter. Each window sees the same tokens, so they are the only carrier of
task knowledge that reaches every window at once. The convolutional stage (stride 4) has no attention to join.

References: TinyViT, arXiv 2207.10666; MobileSAM, arXiv 2306.14289; LiteMedSAM (MedSAM on a laptop, CVPR 2024).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from kornia.models.tiny_vit import TinyViT as KorniaTinyViT
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders.base import Encoder, Features, Level
from hspsam_monai.encoders.layers import add, apply_linear, gelu, pointwise
from hspsam_monai.encoders.lora import apply_lora

_IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
_IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


class TinyViT(Encoder):
    """TinyViT-5M as SAM image encoder.

    Args:
        image_size: nominal input size, a multiple of 32; every multiple of 32 runs.
        variant: ``mobile_sam`` (stem of stride 4, ImageNet statistics) or ``lite_medsam`` (1x1 stem of stride 1,
            images in [0, 1] without statistics; its 256-pixel input costs what MobileSAM costs at 1024).
        lora_rank: rank of LoRA on q and v of every attention; 0 for none.
        return_tokens: also compute the attended prompt tokens (one extra attention of P queries over the whole
            map per level); without it ``Features.tokens`` holds ``None``.
        embedding: keep SAM's neck and return SAM's embedding; networks that read only the levels drop both.

    The pyramid has four levels: 64, 128, 160, 320 channels at strides 4, 8, 16, 16 (1, 2, 4, 4 for LiteMedSAM).
    """

    def __init__(
        self,
        image_size: int = 1024,
        variant: str = "mobile_sam",
        lora_rank: int = 0,
        return_tokens: bool = False,
        embedding: bool = True,
    ) -> None:
        lite = variant == "lite_medsam"
        super().__init__(
            image_size,
            pixel_mean=(0.0, 0.0, 0.0) if lite else _IMAGENET_MEAN,
            pixel_std=(1.0, 1.0, 1.0) if lite else _IMAGENET_STD,
        )
        published = KorniaTinyViT.from_config("5m", img_size=1024, mobile_sam=True)
        self.patch_embed = published.patch_embed
        self.layers = published.layers
        self.neck = published.neck if embedding else None
        if lite:
            for index, (channels_in, channels_out) in ((0, (3, 32)), (2, (32, 64))):
                self.patch_embed.seq[index].c = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        stem = 1 if lite else 4
        self.levels = (
            Level(64, stem, None),
            Level(128, 2 * stem, 128),
            Level(160, 4 * stem, 160),
            Level(320, 4 * stem, 320),
        )
        self.return_tokens = return_tokens
        if lora_rank:
            apply_lora(self, lora_rank, _qv_rows)

    def official_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the classifier (``norm_head``, ``head``) that the published file carries but SAM never uses."""
        unused = ("norm_head.", "head.") if self.neck is not None else ("norm_head.", "head.", "neck.")
        return {k: v for k, v in state.items() if not k.startswith(unused)}

    def encode(self, image: Tensor, prompts: list[Tensor | None]) -> Features:
        """Encode normalised images (B, 3, H, W); see :class:`Encoder`."""
        x = image.contiguous(memory_format=torch.channels_last)
        stem = self.patch_embed.seq
        x = self._conv_bn(stem[2], _activate(stem[1], self._conv_bn(stem[0], x)))
        levels: list[Tensor] = []
        tokens: list[Tensor | None] = []
        for stage, prompt in zip(self.layers, prompts, strict=True):
            attended = None
            for index, block in enumerate(stage.blocks):
                if hasattr(block, "attn"):
                    last = index == len(stage.blocks) - 1
                    x, attended = self._attention_block(block, x, prompt if last else None)
                else:
                    x = self._mb_conv(block, x)
            levels.append(x)
            tokens.append(attended)
            if stage.downsample is not None:
                merge = stage.downsample
                x = self._conv_bn(merge.conv3, self._conv_bn(merge.conv2, self._conv_bn(merge.conv1, x)))
        return Features(levels, self.neck(x) if self.neck is not None else None, tokens)

    def _attention_block(self, block: nn.Module, x: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Window attention, local convolution, MLP on a map (B, C, H, W); and the attended prompts (B, P, C)."""
        tokens = x.permute(0, 2, 3, 1)  # (B, H, W, C), a view: the map is channels-last
        mixed, attended = self._window_attention(block.attn, block.window_size, tokens, prompt)
        x = self._conv_bn(block.local_conv, mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = _mlp_residual(block.mlp, x)
        if attended is not None:
            attended = _mlp_residual(block.mlp, attended)
        return x.permute(0, 3, 1, 2), attended

    def _conv_bn(self, module: nn.Module, x: Tensor) -> Tensor:
        """Convolution with its batch normalisation (stored statistics) folded in, then the activation."""
        conv, bn = module.c, module.bn

        def fold() -> tuple[Tensor, Tensor]:
            scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
            return conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale

        sources = [conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        weight, bias = self._constants.get(id(module), sources, fold)
        if conv.kernel_size == (1, 1):
            exact = _is_gelu(module.act)
            y = pointwise(x, weight, bias, with_gelu=exact)
            return y if exact else module.act(y)
        y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return _activate(module.act, y)

    def _mb_conv(self, block: nn.Module, x: Tensor) -> Tensor:
        y = self._conv_bn(block.conv3, self._conv_bn(block.conv2, self._conv_bn(block.conv1, x)))
        return _activate(block.act, add(x, block.drop_path(y)))

    def _window_attention(
        self, attention: nn.Module, window: int, x: Tensor, prompt: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """TinyViT's window attention on real tokens only.

        Args:
            attention: kornia's attention module (norm, qkv, proj, attention_biases).
            window: side of the square windows in tokens.
            x: (B, H, W, C) tokens before the norm.
            prompt: (P, C) tokens that every window sees as extra keys and values, or ``None``.

        Returns:
            (B, H, W, C) and attended prompts (B, P, C), both with their residual (``None`` without prompts, or if the
            encoder was built without ``return_tokens``).
        """
        heads, d = attention.num_heads, attention.key_dim
        qkv = _project(attention, x)  # (B, H, W, heads, 3d)
        shared = self._shared(attention, prompt)
        out = self._in_windows(attention, window, qkv, shared)
        mixed = apply_linear(attention.proj, out, residual=x)
        if not self.return_tokens or prompt is None:
            return mixed, None
        # The prompts query all tokens of the map and each other.
        batch = x.shape[0]
        _, k, v = qkv.flatten(1, 2).transpose(1, 2).split(d, dim=-1)  # (B, heads, HW, d)
        prompt_q, prompt_k, prompt_v = shared[:, 1:].expand(batch, heads, -1, -1).split(d, dim=-1)
        k, v = torch.cat([k, prompt_k], dim=2), torch.cat([v, prompt_v], dim=2)
        rows = F.scaled_dot_product_attention(prompt_q, k, v, scale=attention.scale)  # (B, heads, P, d)
        return mixed, prompt + attention.proj(rows.transpose(1, 2).flatten(2))

    def _shared(self, attention: nn.Module, prompt: Tensor | None) -> Tensor:
        """What every window sees: projections (heads, 1 + P, 3 d) of padding, then of the prompts."""

        def project() -> Tensor:
            pad = attention.norm.weight.new_zeros(1, attention.norm.normalized_shape[0])
            pad = _project(attention, pad)
            both = pad if prompt is None else torch.cat([pad, _project(attention, prompt)])
            return both.transpose(0, 1)

        sources = [*attention.norm.parameters(), *attention.qkv.parameters(), *([] if prompt is None else [prompt])]
        return self._constants.get(("shared", id(attention), prompt is None), sources, project)

    def _in_windows(self, attention: nn.Module, window: int, qkv: Tensor, shared: Tensor) -> Tensor:
        """Attend within windows: projections (B, H, W, heads, 3 d) -> (B, H, W, heads * d)."""
        batch, height, width, heads, _ = qkv.shape
        d, n_prompts = attention.key_dim, shared.shape[1] - 1
        _, shared_k, shared_v = shared.split(d, dim=-1)
        rows = []
        for rs in _strips(int(height), window):  # int: torch.jit.trace hands sizes over as tensors
            columns = []
            for cs in _strips(int(width), window):
                part = qkv[:, rs.start : rs.start + rs.count * rs.real, cs.start : cs.start + cs.count * cs.real]
                part = part.unflatten(1, (rs.count, rs.real)).unflatten(3, (cs.count, cs.real))
                # (B, nh, rh, nw, rw, heads, 3d) -> (B nh nw, heads, rh rw, 3d)
                part = part.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, rs.real * cs.real, 3 * d)
                q, k, v = part.split(d, dim=-1)
                first = 1 if rs.real * cs.real == window * window else 0  # a full window has no padding key
                extra = slice(first, 1 + n_prompts)
                if first < 1 + n_prompts:
                    k = torch.cat([k, shared_k[:, extra].expand(k.shape[0], -1, -1, -1)], dim=2)
                    v = torch.cat([v, shared_v[:, extra].expand(v.shape[0], -1, -1, -1)], dim=2)
                bias = self._window_bias(attention, window, rs.real, cs.real, n_prompts).to(q.dtype)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=attention.scale)
                out = out.unflatten(2, (rs.real, cs.real)).unflatten(0, (batch, rs.count, cs.count))
                # (B, nh, nw, heads, rh, rw, d) -> (B, nh rh, nw rw, heads d)
                columns.append(out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2))
            rows.append(torch.cat(columns, dim=2) if len(columns) > 1 else columns[0])
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def _window_bias(self, attention: nn.Module, window: int, rows: int, columns: int, prompts: int) -> Tensor:
        """See :func:`_window_bias`."""
        key = ("bias", id(attention), rows, columns, prompts)
        return self._constants.get(
            key, [attention.attention_biases], lambda: _window_bias(attention, window, rows, columns, prompts)
        )


def _project(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (..., C) -> (..., heads, 3 d)."""
    qkv = apply_linear(attention.qkv, attention.norm(tokens))
    return qkv.unflatten(-1, (attention.num_heads, 3 * attention.key_dim))


def _mlp_residual(mlp: nn.Module, x: Tensor) -> Tensor:
    """Kornia's MLP (norm, linear, GELU, linear) added to its input (..., C)."""
    return apply_linear(mlp.fc2, apply_linear(mlp.fc1, mlp.norm(x), with_gelu=True), residual=x)


def _is_gelu(act: nn.Module) -> bool:
    return isinstance(act, nn.GELU) and act.approximate == "none"


def _activate(act: nn.Module, x: Tensor) -> Tensor:
    """Apply an activation to an intermediate of our own."""
    return gelu(x) if _is_gelu(act) else act(x)


def _qv_rows(attention: nn.Module) -> list[Tensor]:
    """Rows of q and of v: TinyViT's fused projection is laid out head by head as [q, k, v]."""
    d = attention.key_dim
    starts = torch.arange(attention.num_heads)[:, None] * 3 * d
    return [(starts + torch.arange(d)).flatten(), (starts + 2 * d + torch.arange(d)).flatten()]


class _Strip(NamedTuple):
    """Consecutive windows along one axis that hold the same number of real tokens."""

    start: int
    count: int
    real: int


@lru_cache(maxsize=256)
def _strips(length: int, window: int) -> tuple[_Strip, ...]:
    """Cut ``length`` tokens into full windows and, if it does not divide, one partial window."""
    full, rest = divmod(length, window)
    strips = [_Strip(0, full, window)] if full else []
    if rest:
        strips.append(_Strip(full * window, 1, rest))
    return tuple(strips)


def _window_bias(attention: nn.Module, window: int, rows: int, columns: int, prompts: int) -> Tensor:
    """Additive bias (heads, n, n + pad + P) of one window shape with n = rows * columns real tokens.

    The column after the real keys (present if the window holds padding) is the log-sum-exp over all padded
    positions: sum_j exp(q k_pad + b_j) = exp(q k_pad + logsumexp_j b_j). Prompt columns carry no position: 0.
    """
    table = attention.attention_biases
    # Slices, not masks: their sizes are known to torch.export. (real queries, key rows, key columns)
    index = attention.attention_bias_idxs.view(window, window, window, window)[:rows, :columns].flatten(0, 1)
    parts = [_look_up(table, index[:, :rows, :columns].flatten(1))]
    if rows * columns < window * window:
        padded = torch.cat([index[:, :rows, columns:].flatten(1), index[:, rows:].flatten(1)], dim=1)
        parts.append(torch.logsumexp(_look_up(table, padded).float(), dim=2, keepdim=True).to(table.dtype))
    if prompts:
        parts.append(table.new_zeros(table.shape[0], rows * columns, prompts))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries (heads, ...) of a table (heads, L) at ``index`` (...).

    Where a gradient will be asked for, by a function that sums it in one order: that of plain indexing adds up on
    several threads in whichever order they come, and a training could not be repeated to the last bit.
    """
    if table.requires_grad and torch.is_grad_enabled():
        return F.embedding(index, table.t()).movedim(-1, 0).contiguous()
    return table[:, index]
