"""One inferer for 2-D images, shared by the bundle, the command line, MONAI Label and DICOM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import cycle, islice
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor
from torch.nn import functional as F

from hspsam_monai.encoders import Encoded
from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.sam_decoder import ABSENT, Prompts
from hspsam_monai.networks.stored import encoded_of
from hspsam_monai.transforms import fit_image

PRECISIONS = ("auto", "float32", "bfloat16")

#: Dimensions turned round for each mirror image: itself, left-right, upside down, both.
_MIRRORS = ((), (-1,), (-2,), (-2, -1))
#: What the sides of an image must be a multiple of.
_STEP = 32
#: How far values may lie outside [0, 1], where interpolation overshoots or noise was added.
_RANGE_SLACK = 0.1


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """What to compute in: ``None`` for float32, or bfloat16. Never float16, in which SAM turns to NaN silently.

    Args:
        device: where the network runs.
        precision: ``float32``; ``bfloat16``; or ``auto``: bfloat16 where the device computes in it natively
            (CUDA from Ampere, CPUs with AVX-512 BF16 or AMX), else float32.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if capable else None
    return None


class ImageInferer(Inferer):
    """Resize to the network's size, run it, return logits at the input's own size.

    Everything happens on the input's device. The same object serves training (batches of the network's size pass
    straight through) and use (one image of any size).

    Args:
        image_size: side of the square the network works on, a multiple of 32; aspect ratio is not kept
            (paper). ``None`` sends images through as they are.
        precision: see :func:`autocast_dtype`.
        flips: average the probabilities over the four mirror images. Four times the work.
        scales: sides of the mirror images relative to ``image_size``, in turn, so that each may look at its own size:
            itself, left-right, upside down, both. Brought to the nearest multiple of 32; used with ``flips`` only.

    Returns from a call: float32 logits (B, K, H, W) at the input's H and W (log-probabilities if ``flips``). If
    the input is a ``MetaTensor`` so is the result, with the input's meta data.

    Raises:
        ConfigError: an unknown precision, an ``image_size`` that is no multiple of 32, a scale that is no number
            above 0, or scales without ``image_size``.
    """

    def __init__(
        self,
        image_size: int | None = None,
        precision: str = "auto",
        flips: bool = False,
        scales: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
        if image_size is not None and (
            not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1 or image_size % _STEP
        ):
            raise ConfigError(f"image_size is {image_size!r}; expected a whole multiple of {_STEP}, or None.")
        listed = isinstance(scales, Sequence) and not isinstance(scales, str)
        if not listed or not 1 <= len(scales) <= len(_MIRRORS) or not all(map(_is_scale, scales)):
            raise ConfigError(f"scales is {scales!r}; expected one to four numbers above 0, such as [1].")
        if image_size is None and any(scale != 1 for scale in scales):
            raise ConfigError(f"scales is {list(scales)}, but image_size is not set; scales are relative to it.")
        self.image_size, self.precision, self.flips, self.scales = image_size, precision, flips, tuple(scales)

    def __call__(
        self, inputs: Tensor | Encoded | Mapping[str, Tensor], network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Infer (B, 3, H, W) in [0, 1], or its features (:func:`encoded_of`); extra arguments go to the network.

        A person's marks (``prompts=``) are in pixels of the image given here, and are brought to the network's with it.

        Raises:
            ConfigError: mirror images are asked for, and only features or also a person's marks are given; marks that
                are not named or lie outside the image; an image of whole numbers or, on a CPU, of values that are not
                in [0, 1].
        """
        if any(isinstance(value, Prompts) for value in args):
            raise ConfigError("A person's marks were given by position; name them (prompts=...), then they are scaled.")
        if isinstance(inputs, Mapping):
            inputs = encoded_of(inputs)
        if isinstance(inputs, Encoded):
            if self.flips and not getattr(network, "training", False):
                raise ConfigError("Stored features have no mirror images; set flips to false, or give the images.")
            image, size = inputs, inputs.original or inputs.size
        else:
            image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
            size = tuple(image.shape[-2:])
            _require_unit_range(image, getattr(network, "training", False))
        marks = kwargs.get("prompts")
        marks = None if marks is None or marks.shape() is None else marks
        if marks is not None and self.flips and not getattr(network, "training", False):
            raise ConfigError("A person's marks have no mirror images; set flips to false.")
        if marks is not None:
            _require_inside(marks, size)
        if marks is not None and self.image_size is not None and not isinstance(image, Encoded):
            kwargs["prompts"] = marks.scaled(self.image_size / size[1], self.image_size / size[0])
        if self.flips and not getattr(network, "training", False):
            output = self._mirrored(image, network, *args, **kwargs)
        else:
            if self.image_size is not None and not isinstance(image, Encoded):
                image = fit_image(image, self.image_size)
            output = self._run(image, network, *args, **kwargs)
        if isinstance(output, tuple) and getattr(network, "training", False):
            return output  # a network's training losses read more than the logits
        logits = (output[0] if isinstance(output, tuple) else output).float()
        if tuple(logits.shape[-2:]) != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        if isinstance(inputs, MetaTensor) and not getattr(network, "training", False):
            logits = MetaTensor(logits, meta=inputs.meta)
        return logits

    def _mirrored(self, image: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Log of the mean probability of the mirror images, on the grid of the largest."""
        sides = [self._side(scale) for scale in islice(cycle(self.scales), len(_MIRRORS))]
        views = {side: image if side is None else fit_image(image, side) for side in sides}
        grid = max(tuple(view.shape[-2:]) for view in views.values())
        total: Tensor | None = None
        for dims, side in zip(_MIRRORS, sides, strict=True):
            view = views[side]
            output = self._run(view.flip(dims) if dims else view, network, *args, **kwargs)
            probability = (output[0] if isinstance(output, tuple) else output).float().softmax(1)
            probability = probability.flip(dims) if dims else probability
            if tuple(probability.shape[-2:]) != grid:
                probability = F.interpolate(probability, grid, mode="bilinear", align_corners=False)
            total = probability if total is None else total + probability
        return (total / len(_MIRRORS)).clamp_min(torch.finfo(torch.float32).tiny).log()

    def _side(self, scale: float) -> int | None:
        if self.image_size is None or scale == 1:
            return self.image_size
        return max(_STEP, round(self.image_size * scale / _STEP) * _STEP)

    def _run(self, image: Tensor | Encoded, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dtype = autocast_dtype(image.device, self.precision)
        with torch.autocast(image.device.type, dtype) if dtype is not None else nullcontext():
            return network(image, *args, **kwargs)


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _require_unit_range(image: Tensor, training: bool) -> None:
    """Refuse what a reader of 8-bit values gives; on other devices looking at values would stop the queue."""
    advice = "Divide 8-bit values by 255 (hspsam_monai.data.read_image does)."
    if not image.is_floating_point():
        raise ConfigError(f"The image holds {image.dtype}; expected floating point in [0, 1]. {advice}")
    if training or image.device.type != "cpu" or not image.numel():
        return
    low, high = (value.item() for value in image.aminmax())
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise ConfigError(f"The image holds values from {low:g} to {high:g}; expected [0, 1]. {advice}")


def _require_inside(marks: Prompts, size: tuple[int, int]) -> None:
    """Refuse unknown labels, points outside the image (H, W) and boxes that do not touch it (x and y exchanged)."""
    height, width = size
    advice = "x comes before y, in pixels of the image given."
    if marks.points is not None:
        wrong = [int(label) for label in marks.labels.unique() if label not in (1, 0, -1, ABSENT)]
        if wrong:
            raise ConfigError(f"A point has the label {wrong[0]}; expected 1 (on the object) or 0 (off it).")
        x, y = marks.points[marks.labels != ABSENT].float().cpu().unbind(-1)
        outside = (x < -1) | (y < -1) | (x > width) | (y > height)
        if outside.any():
            at = f"{x[outside][0].item():g}, {y[outside][0].item():g}"
            raise ConfigError(f"A mark is at x, y = {at}, outside an image {width} wide and {height} high; {advice}")
    if marks.boxes is not None:
        boxes = marks.boxes if marks.has_box is None else marks.boxes[marks.has_box]
        x0, y0, x1, y1 = boxes.float().cpu().flatten(0, -2).unbind(-1)
        outside = (x1 < 0) | (y1 < 0) | (x0 > width) | (y0 > height)
        if outside.any():
            at = ", ".join(f"{side[outside][0].item():g}" for side in (x0, y0, x1, y1))
            raise ConfigError(f"A box is {at}, outside an image {width} wide and {height} high; {advice}")
