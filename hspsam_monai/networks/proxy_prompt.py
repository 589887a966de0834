"""Proxy Prompt: a few images with masks prompt a frozen SAM (arXiv 2502.03501).

    F_x, F_sup = encoder(image), encoder(supports)                    frozen
    supports' masks + images, F_sup -> CSM -> values that know the mask -> E_ctx, what they say of each target cell
    F_x, E_ctx -> CCM -> proxy tokens (N objects x hw/16 x 256) -> SAM's mask decoder, in place of a click      frozen
    F_x, E_ctx -> dense prompt (N objects x 256 x h x w) -> the same, in place of a mask
    SAM's mask, share of mask in the support cells most alike -> what the generator says
    levels, F_x, supports' linear rules -> what the readout says; both -> mask

Encoder and decoder are frozen; the rest learns. What depends on the supports alone is computed once
(:meth:`ProxyPrompt.set_context`) and kept in the state dict; another task is another context, not another training.

The boxes of the paper's figure are :mod:`contextual_selection` (CSM) and :mod:`contextual_colorization` (CCM);
:mod:`dense_prompt`, :mod:`share_prior` and :mod:`linear_readout` are ours and can be left out.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hspsam_monai.encoders import Encoded, build_encoder
from hspsam_monai.encoders.constants import is_fake, probe
from hspsam_monai.encoders.state_files import read_state, write_state
from hspsam_monai.errors import ConfigError, WeightsError
from hspsam_monai.networks.arguments import check_arguments
from hspsam_monai.networks.contextual_colorization import ContextualColorizationModule
from hspsam_monai.networks.contextual_selection import (
    Context,
    ContextualSelectiveModule,
    choose_cells,
    unit_cells,
)
from hspsam_monai.networks.dense_prompt import DensePrompt
from hspsam_monai.networks.layers import resize
from hspsam_monai.networks.linear_readout import ReadoutFit, read_out, readout_levels, readout_width
from hspsam_monai.networks.sam_decoder import WIDTH, SAMDecoder
from hspsam_monai.networks.share_prior import SharePrior
from hspsam_monai.networks.stored import level_names
from hspsam_monai.networks.supports import checked, objects_of
from hspsam_monai.transforms import fit_image

logger = logging.getLogger(__name__)

#: A target whose :meth:`ProxyPrompt.similarity` is below this is at least twice as far from the supports as they
#: are from each other: warn.
FAR = 0.5

#: Names of the buffers that are the context.
CONTEXT = ("context_keys", "context_values", "context_rules", "context_reference", "context_print")

#: Weight of the generator's logits beside the readout's. Dice on eleven tasks, four of them unseen by the generator,
#: with 1, 4 and 16 supports: 0.417, 0.566, 0.652 at 1; 0.442, 0.575, 0.682 at 1/2; 0.452, 0.571, 0.695 at 1/4; 0.446,
#: 0.543, 0.699 at 0 (the shipped generator, before the readout's threshold had its prior).
GENERATOR_SHARE = 0.25

_CALIBRATORS = 16  # supports that stand in as targets when the reference distance is measured
_COPY = 1e-3  # below this a support is another once more, and says nothing of how far apart they are
#: Reference of one support alone, which cannot tell how far apart a task's images are: what lies between two images of
#: one task, median 0.10 to 0.18 on Kvasir, ISIC and BUSI; to those of the other two it is 0.22 to 0.28.
_ALONE = 0.12
_LEAST_DISTANCE = 0.02  # copies among the supports must not make every other image look far


class ProxyPrompt(nn.Module):
    """A frozen SAM prompted by examples.

    Args:
        encoder: name of the image encoder.
        image_size: side of the square to which supports are brought, and nominal side of the input.
        num_classes: K, background first; the N = K - 1 others are segmented at once, each as one object.
        value_width: C^v of the support encoder.
        mamba_depth: its Vision Mamba blocks.
        mamba_state: numbers their scan remembers per channel.
        top_k: support cells that speak for each target cell.
        heads: of the cross-attentions.
        ffn_width: inside their feed-forward layers (1024 would be usual; 256 keeps inference
            near the encoder's own cost and a shipped model small).
        dense: the context is also SAM's dense prompt (:class:`DensePrompt`); ``False`` for SAM's "no mask" in its
            place, as the paper's figure may be read.
        prior: SAM's mask corrects what the supports' masks say of each cell (:class:`SharePrior`); ``False`` for
            SAM's mask alone, as in the paper.
        readout: to that is added what a linear rule of the supports says (:mod:`linear_readout`); ``False`` as in the
            paper.
        dropout: probability of dropping channels of the context, in train mode only.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: str = "mobile_sam",
        image_size: int = 512,
        num_classes: int = 2,
        value_width: int = 192,
        mamba_depth: int = 2,
        mamba_state: int = 8,
        top_k: int = 32,
        heads: int = 8,
        ffn_width: int = 256,
        dense: bool = True,
        prior: bool = True,
        readout: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_arguments(num_classes, dropout)
        for name, value in (("value_width", value_width), ("mamba_depth", mamba_depth), ("mamba_state", mamba_state),
                            ("top_k", top_k), ("heads", heads), ("ffn_width", ffn_width)):  # fmt: skip
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more.")
        if WIDTH // 2 % heads:
            raise ConfigError(f"heads is {heads}; expected a divisor of {WIDTH // 2}, the width of the attention.")
        self.encoder = build_encoder(encoder, image_size=image_size)
        stride = self.encoder.levels[-1].stride
        self.sam = SAMDecoder(stride=stride)
        for part in (self.encoder, self.sam):
            part.requires_grad_(False)
        self.csm = ContextualSelectiveModule(WIDTH, value_width, stride, mamba_depth, mamba_state, top_k)
        self.ccm = ContextualColorizationModule(WIDTH, heads, ffn_width)
        self.dense = DensePrompt(WIDTH) if dense else None
        self.prior = SharePrior() if prior else None
        self.readout = readout
        self.encoder_name, self.image_size, self.num_classes, self.dropout = encoder, image_size, num_classes, dropout
        self._rule = readout_width(self.encoder)
        self._checked: tuple | None = None
        # Empty, not absent: a moving average pairs its buffers with the network's by their order.
        for name, value in self.no_context().items():
            self.register_buffer(name, value)

    @property
    def stored(self) -> tuple[str, ...]:
        """What :meth:`decode` reads, see :mod:`hspsam_monai.networks.stored`."""
        return (*level_names(self.encoder)[1:], "embedding") if self.readout else ("embedding",)

    def encode(self, image: Tensor) -> Encoded:
        """The encoder's part of the forward pass, on (B, 3, H, W) in [0, 1]; frozen."""
        with torch.no_grad():
            return Encoded(self.encoder(image), tuple(image.shape[-2:]))

    def forward(
        self,
        image: Tensor | Encoded,
        support_images: Tensor | None = None,
        support_masks: Tensor | None = None,
        support_encoded: Encoded | None = None,
    ) -> Tensor:
        """Segment a batch by its own supports, or by the stored context.

        Args:
            image: (B, 3, H, W) in [0, 1], H and W multiples of 32; or what :meth:`encode` made of it.
            support_images: (B, K, 3, H', W') in [0, 1], any K >= 1 and any size; ``None`` for the stored context.
            support_masks: (B, K, H', W') class indices. Their values are trusted here (``set_context`` checks them).
            support_encoded: what :meth:`encode` made of the support images, batch and supports in one axis (B K); they
                are of the network's size then.

        Returns:
            Logits (B, K_classes, H, W), float32; background is 0.

        Raises:
            ConfigError: no supports and no context, shapes that disagree, or a context of other weights.
        """
        if (support_images is None) != (support_masks is None):
            raise ConfigError("Support images need support masks, and masks need images: pass both or neither.")
        if support_images is None:
            context = self._stored()
        else:
            fits = [ReadoutFit() for _ in support_images]
            keys, values = self._read(support_images, support_masks, fits, support_encoded)
            context = Context(keys, values, torch.stack([fit.solve() for fit in fits]) if self.readout else None)
        return self.decode(image if isinstance(image, Encoded) else self.encode(image), context)

    def decode(self, encoded: Encoded, context: Context) -> Tensor:
        """The rest of the forward pass, from the target's features and a context of (1 or B, ...)."""
        features, size = self.encoder.embedding_of(encoded.features), encoded.size
        if len(context.keys) not in (1, len(features)):
            raise ConfigError(
                f"Supports are given for {len(context.keys)} images, and {len(features)} images to segment."
            )
        e, share = self.csm(features, context)
        if self.dropout and self.training:
            e = F.dropout2d(e.flatten(0, 1), self.dropout).unflatten(0, e.shape[:2])
        position = self.sam.prompt_encoder.pe_layer(tuple(features.shape[-2:])).to(features.dtype)
        tokens = self.ccm(features, e, position)
        prompt = self.sam.prompt_encoder.no_mask_embed.weight.view(1, WIDTH, 1, 1)
        if self.dense is not None:
            prompt = prompt + self.dense(features, e, share).flatten(0, 1)
        masks = self.sam.decode(features, tokens, None, prompt, self.num_classes - 1)[0][:, :, 0]
        if self.prior is not None:
            masks = self.prior(masks, share)
        if context.rules is not None:
            known = read_out(readout_levels(self.encoder, encoded.features), context.rules)
            masks = resize(known, tuple(masks.shape[-2:])) + GENERATOR_SHARE * masks.float()
        masks = resize(masks.float(), size)
        return torch.cat([torch.zeros_like(masks[:, :1]), masks], dim=1)

    def _embed(self, image: Tensor) -> Tensor:
        """F (B, C, h, w), frozen."""
        return self.encoder.embedding_of(self.encode(image).features)

    def _read(
        self, images: Tensor, masks: Tensor, fits: Sequence[ReadoutFit], encoded: Encoded | None = None
    ) -> tuple[Tensor, Tensor]:
        """Supports (B, K, 3, H, W) with masks (B, K, H, W) -> their keys and values; each of B fits takes its own."""
        if images.ndim != 5 or images.shape[2] != 3 or masks.shape != images[:, :, 0].shape or not images.shape[1]:
            raise ConfigError(
                f"Support images have shape {tuple(images.shape)} and masks {tuple(masks.shape)}; expected "
                "(B, K, 3, H, W) and (B, K, H, W) with K of at least 1. Repeat a grey image over three channels."
            )
        batch = images.shape[0]
        images = fit_image(images.flatten(0, 1), self.image_size)
        objects = objects_of(masks.flatten(0, 1), self.num_classes, self.image_size).to(images.dtype)
        encoded = self.encode(images) if encoded is None else encoded
        features = self.encoder.embedding_of(encoded.features)
        values = self.csm.aggregate(images, objects, features).unflatten(0, (batch, -1))  # (B, K, N, C + 1, h, w)
        values = values.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
        keys = unit_cells(features).unflatten(0, (batch, -1)).flatten(1, 2)
        if self.readout:
            levels = readout_levels(self.encoder, encoded.features)
            for index in range(len(images)):
                fits[index * batch // len(images)].add([level[index, None] for level in levels], objects[index])
        return keys, values.float()

    # -- the stored context

    @torch.no_grad()
    def set_context(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor],
        max_cells: int | None = 4096,
    ) -> None:
        """Compute the context of K supports and keep it; it is saved with the network.

        Args:
            images: K images (3, H, W) in [0, 1]; each may have its own size, all are brought to ``image_size``.
            masks: K masks (H, W) or (1, H, W) of class indices, each of its image's size.
            max_cells: keep at most so many support cells, chosen by
                :func:`~hspsam_monai.networks.contextual_selection.choose_cells`, so that a target costs the same
                however many supports there are; 4096 are all of four supports at 512 pixels. ``None`` keeps all.

        Raises:
            ConfigError: no support, numbers or shapes that disagree, a grey image, ``max_cells`` below two for each
                object.
            DataError: values out of range, a mask without any object, a class that no support shows.

        Cost: K times encoder and support encoder, one after another; then min(K, 16) K (h w)^2 C for the reference,
        and for the rules about 2 K products and up to 17 N equations, both of all levels' channels.
        """
        least = 2 * (self.num_classes - 1)  # of each object one, and as many of the background
        if max_cells is not None and max_cells < least:
            raise ConfigError(f"max_cells is {max_cells}; expected {least} or more, or None for all.")
        supports = self.check_supports(images, masks)
        fit = ReadoutFit()
        parts = [self._read(image[None, None], mask[None, None], [fit]) for image, mask in supports]
        keys, values = (torch.cat([each[0] for each in part]) for part in zip(*parts, strict=True))
        rules = fit.solve() if self.readout else self.no_context()["context_rules"]
        cells = len(keys) // len(supports)
        shares = values.unflatten(1, (-1, WIDTH + 1))[..., -1]
        keep = choose_cells(keys, shares, len(keys) if max_cells is None else max_cells)
        distances: list[Tensor] = []
        if len(supports) > 1:  # each in turn is a target of what is kept of the others
            each = keys.split(cells)[:_CALIBRATORS]
            others = [keep[keep // cells != index] for index in range(len(each))]
            distances = [_distance(own, keys[rest]) for own, rest in zip(each, others, strict=True) if len(rest)]
            distances = [distance for distance in distances if distance > _COPY]
        if not distances:  # one support, or its copies
            distances = [keys.new_tensor(_ALONE)]
        reference = torch.stack(distances).median()[None].clamp_min(_LEAST_DISTANCE)
        with torch.inference_mode(False):  # copies that a later pass with gradients may save
            self.context_keys, self.context_values = keys[keep].clone(), values[keep].clone()
            self.context_rules, self.context_reference = rules.to(keys.device, copy=True), reference.clone()
            self.context_print = self.fingerprint().to(keys.device).clone()
        self._checked = self._versions()

    def clear_context(self) -> None:
        """Forget the stored context."""
        for name, value in self.no_context().items():
            setattr(self, name, value.to(self.csm.patch.weight.device))

    @torch.no_grad()
    def similarity(self, image: Tensor) -> Tensor:
        """How close each target is to the stored supports.

        The distance of an image to the supports is 1 - the mean over its cells of the best cosine similarity of a
        support's cell. The answer is the supports' own leave-one-out distance (median, stored with the context)
        divided by the target's: 1 is as close as the supports are to each other, 0.5 twice as far. Of one support a
        usual distance stands for its own. Below :data:`FAR` the supports say little about the image and the user should
        be warned. The other way round is not asked: a blank image is close to supports with blank parts.

        Args:
            image: (B, 3, H, W) in [0, 1], H and W multiples of 32.

        Returns:
            (B,) in (0, 1].
        """
        return self.closeness(self._embed(image))

    @torch.no_grad()
    def closeness(self, features: Tensor) -> Tensor:
        """:meth:`similarity` of images whose features F (B, C, h, w) are known already: (B,) in (0, 1]."""
        context = self._stored()
        distances = [_distance(cells, context.keys[0]) for cells in unit_cells(features)]
        return (self.context_reference.float() / torch.stack(distances).clamp_min(1e-6)).clamp_max(1)

    def on_features(self, listener: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``listener`` with F (B, C, h, w) of what is segmented, so that :meth:`closeness` costs no encoder pass.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        return self.csm.register_forward_pre_hook(lambda _module, given: listener(given[0]))

    def save_context(self, path: str | Path) -> Path:
        """Write the context alone (``.pt`` or ``.safetensors``), to switch tasks without another model file."""
        self._stored()
        return write_state(path, {name: getattr(self, name) for name in CONTEXT})

    def load_context(self, path: str | Path) -> None:
        """Take a context that this very network made.

        Raises:
            WeightsError: unreadable, not a context, of another number of classes, or made by other weights; the
                context is then as it was.
        """
        state = read_state(path)
        needed = [name for name in CONTEXT if self.readout or name != "context_rules"]
        missing = [name for name in needed if name not in state or not state[name].numel()]
        if missing:
            older = " with the linear readout. Make the context again with this network" * (
                missing == ["context_rules"]
            )
            raise WeightsError(f"{path} lacks {', '.join(missing)}; expected a file that save_context wrote{older}.")
        before = {name: getattr(self, name) for name in CONTEXT}
        try:
            self.fit_state(state)
            for name in CONTEXT:
                getattr(self, name).copy_(state[name])
            self._check_print(WeightsError, str(path))
        except WeightsError:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def fit_state(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Make room for the context that ``state`` holds, or forget the own where it holds none.

        Its size depends on the supports; called before a state is matched with the network. What ``state`` lacks of a
        context is added to it, empty: the networks of older files had no rules. A whole context that lacks rules is
        emptied, too, with a warning, since the weights beside it are of use.
        """
        device = self.csm.patch.weight.device
        values = state.get(prefix + "context_values")
        objects, width = self.num_classes - 1, WIDTH + 1
        if values is not None and values.shape[-1] != objects * width:
            raise WeightsError(
                f"The context holds {values.shape[-1]} numbers for each support cell; expected {width} for each object "
                f"of the network ({objects}): {objects * width}. Make the context again with this network."
            )
        rules = state.get(prefix + "context_rules")
        if values is not None and len(values) and self.readout and (rules is None or not rules.numel()):
            logger.warning(
                "The context in the file is left out: it was made before ProxyPrompt had its linear readout, or "
                "without (readout=False). Make it again with this network (hspsam context, set_context)."
            )
            state.update({prefix + name: empty for name, empty in self.no_context().items()})
        elif self.readout and rules is not None and rules.numel() and tuple(rules.shape) != (objects, self._rule):
            raise WeightsError(
                f"The context holds rules of shape {tuple(rules.shape)}; expected {(objects, self._rule)}. Make the "
                "context again with this network."
            )
        for name, empty in self.no_context().items():
            shape = state.setdefault(prefix + name, empty).shape
            setattr(self, name, torch.zeros(shape, dtype=empty.dtype, device=device))
        self._checked = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProxyPrompt:
        """Another number type rounds the weights, and the context stays theirs."""
        before = self.csm.patch.weight.dtype
        fits = bool(len(self.context_keys)) and not is_fake(self.csm.patch.weight) and self._fits()
        super()._apply(fn, recurse)
        if fits and self.csm.patch.weight.dtype != before:
            self.context_print = self.fingerprint().to(self.context_print.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        self.fit_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def no_context(self) -> dict[str, Tensor]:
        """Every buffer of the context with no support in it, as in a state dict."""
        cells = (torch.zeros(0, WIDTH), torch.zeros(0, (self.num_classes - 1) * (WIDTH + 1)), torch.zeros(0, 0))
        return dict(zip(CONTEXT, (*cells, torch.zeros(0), torch.zeros(0, dtype=torch.uint8)), strict=True))

    def _stored(self) -> Context:
        if not len(self.context_keys):
            raise ConfigError(
                "ProxyPrompt has no context: call set_context(images, masks) once (hspsam segment --support DIR), or "
                "pass support_images and support_masks with the image."
            )
        if not torch.compiler.is_compiling() and self._checked != self._versions():
            self._check_print(ConfigError, "The stored context")
            self._checked = self._versions()
        rules = self.context_rules.float()[None] if self.readout else None
        return Context(self.context_keys.float()[None], self.context_values.float()[None], rules)

    def _fits(self) -> bool:
        return torch.equal(self.context_print.cpu(), self.fingerprint())

    def _check_print(self, error: type[Exception], what: str) -> None:
        if not self._fits():
            raise error(
                f"{what} was made by other weights (encoder {self.encoder_name!r} at {self.image_size} pixels was "
                "expected, with this network's generator): make it again with set_context(images, masks)."
            )

    def _printed(self) -> list[Tensor]:
        """Tensors that tell whether a context fits: three of the encoder's, all of CSM's."""
        encoder = list(self.encoder.parameters())
        return [encoder[0], encoder[len(encoder) // 2], encoder[-1], *self.csm.parameters()]

    def fingerprint(self) -> Tensor:
        """Sha256 (32,) uint8 of what a context depends on, on the CPU.

        Values are rounded to float16 first, so that a model stored in half precision keeps its contexts.
        """
        digest = hashlib.sha256(f"{self.encoder_name} {self.image_size}".encode())
        for tensor in self._printed():
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def _versions(self) -> tuple:
        """Changes whenever one of the printed tensors is written to, at no cost.

        Writing to tensors made under ``inference_mode`` leaves no trace, nor does a fused optimiser, so with them and
        while gradients are on no two calls are equal; other such writes: see
        :class:`~hspsam_monai.encoders.constants.Constants`.
        """
        return tuple(
            (t.data_ptr(), object() if t.is_inference() or torch.is_grad_enabled() else t._version, probe(t))
            for t in self._printed()
        )

    def check_supports(
        self, images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Look through supports as :meth:`set_context` does, see :func:`~hspsam_monai.networks.supports.checked`."""
        return checked(images, masks, self.num_classes, self.csm.patch.weight)

    @torch.no_grad()
    def load_sam(self, state: dict[str, Tensor]) -> list[str]:
        """Take prompt encoder and mask decoder from SAM's own state; returns the keys used."""
        parts = {k: v for k, v in state.items() if k.startswith(("prompt_encoder.", "mask_decoder."))}
        if parts:
            self.sam.load_state_dict(parts)
        return list(parts)


def _distance(cells: Tensor, keys: Tensor) -> Tensor:
    """1 - mean over cells (Q, C) of the best cosine similarity among keys (M, C); both unit vectors."""
    return 1 - (cells @ keys.T).amax(1).mean()
