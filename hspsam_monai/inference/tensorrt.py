"""The image encoder in TensorRT through MONAI's ``trt_compile``, where TensorRT is; and a clear word which one runs.

``trt_compile`` takes modules with tensors in and tensors out. Our encoder takes a list of prompts with gaps and returns
:class:`Features`, so an engine of the right form is put inside it: image in, flat tensors out, the learned prompts
being constants. ``trt_compile`` also wraps every norm in a cast, which hides the statistics that our folded
convolutions read; the engine therefore refers to the encoder without registering it as a child.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks import trt_compile
from torch import Tensor, nn

from hspsam_monai.encoders import Features
from hspsam_monai.encoders.lora import merge_lora
from hspsam_monai.errors import ConfigError

logger = logging.getLogger(__name__)

#: float16 is not offered: SAM turns to NaN in it silently.
PRECISIONS = ("fp32", "tf32", "bf16")


class EncoderEngine(nn.Module):
    """An encoder as ``trt_compile`` and ONNX want it: (B, 3, H, W) in, the present tensors of its Features out.

    Args:
        encoder: in evaluation mode, with its final weights; not registered as a child.
        prompts: learned prompts of each level, (P, D_l) or ``None``; constants from now on.
    """

    def __init__(self, encoder: nn.Module, prompts: Sequence[Tensor | None] | None) -> None:
        super().__init__()
        self._encoder = (encoder,)
        self._prompts = None if prompts is None else [None if p is None else p.detach() for p in prompts]
        side = encoder.multiple
        with torch.no_grad():
            features = self._encode(encoder.pixel_mean.new_zeros(1, 3, side, side))
        self._present = [[value is not None for value in group] for group in _groups(features)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode (B, 3, H, W) in [0, 1]: levels, embedding and tokens in this order, without what is absent."""
        return tuple(value for group in _groups(self._encode(image)) for value in group if value is not None)

    def features(self, flat: Sequence[Tensor]) -> Features:
        """Undo the flattening of :meth:`forward`."""
        values = iter(flat)
        levels, embedding, tokens = ([next(values) if here else None for here in group] for group in self._present)
        return Features(levels, embedding[0], tokens)

    def _encode(self, image: Tensor) -> Features:
        encoder = self._encoder[0]
        return type(encoder).forward(encoder, image, self._prompts)


def compile_encoder(
    network: nn.Module,
    model: str | Path,
    precision: str = "tf32",
    batch: Sequence[int] = (1, 1, 8),
    image_size: int | None = None,
) -> bool:
    """Let the network's image encoder run in TensorRT, in place; without TensorRT PyTorch runs it as before.

    The engine is built at the first image (minutes) and kept beside the model as
    ``MODEL.PRECISION-SIZE-BATCH-HASH.encoder.engine.plan``: other weights, another size or another largest batch get an
    engine of their own. Call it after the weights are loaded and the network is on its device. In either case LoRA is
    merged and the encoder takes no gradients any more.

    Args:
        network: with an ``encoder``, in evaluation mode; its prompts are taken from ``prompter`` if it has one.
        model: the checkpoint; its folder must be writable where TensorRT is.
        precision: ``fp32``, ``tf32`` or ``bf16``.
        batch: least, usual and largest batch.
        image_size: side of the images the engine will see; ``None``: the network's own.

    Returns:
        Whether TensorRT runs; the log says it too.

    Raises:
        ConfigError: the precision is not one of these.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"TensorRT precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    network.eval()
    encoder = network.encoder
    merge_lora(encoder)
    prompts = network.prompter.encoder_prompts() if hasattr(network, "prompter") else None
    encoder.engine = EncoderEngine(encoder.requires_grad_(False), prompts)
    options: dict[str, Any] = {
        "precision": precision,
        "dynamic_batchsize": list(batch),
        "timestamp": int(Path(model).stat().st_mtime) if Path(model).is_file() else None,
    }
    options = {key: value for key, value in options.items() if value is not None}
    size = network.image_size if image_size is None else image_size
    base = f"{model}.{precision}-{size}-{'-'.join(map(str, batch))}-{_content(network)}"
    trt_compile(network, base, args=options, submodule=["encoder.engine"])
    if not hasattr(encoder.engine, "_trt_compiler"):
        del encoder.engine
        logger.warning("TensorRT is not available here: the plain PyTorch model runs.")
        return False
    encoder.forward = _through_engine(encoder)
    logger.info("TensorRT runs the image encoder (%s, batch %s).", precision, " to ".join(map(str, batch[::2])))
    return True


def _through_engine(encoder: nn.Module) -> Any:
    lock = threading.Lock()

    def forward(image: Tensor, prompts: Any = None) -> Features:
        # The prompts are constants of the engine. It answers in buffers that the next call overwrites.
        with lock:
            flat = [value.clone() for value in encoder.engine(image.contiguous())]
        return encoder.engine.features(flat)

    return forward


def _content(network: nn.Module) -> str:
    """What tells an engine's weights and prompts: eight digits of their hash."""
    digest = hashlib.sha256()
    for part in (network.encoder, getattr(network, "prompter", None)):
        for name, value in sorted(part.state_dict().items()) if part is not None else ():
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)  # NumPy has no bfloat16
            digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:8]


def _groups(features: Features) -> list[list[Tensor | None]]:
    return [list(features.levels), [features.embedding], list(features.tokens)]
