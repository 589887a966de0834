"""Augmentation that imitates other hospitals' cameras and frames without the object.

A model trained on one hospital's endoscope meets other optics, light sources, processors and screen overlays.
Each effect here is one of those differences; strengths are drawn anew for every image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from torch import Tensor
from torch.nn import functional as F

from hspsam_monai.transforms.resize import plain


class RandCamera(RandomizableTransform):
    """One image as another camera would have taken it.

    Args:
        prob: probability that anything is changed at all.
        colour: probability of each colour effect (gain a channel, gamma, saturation, brightness and contrast).
        blur: probability of losing detail by down-sampling, up to 3 times.
        noise: probability of sensor noise, sd up to 0.04 of the range.
        vignette: probability of darkening towards the border.
        frame: probability of a black border: a circle, an octagon-like crop or bars.
        text: probability of burnt-in marks (bright or coloured glyph-like blocks near the border).

    Input and output: (3, H, W) float in [0, 1], on any device. The mask is untouched: what a frame or an inset hides is
    not removed from it by this class; :class:`RandCamerad` clears the label there.
    """

    def __init__(
        self,
        prob: float = 0.8,
        colour: float = 0.5,
        blur: float = 0.2,
        noise: float = 0.2,
        vignette: float = 0.25,
        frame: float = 0.25,
        text: float = 0.15,
    ) -> None:
        super().__init__(prob)
        self.colour, self.blur, self.noise = colour, blur, noise
        self.vignette, self.frame, self.text = vignette, frame, text

    def randomize(self, data: Any = None) -> None:
        """Draw which effects act and how strongly."""
        super().randomize(None)
        r = self.R
        on = {
            name: bool(r.rand() < getattr(self, group))
            for name, group in (
                ("gain", "colour"),
                ("gamma", "colour"),
                ("saturation", "colour"),
                ("contrast", "colour"),
                ("blur", "blur"),
                ("noise", "noise"),
                ("vignette", "vignette"),
                ("frame", "frame"),
                ("text", "text"),
            )
        }
        self._on = on
        self._gain = r.uniform(0.7, 1.3, 3)
        self._gamma = float(np.exp(r.uniform(np.log(0.6), np.log(1.7))))
        self._saturation = float(r.uniform(0.2, 1.6))
        self._contrast = (float(r.uniform(0.7, 1.35)), float(r.uniform(-0.12, 0.12)))
        self._blur = float(r.uniform(1.3, 3.0))
        self._noise = (float(r.uniform(0.005, 0.04)), int(r.randint(2**31)))
        self._vignette = (float(r.uniform(0.2, 0.8)), *(float(v) for v in r.uniform(-0.25, 0.25, 2)))
        self._frame = (
            str(r.choice(["circle", "octagon", "bars"])),
            float(r.uniform(0.82, 1.25)),
            *(float(v) for v in r.uniform(-0.08, 0.08, 2)),
        )
        self._text_seed = int(r.randint(2**31))

    def __call__(self, image: Tensor, randomize: bool = True) -> Tensor:
        """Change the image (3, H, W) in [0, 1]; returns the same shape and range."""
        if randomize:
            self.randomize()
        if not self._do_transform:
            return image
        return self.apply(image)[0]

    def apply(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The drawn effects on (3, H, W); also the field (1, H, W) still to be seen, or ``None`` for all of it."""
        x, on = plain(image), self._on
        height, width = x.shape[-2:]
        if on["blur"]:
            small = (max(8, int(height / self._blur)), max(8, int(width / self._blur)))
            x = F.interpolate(x[None], small, mode="bilinear", antialias=True)
            x = F.interpolate(x, (height, width), mode="bilinear")[0]
        black = x.amax(0, keepdim=True) < 0.03  # the border carries no light, whatever the processor does
        if on["gain"]:
            x = x * torch.tensor(self._gain, dtype=x.dtype, device=x.device).view(3, 1, 1)
        if on["saturation"]:
            grey = x.mean(0, keepdim=True)
            x = grey + (x - grey) * self._saturation
        if on["contrast"]:
            factor, offset = self._contrast
            mean = x.mean()
            x = mean + (x - mean) * factor + offset
        x = x.clamp(0, 1)
        if on["gamma"]:
            x = x.pow(self._gamma)
        if on["gain"] or on["saturation"] or on["contrast"] or on["gamma"]:
            x = x.masked_fill(black, 0.0)
        ys = torch.linspace(-1, 1, height, device=x.device).view(-1, 1)
        xs = torch.linspace(-1, 1, width, device=x.device).view(1, -1)
        if on["vignette"]:
            strength, cy, cx = self._vignette
            x = x * (1 - strength * ((ys - cy) ** 2 + (xs - cx) ** 2) / 2).clamp(min=0.05)
        if on["noise"]:
            sd, seed = self._noise
            # Drawn on the CPU, so that the same seed is the same noise on every device.
            noise = torch.randn(x.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
            x = x + sd * noise.to(x.device)
        field = None
        if on["frame"]:
            kind, radius, cy, cx = self._frame
            dy, dx = (ys - cy).abs(), (xs - cx).abs()
            if kind == "circle":
                inside = dy**2 + dx**2 < radius**2 * 1.1
            elif kind == "octagon":
                inside = (torch.maximum(dy, dx) < radius * 0.95) & (dy + dx < radius * 1.5)
            else:
                inside = (dx < radius * 0.95) & (dy < 2.0)
            field = inside[None].to(x.dtype)
            x = x * field
        if on["text"]:
            x, inset = _burn_in(x, np.random.RandomState(self._text_seed))
            if inset is not None:
                field = x.new_ones(1, height, width) if field is None else field
                field[(slice(None), *inset)] = 0
        return x.clamp(0, 1), field


def _burn_in(x: Tensor, r: np.random.RandomState) -> tuple[Tensor, tuple[slice, slice] | None]:
    """Draw rows of glyph-like blocks (or one dark inset) near a border of (3, H, W); also where an inset hides all."""
    x = x.clone()
    height, width = x.shape[-2:]
    if r.rand() < 0.25:  # the position display of some endoscopes: a dark or coloured box in a corner
        h, w = int(height * r.uniform(0.15, 0.35)), int(width * r.uniform(0.12, 0.35))
        top, left = (height - h) * r.randint(2), (width - w) * r.randint(2)
        colour = torch.tensor(r.choice([0.0, 0.0, 0.3], 3), dtype=x.dtype, device=x.device).view(3, 1, 1)
        inset = slice(top, top + h), slice(left, left + w)
        x[(slice(None), *inset)] = colour
        return x, inset
    size = max(4, int(height * r.uniform(0.02, 0.05)))
    rgb = [1.0, 1.0, 1.0] if r.rand() < 0.7 else r.rand(3)
    colour = torch.tensor(rgb, dtype=x.dtype, device=x.device).view(3, 1, 1)
    top = int(r.uniform(0, 0.15) * height) if r.rand() < 0.5 else int(r.uniform(0.8, 0.94) * height)
    left = int(r.uniform(0, 0.7) * width)
    for line in range(r.randint(1, 4)):
        for glyph in range(r.randint(3, 12)):
            y, z = top + line * int(1.6 * size), left + glyph * size
            if y + size >= height or z + size >= width:
                break
            cells = torch.from_numpy((r.rand(5, 3) < 0.55).astype(np.float32))[None, None]
            shape = F.interpolate(cells, (size, max(2, int(size * 0.7))), mode="nearest")[0].to(x.device)
            window = x[:, y : y + shape.shape[1], z : z + shape.shape[2]]
            x[:, y : y + shape.shape[1], z : z + shape.shape[2]] = torch.where(shape > 0, colour, window)
    return x, None


class RandCamerad(MapTransform, Randomizable):
    """Dictionary version of :class:`RandCamera`; clears the label where a black frame or an inset hides the tissue.

    Args:
        image_key: key of the image (3, H, W) in [0, 1].
        label_key: key of the label (1, H, W), or ``None``.
        **options: see :class:`RandCamera`.
    """

    def __init__(self, image_key: str = "image", label_key: str | None = "label", **options: float) -> None:
        super().__init__([image_key] if label_key is None else [image_key, label_key])
        self.image_key, self.label_key = image_key, label_key
        self.camera = RandCamera(**options)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandCamerad:
        """Seed the effects."""
        super().set_random_state(seed, state)
        self.camera.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the image of one case."""
        data = dict(data)
        self.camera.randomize()
        if not self.camera._do_transform:
            return data
        data[self.image_key], field = self.camera.apply(data[self.image_key])
        if field is not None and self.label_key is not None:
            data[self.label_key] = data[self.label_key] * field.to(data[self.label_key].dtype)
        return data


class RandEmptyCropd(MapTransform, Randomizable):
    """Now and then, show a part of the image without any object, at the image's full size.

    Data sets of findings hold no empty frames; in use most frames are empty. A model that never saw one draws
    something in each.

    Args:
        keys: image key first, label key second; (C, H, W) each.
        prob: probability of trying.
        sides: range of the crop's side as a fraction of the image's.
        tries: how many random windows are tried; if all touch an object the case stays as it is.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        prob: float = 0.1,
        sides: tuple[float, float] = (0.35, 0.8),
        tries: int = 8,
    ) -> None:
        super().__init__(keys)
        self.prob, self.sides, self.tries = prob, sides, tries

    def randomize(self, data: Any = None) -> None:
        """Draw whether to act and the windows to try."""
        self._do = bool(self.R.rand() < self.prob)
        self._windows = self.R.rand(self.tries, 3)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop and resize one case, if a window without foreground is found."""
        data = dict(data)
        self.randomize()
        if not self._do:
            return data
        image, label = (plain(data[k]) for k in self.keys)
        height, width = label.shape[-2:]
        low, high = self.sides
        for side, top, left in self._windows:
            h, w = int(height * (low + side * (high - low))), int(width * (low + side * (high - low)))
            y, x = int(top * (height - h)), int(left * (width - w))
            if not label[..., y : y + h, x : x + w].any():
                crop = image[None, :, y : y + h, x : x + w]
                data[self.keys[0]] = F.interpolate(crop, (height, width), mode="bilinear", antialias=True)[0]
                data[self.keys[1]] = torch.zeros_like(label)
                return data
        return data
