"""SAM's own prompt encoder and mask decoder, batched: B images with N objects each, every object its own prompts.

segment_anything decodes one image at a time; given several it repeats them wrongly. Here images and objects form one
batch, and objects may carry different numbers of prompts: absent prompts are masked out of the attention, so each
object's result is the one the original gives for it alone. Modules and parameter names are segment_anything's.

Reference: Segment Anything, arXiv 2304.02643, appendix A.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.layers import PositionEncoding, to_cells, to_map
from hspsam_monai.networks.two_way import two_way

#: Point labels beyond SAM's own 1 (object), 0 (background), -1 (not a point): this slot is empty.
ABSENT = -2

#: SAM's sizes.
WIDTH, HEADS, DEPTH, MLP_WIDTH, MASK_CHANNELS, MULTIMASKS = 256, 8, 2, 2048, 16, 3


class Prompts(NamedTuple):
    """What is known of N objects in each of B images; lengths in pixels of the network's input, x before y.

    Attributes:
        points: (B, N, P, 2) coordinates.
        labels: (B, N, P) 1 on the object, 0 off it, :data:`ABSENT` for an empty slot.
        boxes: (B, N, 4) as x0, y0, x1, y1.
        has_box: (B, N) bool, which boxes count; ``None`` for all.
        masks: (B, N, h, w) logits at a quarter of the input's size (other sizes are resized).
        has_mask: (B, N) bool, which masks count; ``None`` for all.

    Any part may be ``None``; nothing at all is SAM without a prompt, as is an object whose parts are all absent.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    has_box: Tensor | None = None
    masks: Tensor | None = None
    has_mask: Tensor | None = None

    def shape(self) -> tuple[int, int] | None:
        """(B, N), or ``None`` if there is nothing.

        Raises:
            ConfigError: the parts disagree, or a mask does not hold logits.
        """
        shapes = {tuple(x.shape[:2]) for x in self if x is not None}
        if len(shapes) > 1:
            raise ConfigError(f"The prompts disagree on (images, objects): {sorted(shapes)}.")
        if (self.points is None) != (self.labels is None):
            raise ConfigError("Points need labels (1 on the object, 0 off it), and labels need points.")
        for name in ("box", "mask"):
            part, counts = (self.boxes, self.has_box) if name == "box" else (self.masks, self.has_mask)
            if part is None and counts is not None:
                raise ConfigError(f"has_{name} tells which {name} counts, and there is none.")
        if self.masks is not None and not self.masks.is_floating_point():
            raise ConfigError(
                f"A mask prompt holds {self.masks.dtype}; expected logits (above 0 on the object), as 20 * mask - 10."
            )
        return shapes.pop() if shapes else None

    def to(self, device: torch.device | str) -> Prompts:
        """The same on another device."""
        return Prompts(*(None if part is None else part.to(device) for part in self))

    def scaled(self, x: float, y: float) -> Prompts:
        """The same on an image that is ``x`` times as wide and ``y`` times as high; masks are resized anyway."""

        def scale(part: Tensor | None, factors: list[float]) -> Tensor | None:
            # Whole numbers, too, come to lie between pixels.
            return None if part is None else (part + 0.5) * torch.tensor(factors, device=part.device) - 0.5

        return self._replace(points=scale(self.points, [x, y]), boxes=scale(self.boxes, [x, y, x, y]))

    def present(self) -> Tensor:
        """(B, N) bool: which objects have any prompt at all; some part must be given."""
        found = []
        if self.labels is not None:
            found.append((self.labels != ABSENT).any(-1))
        for part, counts in ((self.boxes, self.has_box), (self.masks, self.has_mask)):
            if part is not None:
                everywhere = torch.ones(part.shape[:2], dtype=torch.bool, device=part.device)
                found.append(everywhere if counts is None else counts)
        return torch.stack(found).any(0)


class SAMDecoder(nn.Module):
    """SAM's prompt encoder and mask decoder for batches.

    Args:
        stride: pixels of the network's input per cell of the embedding (16; 4 for LiteMedSAM).

    Attributes:
        prompt_encoder, mask_decoder: segment_anything's modules; official files fit their state.
    """

    def __init__(self, stride: int = 16) -> None:
        super().__init__()
        self.stride = stride
        # The sizes given here are only used by the original forward passes, which are not called.
        self.prompt_encoder = PromptEncoder(WIDTH, (64, 64), (1024, 1024), MASK_CHANNELS)
        self.prompt_encoder.pe_layer.__class__ = PositionEncoding  # the same, in other types as well
        self.mask_decoder = MaskDecoder(
            transformer_dim=WIDTH,
            transformer=TwoWayTransformer(DEPTH, WIDTH, HEADS, MLP_WIDTH),
            num_multimask_outputs=MULTIMASKS,
        )

    def embed(self, prompts: Prompts, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Turn prompts into tokens.

        Args:
            prompts: at least one part given, for B images with N objects.
            grid: (h, w) of the embedding.

        Returns:
            Sparse tokens (B N, T, 256), which of them count (B N, T) bool, dense embedding (B N, 256, h, w).
        """
        shape = prompts.shape()
        if shape is None:
            raise ConfigError("There is no prompt to embed.")
        count = shape[0] * shape[1]
        encoder = self.prompt_encoder
        size = (grid[0] * self.stride, grid[1] * self.stride)
        weight = encoder.no_mask_embed.weight
        device = weight.device
        tokens, valid = [weight.new_empty(count, 0, WIDTH)], [torch.empty(count, 0, device=device).bool()]
        has_box = None
        if prompts.boxes is not None:
            has_box = torch.ones(count, device=device).bool() if prompts.has_box is None else prompts.has_box.flatten()
        if prompts.points is not None:
            labels = prompts.labels.flatten(0, 1)
            position = encoder.pe_layer.forward_with_coords(prompts.points.flatten(0, 1) + 0.5, size)
            kinds = torch.stack([encoder.point_embeddings[i].weight[0] for i in (0, 1)])
            nothing = encoder.not_a_point_embed.weight[0]
            point = torch.where((labels >= 0)[..., None], position + kinds[labels.clamp(min=0).long()], nothing)
            present = labels != ABSENT
            # SAM closes a list of points with "not a point" unless a box follows.
            closing = present.any(1) if has_box is None else present.any(1) & ~has_box
            tokens += [point, nothing.expand(count, 1, -1)]
            valid += [present, closing[:, None]]
        if prompts.boxes is not None:
            corners = encoder.pe_layer.forward_with_coords(prompts.boxes.reshape(count, 2, 2) + 0.5, size)
            kinds = torch.stack([encoder.point_embeddings[i].weight[0] for i in (2, 3)])
            tokens.append(corners + kinds)
            valid.append(has_box[:, None].expand(-1, 2))
        dense = encoder.no_mask_embed.weight.view(1, WIDTH, 1, 1).expand(count, -1, *grid)
        if prompts.masks is not None:
            masks = prompts.masks.flatten(0, 1)[:, None]
            masks = F.interpolate(masks, (4 * grid[0], 4 * grid[1]), mode="bilinear", align_corners=False)
            embedded = encoder.mask_downscaling(masks.to(weight.dtype))
            if prompts.has_mask is None:
                dense = embedded
            else:
                dense = torch.where(prompts.has_mask.flatten()[:, None, None, None], embedded, dense)
        return torch.cat(tokens, dim=1), torch.cat(valid, dim=1), dense

    def forward(
        self, embedding: Tensor, prompts: Prompts | None = None, multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predict masks.

        Args:
            embedding: (B, 256, h, w) from a SAM encoder.
            prompts: of B images with N objects; ``None`` or empty: no prompt, N = 1.
            multimask: three masks an object (for ambiguous prompts) instead of one.

        Returns:
            Mask logits (B, N, M, 4h, 4w) and predicted IoU (B, N, M), M = 3 with ``multimask``, else 1.

        Raises:
            ConfigError: prompts and embedding disagree on B.
        """
        batch, _, h, w = embedding.shape
        shape = None if prompts is None else prompts.shape()
        if shape is None:
            sparse = embedding.new_zeros(batch, 0, WIDTH)
            valid = sparse.new_zeros(batch, 0).bool()
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, WIDTH, 1, 1)
            objects = 1
        else:
            if shape[0] != batch:
                raise ConfigError(f"Prompts are for {shape[0]} images, the embedding for {batch}.")
            objects = shape[1]
            sparse, valid, dense = self.embed(prompts, (h, w))
        masks, iou = self.decode(embedding, sparse, valid, dense, objects)
        part = slice(1, None) if multimask else slice(0, 1)
        return masks[:, :, part], iou[:, :, part]

    def decode(
        self, embedding: Tensor, sparse: Tensor, valid: Tensor | None, dense: Tensor, objects: int
    ) -> tuple[Tensor, Tensor]:
        """The mask decoder on tokens of any origin.

        Args:
            embedding: (B, 256, h, w).
            sparse: (B N, T, 256) prompt tokens.
            valid: (B N, T) bool, which tokens count; ``None`` for all.
            dense: (B N | 1, 256, h, w), broadcast where it can be.
            objects: N.

        Returns:
            All four mask logits (B, N, 4, 4h, 4w), the single mask first, and predicted IoU (B, N, 4).
        """
        decoder = self.mask_decoder
        batch, _, h, w = embedding.shape
        count = batch * objects
        output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(count, -1, -1)
        tokens = torch.cat([output, sparse], dim=1)
        if valid is not None:
            valid = torch.cat([valid.new_ones(count, output.shape[1]), valid], dim=1)
        src = embedding[:, None].expand(-1, objects, -1, -1, -1).flatten(0, 1) + dense
        position = self.prompt_encoder.pe_layer((h, w)).flatten(1).transpose(0, 1)[None]
        tokens, keys = two_way(decoder.transformer, to_cells(src), position, tokens, valid)
        up = decoder.output_upscaling(to_map(keys, (h, w)))
        heads = decoder.output_hypernetworks_mlps
        filters = torch.stack([head(tokens[:, 1 + i]) for i, head in enumerate(heads)], dim=1)
        masks = torch.einsum("bmc,bchw->bmhw", filters, up.to(filters.dtype))
        iou = decoder.iou_prediction_head(tokens[:, 0])
        return masks.unflatten(0, (batch, objects)), iou.unflatten(0, (batch, objects))
