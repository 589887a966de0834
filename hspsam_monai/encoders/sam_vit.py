"""SAM's ViT-B/L/H image encoder on segment_anything's modules: faster, exact, with prompts in its levels.

Reference: Kirillov et al., Segment Anything, arXiv 2304.02643; prompts as extra keys: HSP-SAM, arXiv
2506.02854. The official forward pass pads the token grid to whole windows and works on the padding too; here
windows are grouped by their real shape, and all padding of a window is one extra key
(:func:`attention.padding_logit`).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hspsam_monai.encoders import attention
from hspsam_monai.encoders.base import Encoder, Features, Level
from hspsam_monai.encoders.layers import apply_linear, linear
from hspsam_monai.encoders.lora import apply_lora
from hspsam_monai.errors import ConfigError

# segment_anything.build_sam: statistics of RGB in 0-255, patch and window size, width of the embedding.
_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
_PATCH, _WINDOW, _EMBEDDING = 16, 14, 256


class Variant(NamedTuple):
    """Size of one SAM ViT: width D, blocks, heads, and the blocks with global attention (the levels)."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


#: Sizes of segment_anything.build_sam.
VARIANTS = {
    "b": Variant(768, 12, 12, (2, 5, 8, 11)),
    "l": Variant(1024, 24, 16, (5, 11, 17, 23)),
    "h": Variant(1280, 32, 16, (7, 15, 23, 31)),
}


class SamViT(Encoder):
    """SAM's image encoder for sides that are multiples of 32, with prompts joining its four levels.

    Without prompts and LoRA it computes what segment_anything computes (fp32 difference about 1e-6), without
    the work on padding: at 256 x 256 that is 29 % of all multiplications. Construction touches no file and
    no network; parameters start random, see ``weights.load_encoder``. Names equal the official file's after
    ``image_encoder.``.

    Args:
        variant: ``"b"``, ``"l"`` or ``"h"``.
        image_size: nominal side in pixels; position embeddings are kept at this size. Other sizes run with
            embeddings resampled on the fly (bicubic; linear for relative position).
        lora_rank: rank of the LoRA on q and v of every block; 0 for none.
        checkpointing: recompute blocks in the backward pass; less memory, about a third more time.
        return_tokens: also run the prompts' own queries and return the rows as they leave each level's block.
            Off, ``Features.tokens`` holds ``None``, since HSP-SAM throws these rows away.
        embedding: keep SAM's neck and return SAM's embedding; networks that read only the levels drop both.

    Levels are the outputs of the four global-attention blocks, each (B, D, H/16, W/16), prompts (P, D).

    Raises:
        ConfigError: unknown variant, bad ``image_size`` or negative ``lora_rank``.
    """

    def __init__(
        self,
        variant: str = "b",
        image_size: int = 1024,
        lora_rank: int = 0,
        checkpointing: bool = False,
        return_tokens: bool = False,
        embedding: bool = True,
    ) -> None:
        super().__init__(image_size, _MEAN, _STD)
        if variant not in VARIANTS:
            raise ConfigError(f"SAM ViT variant is {variant!r}; expected one of {', '.join(VARIANTS)}.")
        if lora_rank < 0:
            raise ConfigError(f"lora_rank is {lora_rank}; expected 0 (no LoRA) or more.")
        size = VARIANTS[variant]
        self.variant, self.checkpointing, self.return_tokens = variant, checkpointing, return_tokens
        self.levels = tuple(Level(size.width, _PATCH, size.width) for _ in size.global_blocks)
        self._level_of = {block: level for level, block in enumerate(size.global_blocks)}
        official = ImageEncoderViT(
            img_size=image_size,
            patch_size=_PATCH,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=_WINDOW,
            global_attn_indexes=size.global_blocks,
            out_chans=_EMBEDDING,
        )
        self.patch_embed, self.pos_embed = official.patch_embed, official.pos_embed
        self.blocks, self.neck = official.blocks, official.neck if embedding else None
        if lora_rank:
            apply_lora(self.blocks, lora_rank, _qv_rows)

    def encode(self, image: Tensor, prompts: list[Tensor | None]) -> Features:
        """Encode normalised images (B, 3, H, W); see :class:`Encoder`."""
        x = self.patch_embed(image)
        x = x + self._positions(int(x.shape[1]), int(x.shape[2]))
        memo: dict = {}  # constants shared by the blocks of this pass, see attention.attend
        levels: list[Tensor] = []
        tokens: list[Tensor | None] = []
        for index, block in enumerate(self.blocks):
            level = self._level_of.get(index)
            prompt = None if level is None else prompts[level]
            if self.checkpointing and torch.is_grad_enabled():
                x, rows = checkpoint(self._run_block, block, x, prompt, memo, use_reentrant=False)
            else:
                x, rows = self._run_block(block, x, prompt, memo)
            if level is not None:
                levels.append(x.permute(0, 3, 1, 2))
                tokens.append(rows)
        return Features(levels, None if self.neck is None else self.embed(levels[-1]), tokens)

    def official_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample an official checkpoint's position embeddings (made for 1024) to ``image_size``.

        Args:
            state: the encoder part, prefix removed. Entries that already fit, and others, pass unchanged.
        """
        grid = self.image_size // _PATCH
        result = {k: v for k, v in state.items() if self.neck is not None or not k.startswith("neck.")}
        if "pos_embed" in state and state["pos_embed"].ndim == 4 and state["pos_embed"].shape[1:3] != (grid, grid):
            result["pos_embed"] = attention.resample_pos_embed(state["pos_embed"], (grid, grid))
        for index in self._level_of:
            for axis in "hw":
                key = f"blocks.{index}.attn.rel_pos_{axis}"
                if key in state and state[key].ndim == 2 and state[key].shape[0] != 2 * grid - 1:
                    result[key] = attention.resample_rel_pos(state[key], grid)
        return result

    def _run_block(
        self, block: nn.Module, x: Tensor, prompt: Tensor | None, memo: dict
    ) -> tuple[Tensor, Tensor | None]:
        """One transformer block on tokens (B, h, w, D) and, in a level, prompts (P, D)."""
        normed = block.norm1(x)
        if block.window_size:
            attended, rows = self._windowed(block.attn, normed, block.window_size, memo), None
        else:
            attended, rows = self._global(block.attn, normed, prompt, memo)
        x = _mlp(block, apply_linear(block.attn.proj, attended, residual=x))
        if rows is not None and prompt is not None:
            rows = _mlp(block, prompt + block.attn.proj(rows))
        return x, rows

    def _global(self, attn: nn.Module, x: Tensor, prompt: Tensor | None, memo: dict) -> tuple[Tensor, Tensor | None]:
        """All tokens (B, h, w, D) attend to all tokens and to the prompts (P, D), as HSP-SAM injects them."""
        batch, h, w, width = x.shape
        q, k, v = _heads(apply_linear(attn.qkv, x), attn.num_heads).unbind(0)
        rel_h, rel_w = attention.relative_logits(q, self._table(attn.rel_pos_h, h), self._table(attn.rel_pos_w, w))
        extra = None
        if prompt is not None:
            # A constant of the task: projected once, then shared along the batch and from image to image.
            shared = self._constants.get(
                ("prompt", id(attn)),
                [prompt, *attn.qkv.parameters()],
                lambda: attn.qkv(prompt).view(-1, 3, attn.num_heads, width // attn.num_heads).permute(1, 2, 0, 3),
            )
            prompt_q, prompt_k, prompt_v = shared[:, None].expand(-1, batch, -1, -1, -1).unbind(0)
            extra = attention.Extra(prompt_k, prompt_v, q=prompt_q if self.return_tokens else None)
        way = attention.choose(x.device.type, (h, w), rel_h.requires_grad)
        out = attention.attend(q, k, v, rel_h, rel_w, extra, way, memo).transpose(1, 2).flatten(2)  # (B, tokens, D)
        grid, rows = out[:, : h * w], out[:, h * w :]
        return grid.unflatten(1, (h, w)), rows if extra is not None and extra.q is not None else None

    def _windowed(self, attn: nn.Module, x: Tensor, window: int, memo: dict) -> Tensor:
        """Tokens (B, h, w, D) attend within windows; edge windows see their padding as one extra key."""
        qkv = apply_linear(attn.qkv, x)
        table_h, table_w = self._table(attn.rel_pos_h, window), self._table(attn.rel_pos_w, window)
        bands = [
            torch.cat(
                [_attend_windows(attn, region, table_h, table_w, memo) for region in _split(band, 2, window)],
                2,
            )
            for band in _split(qkv, 1, window)
        ]
        return torch.cat(bands, 1)

    def _positions(self, height: int, width: int) -> Tensor:
        """Absolute positions (1, h, w, D) of a grid."""
        if tuple(self.pos_embed.shape[1:3]) == (height, width):
            return self.pos_embed
        return self._constants.get(
            ("positions", height, width),
            [self.pos_embed],
            lambda: attention.resample_pos_embed(self.pos_embed, (height, width)),
        )

    def _table(self, rel_pos: Tensor, size: int) -> Tensor:
        """Relative positions of a block laid out for ``size`` tokens, once for a size and not once an image."""
        return self._constants.get(
            (id(rel_pos), int(size)), [rel_pos], lambda: attention.relative_table(rel_pos, size).contiguous()
        )

    def embed(self, level: Tensor) -> Tensor:
        """SAM's neck: last level (B, D, h, w) -> (B, 256, h, w); normalises in float32 also under autocast."""
        reduce, norm1, mix, norm2 = self.neck
        x = level.permute(0, 2, 3, 1)
        x = _layer_norm(linear(x, reduce.weight.flatten(1)), norm1)
        x = mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return _layer_norm(x, norm2).permute(0, 3, 1, 2)


def _mlp(block: nn.Module, x: Tensor) -> Tensor:
    """A block's norm and MLP (linear, GELU, linear), added to their input (..., D)."""
    mlp = block.mlp
    return apply_linear(mlp.lin2, apply_linear(mlp.lin1, block.norm2(x), with_gelu=True), residual=x)


def _split(x: Tensor, axis: int, window: int) -> list[Tensor]:
    """Cut an axis into the part made of whole windows and the rest; empty parts are left out."""
    whole = x.shape[axis] // window * window
    parts = [x.narrow(axis, 0, whole), x.narrow(axis, whole, x.shape[axis] - whole)]
    return [part for part in parts if part.shape[axis]]


def _attend_windows(attn: nn.Module, qkv: Tensor, table_h: Tensor, table_w: Tensor, memo: dict) -> Tensor:
    """Attention inside windows of equal real shape.

    Args:
        attn: segment_anything's attention module; its qkv bias is k and v of padding (zero after norm1).
        qkv: (B, rows, columns, 3 D) of a region cut into windows of (min(rows, window), min(columns,
            window)).
        table_h: (window, d, window) relative positions of rows.
        table_w: the same of columns.
        memo: constants of this forward pass.

    Returns:
        (B, rows, columns, D).
    """
    batch, rows, columns, width = qkv.shape
    window = table_h.shape[0]
    h, w = min(rows, window), min(columns, window)
    down, across = rows // h, columns // w
    # (B, rows, columns, 3D) -> one window per batch entry
    cut = qkv.view(batch, down, h, across, w, width).transpose(2, 3).reshape(-1, h, w, width)
    q, k, v = _heads(cut, attn.num_heads).unbind(0)
    rel_h, rel_w = attention.relative_logits(q, table_h[:h], table_w[:w])
    extra = None
    if h < window or w < window:
        logit = attention.padding_logit(rel_h, rel_w, h, w)
        bias = attn.qkv.bias() if callable(attn.qkv.bias) else attn.qkv.bias  # a method in a quantised layer
        _, pad_k, pad_v = bias.to(q.dtype).view(3, 1, attn.num_heads, 1, -1).expand(-1, q.shape[0], -1, -1, -1)
        extra = attention.Extra(pad_k, pad_v, logit)
        rel_h, rel_w = rel_h[..., :h], rel_w[..., :w]
    way = attention.choose(qkv.device.type, (h, w), rel_h.requires_grad)
    out = attention.attend(q, k, v, rel_h, rel_w, extra, way, memo)  # (windows, heads, h * w, d)
    out = out.transpose(1, 2).reshape(batch, down, across, h, w, width // 3)
    return out.transpose(2, 3).reshape(batch, rows, columns, width // 3)


def _heads(qkv: Tensor, heads: int) -> Tensor:
    """(N, h, w, 3 D) -> (3, N, heads, h, w, d)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5)


def _layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Apply segment_anything's LayerNorm2d to channels-last (B, h, w, C), computing in float32."""
    normed = F.layer_norm(x.float(), norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps)
    return normed.to(norm.weight.dtype)


def _qv_rows(attn: nn.Module) -> list[Tensor]:
    """Rows of q and of v in segment_anything's fused projection [q; k; v]."""
    width = attn.qkv.in_features
    return [torch.arange(width), torch.arange(2 * width, 3 * width)]
