"""HSP-SAM's deep-to-shallow decoder with prompts refreshed at every level, and its slim twin for small encoders.

Paper (arXiv 2506.02854, decoder of its figure): level features pass a neck; from the deepest level upwards the
image stream is the sum of what came before and the neck's output; a two-way transformer of that level lets the
IoU token, the mask tokens and the level's prompts A_l talk to the image; the prompts are then replaced by the next
level's. Transposed convolutions take the last stream to full resolution, where each mask token's hyper-network
becomes a 1x1 filter.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.transformer import TwoWayTransformer
from torch import Tensor, nn

from hspsam_monai.encoders import Level
from hspsam_monai.encoders.constants import Constants, KeepsConstants
from hspsam_monai.encoders.layers import Pointwise, add
from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.layers import (
    LayerNorm2d,
    NormGELU,
    OwnGELU,
    PositionEncoding,
    SeparableResidual,
    mlp,
    resize,
    to_cells,
    to_map,
)
from hspsam_monai.networks.two_way import two_way

#: Channels of the four transposed convolutions of the paper's head, 256 -> 64 -> 32 -> 16 -> 8.
PAPER_HEAD = (64, 32, 16, 8)
#: Channels in which the slim head takes its dot products.
SLIM_HEAD = 32

STYLES = ("paper", "slim")


class HierarchicalDecoder(KeepsConstants):
    """From a pyramid of features and per-level prompts to class logits at the input's size.

    Args:
        levels: the encoder's levels, shallow to deep.
        num_classes: K, background included; one mask token each.
        prompted: for each level, whether a two-way transformer runs there.
        style: ``paper`` (width 256, depth 2, 3x3 necks, full-resolution head) or ``slim`` (width 128, 64 at
            stride 4, depth 1, separable convolutions, head at stride 4 and one bilinear upsampling), which
            needs about an eighth of TinyViT's multiplications; its time is in ``benchmarks/RESULTS.md``.

    A pyramid whose levels differ in stride (TinyViT) is walked the same way: the stream is upsampled when it
    passes to a finer level.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, prompted: list[bool], style: str = "paper") -> None:
        super().__init__()
        if style not in STYLES:
            raise ConfigError(f"decoder style is {style!r}; expected one of {', '.join(STYLES)}.")
        paper = style == "paper"
        width = 256 if paper else 128
        self.width, self.num_classes, self.paper = width, num_classes, paper
        # Only a level without a transformer may be narrower: tokens keep one width throughout.
        widths = [width if paper or on or level.stride > 4 else 64 for level, on in zip(levels, prompted, strict=True)]
        neck = _paper_neck if paper else _slim_neck
        self.necks = nn.ModuleList(neck(level.channels, w) for level, w in zip(levels, widths, strict=True))
        if paper:
            self.necks[-1] = nn.Identity()  # SAM's own neck stands there, inside the encoder
        deeper = [*widths[1:], widths[-1]]
        self.narrow = nn.ModuleList(
            nn.Identity() if a == b else Pointwise(a, b) for a, b in zip(deeper, widths, strict=True)
        )
        self.mixers = nn.ModuleList(nn.Identity() if paper else SeparableResidual(w) for w in widths)
        self.transformers = nn.ModuleList(
            TwoWayTransformer(depth=2 if paper else 1, embedding_dim=width, num_heads=8, mlp_dim=2048 if paper else 512)
            if on
            else nn.Identity()
            for on in prompted
        )
        self.prompted = prompted
        self.positions = PositionEncoding(width // 2)
        self._constants = Constants()
        # SAM's "no mask" embedding, frozen in the paper; zero until SAM's weights are loaded.
        self.register_buffer("no_mask", torch.zeros(width))
        self.iou_token = nn.Parameter(torch.randn(1, width))
        self.mask_tokens = nn.Parameter(torch.randn(num_classes, width))
        self.upscale, channels = _head(widths[0], levels[0].stride, paper)
        self.hyper = nn.ModuleList(mlp([width, width, width, channels]) for _ in range(num_classes))

    def forward(self, features: list[Tensor], prompts: list[Tensor | None], size: tuple[int, int]) -> Tensor:
        """Decode.

        Args:
            features: F_l from shallow to deep, each (B, C_l, H_l, W_l); the deepest of the ``paper`` style is
                SAM's embedding (B, 256, H/16, W/16), since its neck is SAM's own.
            prompts: A_l of each level, (P, C) or (B, P, C), or ``None``.
            size: (H, W) of the input image.

        Returns:
            Logits (B, K, H, W).
        """
        batch = features[0].shape[0]
        tokens = torch.cat([self.iou_token, self.mask_tokens]).expand(batch, -1, -1)
        kept = tokens.shape[1]
        src: Tensor | None = None
        for index in reversed(range(len(features))):
            x = self.necks[index](features[index])
            if src is None:
                src = x + self.no_mask[: x.shape[1], None, None]
            else:
                src = add(resize(self.narrow[index](src), x.shape[-2:]), x)
            src = self.mixers[index](src)
            if self.prompted[index]:
                prompt = prompts[index]
                sparse = tokens if prompt is None else torch.cat([tokens, prompt.expand(batch, -1, -1)], dim=1)
                h, w = src.shape[-2:]
                tokens, cells = two_way(self.transformers[index], to_cells(src), self._position((h, w)), sparse)
                tokens = tokens[:, :kept]  # this level's prompts have done their work
                src = to_map(cells, (h, w))
        up = self.upscale(src)
        filters = torch.stack([h(tokens[:, 1 + k]) for k, h in enumerate(self.hyper)], dim=1)  # (B, K, c)
        logits = torch.einsum("bkc,bchw->bkhw", filters, up.to(filters.dtype))
        return resize(logits.float(), size)

    def _position(self, size: tuple[int, int]) -> Tensor:
        """SAM's dense position encoding of a grid (h, w), as (1, h w, C)."""

        def encode() -> Tensor:
            return self.positions(size).flatten(1).transpose(0, 1)[None].contiguous()

        return self._constants.get(size, [self.positions.positional_encoding_gaussian_matrix], encode)

    def load_sam(self, state: dict[str, Tensor]) -> list[str]:
        """Take what the paper keeps frozen from SAM's own file: position encoding and "no mask" embedding.

        A slim decoder takes the leading part of the position encoding (its frequencies are exchangeable) and
        leaves the "no mask" embedding, which lives in another space.

        Returns:
            The keys used.
        """
        used = []
        key = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
        if key in state:
            matrix = self.positions.positional_encoding_gaussian_matrix
            matrix.copy_(state[key][:, : matrix.shape[1]])
            used.append(key)
        key = "prompt_encoder.no_mask_embed.weight"
        if self.paper and key in state:
            self.no_mask.copy_(state[key].view(-1))
            used.append(key)
        return used


def _paper_neck(channels: int, width: int) -> nn.Sequential:
    """SAM's neck: 1x1 and 3x3 convolutions without bias, each followed by a layer norm."""
    return nn.Sequential(
        Pointwise(channels, width, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


def _slim_neck(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(Pointwise(channels, width, bias=False), LayerNorm2d(width))


def _head(width: int, stride: int, paper: bool) -> tuple[nn.Module, int]:
    """Upscaling from ``stride`` to 1 (paper) or to 4 (slim), and the channels it ends with."""
    steps = 0
    target = 1 if paper else 4
    while stride > target:
        stride //= 2
        steps += 1
    layers: list[nn.Module] = []
    if not paper:
        for _ in range(steps):
            layers += [nn.ConvTranspose2d(width, width // 2, 2, 2), NormGELU(width // 2)]
            width //= 2
        return nn.Sequential(*layers, Pointwise(width, SLIM_HEAD)), SLIM_HEAD
    plan = (*PAPER_HEAD[: steps - 1], PAPER_HEAD[-1]) if steps else ()
    for index, channels in enumerate(plan):
        last = index == len(plan) - 1
        layers += [nn.ConvTranspose2d(width, channels, 2, 2), OwnGELU() if last else NormGELU(channels)]
        width = channels
    return nn.Sequential(*layers), width
