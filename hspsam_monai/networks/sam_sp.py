"""SAM-SP: the first prediction becomes the prompt of the second (arXiv 2408.12364).

    E = encoder(x);  y0 = decoder(E, nothing);  prompt = box of y0;  y1 = decoder(E, prompt)

The paper's figure shows one such step; ``steps`` makes it any number S. Where the paper is silent, the choices are
ours: the decoder's weights are shared by all passes, the encoder's neck is trained beside LoRA, no gradient flows
through a prompt, an empty prediction gives no prompt, and several classes are several objects with one learned token
each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders import Encoded, build_encoder
from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.adaptation import set_adaptation
from hspsam_monai.networks.arguments import check_arguments
from hspsam_monai.networks.corrections import objects_of, one_more_mark, with_mistakes
from hspsam_monai.networks.layers import resize
from hspsam_monai.networks.sam_decoder import WIDTH, Prompts, SAMDecoder
from hspsam_monai.networks.self_prompts import KINDS, self_prompts
from hspsam_monai.networks.stored import level_names


class SAMSPOutput(NamedTuple):
    """What training sees, all of it logits (B, K, H, W).

    Attributes:
        logits: of the last automatic pass.
        passes: of every automatic pass, first to last.
        corrected: after each of a simulated person's corrections.
    """

    logits: Tensor
    passes: list[Tensor]
    corrected: tuple[Tensor, ...] = ()


class SAMSP(nn.Module):
    """SAM that prompts itself with its own first prediction.

    Args:
        encoder: name of the image encoder.
        image_size: nominal side of the square input.
        num_classes: K, background first. Two classes are SAM as it is; more give each foreground class a learned
            token that tells the shared decoder which object is meant.
        steps: S self-prompting passes after the unprompted one; 0 is plain fine-tuned SAM.
        prompt: what a prediction becomes: any of ``box`` (paper), ``mask``, ``points``.
        points: points an object for the prompt ``points``.
        box_jitter: in training, each side of a box moves by up to so many pixels of the input.
        corrections: in training, how many marks a simulated person adds to the automatic mask, one after the other
            (:mod:`~hspsam_monai.networks.corrections`); the loss learns from what each gives. 0 (paper) leaves a
            network that hardly follows a person's marks. Needs the truth, see :meth:`forward`.
        adapt: what of the encoder is trained: ``lora`` (paper; SAM's own neck is trained with it, which is ours, since
            the decoder that reads it is trained too), ``full``, ``frozen`` (nothing, not even its neck). Prompt encoder
            and mask decoder are always trained.
        lora_rank: rank of the updates.
        dropout: probability of dropping channels of the embedding, in train mode only.
        checkpointing: recompute the blocks of SAM's ViT in the backward pass, to save memory.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: str = "sam_vit_b",
        image_size: int = 512,
        num_classes: int = 2,
        steps: int = 1,
        prompt: tuple[str, ...] | list[str] | str = ("box",),
        points: int = 1,
        box_jitter: float = 0.0,
        corrections: int = 0,
        adapt: str = "lora",
        lora_rank: int = 4,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        kinds = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        check_arguments(num_classes, dropout)
        if points < 1:
            raise ConfigError(f"points is {points}; expected 1 or more.")
        if steps < 0:
            raise ConfigError(f"steps is {steps}; expected 0 or more.")
        if corrections < 0:
            raise ConfigError(f"corrections is {corrections}; expected 0 or more.")
        if steps and (not kinds or any(kind not in KINDS for kind in kinds)):
            raise ConfigError(f"prompt is {prompt!r}; expected some of {', '.join(KINDS)}.")
        self.encoder = build_encoder(
            encoder,
            image_size=image_size,
            lora_rank=lora_rank if adapt == "lora" else 0,
            checkpointing=checkpointing,
        )
        # The decoder works at a quarter of the embedding's stride: 4 pixels for SAM, 1 for LiteMedSAM.
        self.sam = SAMDecoder(stride=self.encoder.levels[-1].stride)
        self.classes = nn.Parameter(torch.randn(num_classes - 1, WIDTH)) if num_classes > 2 else None
        self.image_size, self.num_classes, self.steps = image_size, num_classes, steps
        self.prompt, self.points, self.box_jitter, self.dropout = kinds, points, box_jitter, dropout
        self.corrections = corrections
        set_adaptation(self.encoder, adapt)
        if adapt == "frozen":
            self.encoder.requires_grad_(False)
        # Three-mask output and its quality are not used, and points only where they prompt.
        for parameter in self.sam.mask_decoder.iou_prediction_head.parameters():
            parameter.requires_grad_(False)

    @property
    def stored(self) -> tuple[str, ...]:
        """What :meth:`decode` reads, see :mod:`hspsam_monai.networks.stored`: SAM's neck is trained, so its input."""
        return level_names(self.encoder)[-1:]

    def encode(self, image: Tensor) -> Encoded:
        """The encoder's part of the forward pass, on (B, 3, H, W) in [0, 1]."""
        return Encoded(self.encoder(image), tuple(image.shape[-2:]))

    def forward(
        self, image: Tensor | Encoded, prompts: Prompts | None = None, truth: Tensor | None = None
    ) -> Tensor | SAMSPOutput:
        """Segment a batch.

        Args:
            image: (B, 3, H, W) in [0, 1], H and W multiples of 32; or what :meth:`encode` made of it.
            prompts: what a person adds afterwards, of B images with K - 1 objects, in pixels of ``image``
                (:func:`~hspsam_monai.networks.user_prompts.user_prompts` makes them of clicks, boxes and scribbles).
                One more pass then refines the automatic masks of the objects that have some.
            truth: class indices (B, 1, H, W) that training with ``corrections`` takes a simulated person's marks
                from. MONAI's ``PrepareBatchExtraInput({"truth": "label"})`` hands it over.

        Raises:
            ConfigError: prompts of another number of images or objects; training with corrections and no truth.

        Returns:
            In evaluation logits (B, K, H, W), float32. In training :class:`SAMSPOutput`.
        """
        return self.decode(image if isinstance(image, Encoded) else self.encode(image), prompts, truth)

    def decode(
        self, encoded: Encoded, prompts: Prompts | None = None, truth: Tensor | None = None
    ) -> Tensor | SAMSPOutput:
        """The rest of the forward pass: every pass of the decoder."""
        embedding = self.encoder.embedding_of(encoded.features)
        if self.dropout and self.training:
            embedding = F.dropout2d(embedding, self.dropout)
        masks = [self._decode(embedding, None)]
        stride = self.sam.stride / 4
        for _ in range(self.steps):
            own = self_prompts(masks[-1], self.prompt, stride, self.points)
            if self.training and self.box_jitter and own.boxes is not None:
                noise = (torch.rand_like(own.boxes) * 2 - 1) * self.box_jitter
                own = own._replace(boxes=own.boxes + noise)
            masks.append(self._decode(embedding, own))
        if prompts is not None and prompts.shape() is not None:
            if prompts.shape() != tuple(masks[-1].shape[:2]):
                raise ConfigError(
                    f"The prompts are for {prompts.shape()} (images, objects); expected {tuple(masks[-1].shape[:2])}, "
                    "one set for each foreground class of each image."
                )
            # A person's marks are made where the mouse is.
            masks.append(self._refine(embedding, masks[-1], prompts.to(embedding.device)))
        size = encoded.size
        if not self.training:
            return self._logits(masks[-1], size)
        corrected: list[Tensor] = []
        if self.corrections:
            if truth is None:
                raise ConfigError(
                    "SAMSP is trained with corrections and was given no truth. Hand the label over: "
                    '"train::trainer::prepare_batch": {"_target_": "PrepareBatchExtraInput", "extra_keys": '
                    '{"truth": "label"}} (on stored features "$hspsam_monai.training.stored_batch_with_truth"); or set '
                    "network_def::corrections to 0."
                )
            wanted = objects_of(truth, self.num_classes - 1, tuple(masks[-1].shape[-2:]))
            marks, start = None, with_mistakes(masks[-1])
            for _ in range(self.corrections):
                seen = corrected[-1].detach() if corrected else start
                marks = one_more_mark(marks, seen, wanted, stride)
                corrected.append(self._refine(embedding, start, marks))
        passes = [self._logits(mask, size) for mask in masks]
        return SAMSPOutput(passes[-1], passes, tuple(self._logits(mask, size) for mask in corrected))

    def _refine(self, embedding: Tensor, mask: Tensor, marks: Prompts) -> Tensor:
        """One more pass with marks on the automatic mask (B, K - 1, h, w); what nobody touched stays as it was."""
        # SAM's way of refining: the mask so far goes in with the new click.
        found = (mask > 0).flatten(2).any(-1)
        given = marks if marks.masks is not None else marks._replace(masks=mask.detach(), has_mask=found)
        return torch.where(marks.present()[..., None, None], self._decode(embedding, given), mask)

    def _decode(self, embedding: Tensor, prompts: Prompts | None) -> Tensor:
        """One pass: mask logits (B, K - 1, h, w)."""
        if self.classes is None:
            return self.sam(embedding, prompts)[0][:, :, 0]
        objects, batch = self.num_classes - 1, embedding.shape[0]
        tokens = self.classes[None].expand(batch, -1, -1).reshape(batch * objects, 1, WIDTH)
        valid = torch.ones(batch * objects, 1, dtype=torch.bool, device=embedding.device)
        dense = self.sam.prompt_encoder.no_mask_embed.weight.view(1, WIDTH, 1, 1)
        if prompts is not None:
            sparse, present, dense = self.sam.embed(prompts, tuple(embedding.shape[-2:]))
            tokens, valid = torch.cat([tokens, sparse], dim=1), torch.cat([valid, present], dim=1)
        return self.sam.decode(embedding, tokens, valid, dense, objects)[0][:, :, 0]

    @staticmethod
    def _logits(masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Mask logits (B, K - 1, h, w) -> class logits (B, K, H, W): background is 0, so two classes are a sigmoid."""
        masks = resize(masks.float(), size)
        return torch.cat([torch.zeros_like(masks[:, :1]), masks], dim=1)

    @torch.no_grad()
    def load_sam(self, state: dict[str, Tensor]) -> list[str]:
        """Take prompt encoder and mask decoder from SAM's own state; returns the keys used."""
        parts = {k: v for k, v in state.items() if k.startswith(("prompt_encoder.", "mask_decoder."))}
        if parts:
            self.sam.load_state_dict(parts)
        return list(parts)
