"""The encoders that race: ours and its peers, built for one size with the same random weights.

The peers are fixed to the size they are built for, so each size has its own set, with position embeddings of that size.
Nothing is timed before :func:`refusal` has seen that a contender computes what the published implementation computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timing import failed
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders import Encoder, SamViT, TinyViT, build_encoder
from hspsam_monai.encoders.sam_vit import VARIANTS, Variant
from hspsam_monai.errors import ConfigError

OURS = "hspsam"
#: Those whose output every other is held to.
PUBLISHED = ("segment_anything", "kornia")
FAST = "segment_anything_fast"
#: Peer -> where it comes from, if not from PyPI: the package ``segment-anything-fast`` there is another project's.
SOURCES = {FAST: "github.com/pytorch-labs/segment-anything-fast"}
#: Largest relative difference of two outputs in float32: max |a - b| / max |b|.
TOLERANCE = 1e-5
#: Smallest cosine between an output in bfloat16 and the published one in float32.
COSINE = 0.999
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Contender:
    """One implementation of an encoder.

    Attributes:
        name: for the table.
        module: maps images (B, 3, S, S) to SAM's embedding (B, 256, S/16, S/16), or to what holds it.
        normalised: takes images with the pixel statistics already applied; ours applies them itself, in its time.
        compiled: by ``torch.compile``.
        cast: its weights are bfloat16 and no autocast is used, as its authors run it; then only that precision exists.
        mode: mode of ``torch.compile``.
        writes: leaves files in the working directory; it runs in a temporary one.
    """

    name: str
    module: Callable[[Tensor], Any]
    normalised: bool = True
    compiled: bool = False
    cast: bool = False
    mode: str | None = None
    writes: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this project's encoder."""
        return self.name.startswith(OURS)

    def input(self, image: Tensor, encoder: Encoder) -> Tensor:
        """Prepare what :meth:`encode` takes from images in [0, 1]; not part of the time."""
        if not self.normalised:
            return image
        x = (image - encoder.pixel_mean) / encoder.pixel_std
        return x.bfloat16() if self.cast else x

    @torch.inference_mode()
    def encode(self, x: Tensor, precision: str) -> Tensor:
        """Encode (B, 3, S, S) of :meth:`input`; returns the embedding (B, 256, S/16, S/16)."""
        lower = precision == "bfloat16" and not self.cast
        place = chdir(_scratch().name) if self.writes else nullcontext()
        with place, torch.autocast(x.device.type, torch.bfloat16) if lower else nullcontext():
            return _embedding(self.module(x))

    def compile(self) -> Contender:
        """Return the same contender compiled for the one shape it will meet."""
        module = torch.compile(self.module, dynamic=False, mode=self.mode)
        return replace(self, name=f"{self.name}, compiled", module=module, compiled=True)


@cache
def _scratch() -> TemporaryDirectory:
    """One folder for the whole process, which goes with it: what a peer has tuned there, it finds again."""
    return TemporaryDirectory()


def _embedding(output: Any) -> Tensor:
    for field in ("embedding", "last_hidden_state"):
        if hasattr(output, field):
            return getattr(output, field)
    return output


def random_encoder(name: str, size: int, seed: int = 0) -> Encoder:
    """Build our encoder with every parameter and statistic random, also those that usually start at zero or one.

    Args:
        name: see :func:`hspsam_monai.encoders.build_encoder`.
        size: side of the images in pixels.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    encoder = build_encoder(name, image_size=size)
    if isinstance(encoder, TinyViT):
        # Statistics that a signal has really had; with others it would die or explode on the way.
        source = _kornia(None, 64)
        norms = [module for module in source.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            source.train()(torch.randn(2, 3, 64, 64))
            for norm in norms:
                norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt())
        encoder.load_state_dict(source.state_dict(), strict=False)
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if "rel_pos" in key or key.endswith(("pos_embed", "bias", "attention_biases")) or "norm" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def peer_builders(encoder: Encoder, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Name -> how to build that peer with the weights of ``encoder``; the published implementation comes first.

    Args:
        encoder: ours, built for the size of the race.
        device: where the race will be; some peers need a GPU.

    Raises:
        ConfigError: no peer of that encoder is known.
    """
    if isinstance(encoder, SamViT):
        builders = {
            "segment_anything": lambda: Contender("segment_anything", _official(encoder)),
            "transformers, SDPA": lambda: Contender("transformers, SDPA", _transformers(encoder)),
        }
        if device.type == "cuda":
            builders[FAST] = lambda: _fast(encoder)
        return builders
    if isinstance(encoder, TinyViT) and encoder.levels[0].stride == 4:
        return {"kornia": lambda: Contender("kornia", _kornia(encoder.state_dict(), encoder.image_size))}
    raise ConfigError(f"No peer of {type(encoder).__name__} is known; expected SAM's ViT or MobileSAM's TinyViT.")


def build(encoder: Encoder, device: torch.device, only: str | None = None) -> tuple[list[Contender], dict[str, str]]:
    """Build ours and its peers on a device.

    Args:
        encoder: ours with the weights that all shall have.
        device: where the race will be.
        only: the one contender that is wanted.

    Returns:
        The contenders, ours last; and peer -> why it is not there: whatever its builder raises costs its row alone.
    """
    found, absent = [], {}
    for name, builder in peer_builders(encoder, device).items():
        if only not in (None, name):
            continue
        try:
            peer = builder()
            found.append(replace(peer, module=peer.module.to(device).eval()))
        except ModuleNotFoundError as error:
            source = f" (it is at {SOURCES[name]})" if name in SOURCES and find_spec(name) is None else ""
            absent[name] = f"{error.name} is not installed{source}"
        except Exception as error:  # out of memory, another version's arguments or weights
            absent[name] = f"does not import: {error}" if isinstance(error, ImportError) else failed(error)
    if only in (None, OURS):
        found.append(Contender(OURS, encoder.to(device).eval(), normalised=False))
    return found, absent


def reference(contenders: Sequence[Contender], absent: dict[str, str]) -> Contender:
    """Find the published implementation, which every other is compared with.

    Raises:
        ConfigError: it is not among them; nothing may then be timed.
    """
    for contender in contenders:
        if contender.name in PUBLISHED:
            return contender
    reasons = "; ".join(absent[name] for name in PUBLISHED if name in absent)
    raise ConfigError(f"no published output to compare with: {reasons}")


def packages(device: torch.device) -> list[str]:
    """Distributions of the peers whose versions stand beneath a table besides those of :func:`results.machine`."""
    # PyPI's distribution of that name brings another module.
    fast = device.type == "cuda" and find_spec(FAST) is not None
    return ["transformers", *["segment-anything-fast"] * fast]


def refusal(output: Tensor, expected: Tensor, precision: str) -> str | None:
    """Say why a contender may not race: its output differs from the published one.

    Args:
        output: (B, 256, h, w) of the contender.
        expected: the same of the published implementation in float32.
        precision: of ``output``: ``float32`` is held to :data:`TOLERANCE`, ``bfloat16`` to :data:`COSINE`.

    Returns:
        The reason, or ``None`` if it may.
    """
    if output.shape != expected.shape:
        return f"outputs differ: shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    output, expected = output.float(), expected.float()
    if not torch.isfinite(output).all():
        return "outputs differ: not finite"
    if precision == "float32":
        difference = float((output - expected).abs().max() / expected.abs().max())
        return None if difference <= TOLERANCE else f"outputs differ: {difference:.1e} relative, above {TOLERANCE:.0e}"
    cosine = float(F.cosine_similarity(output.flatten().double(), expected.flatten().double(), dim=0))
    return None if cosine >= COSINE else f"outputs differ: cosine {cosine:.4f}, below {COSINE}"


def variant_of(encoder: Encoder) -> Variant | None:
    """Sizes of a SAM ViT; ``None`` for TinyViT."""
    return VARIANTS[encoder.variant] if isinstance(encoder, SamViT) else None


def _vit_arguments(encoder: SamViT) -> dict[str, Any]:
    """Arguments of segment_anything's ImageEncoderViT (its build_sam), and of what copies its signature."""
    size = VARIANTS[encoder.variant]
    return {
        "img_size": encoder.image_size, "embed_dim": size.width, "depth": size.depth, "num_heads": size.heads,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6), "use_rel_pos": True, "window_size": 14,
        "global_attn_indexes": size.global_blocks, "out_chans": 256,
    }  # fmt: skip


def _official(encoder: SamViT) -> nn.Module:
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(**_vit_arguments(encoder))
    model.load_state_dict(encoder.state_dict())
    return model


def _fast(encoder: SamViT) -> Contender:
    """segment_anything_fast as its authors run it: bfloat16 weights, later compiled with max-autotune.

    On other GPUs than an A100 it keeps what it tuned in a pickle in the working directory.
    """
    from segment_anything_fast.modeling import ImageEncoderViT

    model = ImageEncoderViT(**_vit_arguments(encoder))
    model.load_state_dict(encoder.state_dict())
    return Contender(FAST, model.bfloat16(), cast=True, mode="max-autotune", writes=True)


#: transformers' names for the parts of segment_anything's encoder.
_RENAMED = (
    ("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."), (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."), ("neck.0.", "neck.conv1."), ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."), ("neck.3.", "neck.layer_norm2."),
)  # fmt: skip


def transformers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state of segment_anything's encoder to that of transformers' ``SamVisionEncoder``."""
    renamed = {}
    for key, value in state.items():
        for ours, theirs in _RENAMED:
            if ours.startswith(".") or key.startswith(ours):
                key = key.replace(ours, theirs)  # noqa: PLW2901
        renamed[key] = value
    return renamed


def _transformers(encoder: SamViT) -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    size = VARIANTS[encoder.variant]
    config = SamVisionConfig(
        hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.heads,
        image_size=encoder.image_size, window_size=14, global_attn_indexes=list(size.global_blocks),
        attn_implementation="sdpa",
    )  # fmt: skip
    model = SamVisionModel(config).vision_encoder
    model.load_state_dict(transformers_state(encoder.state_dict()))
    return model


def _kornia(state: dict[str, Tensor] | None, size: int) -> nn.Module:
    """MobileSAM's arrangement; ``state`` of our TinyViT, which has no classifier, or ``None`` for fresh weights."""
    from kornia.models.tiny_vit import TinyViT as KorniaTinyViT

    model = KorniaTinyViT.from_config("5m", img_size=size, mobile_sam=True)
    model.norm_head = model.head = nn.Identity()
    if state is not None:
        model.load_state_dict(state)
    return model
