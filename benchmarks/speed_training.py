"""R6: steps a second of training, compute only: forward, loss, backward, AdamW; images are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from common import logger
from parts import Case, Part, Row, Settings, encoder_flops, failed, footer, load
from results import markdown_table
from timing import TIMING_HEAD, Timing, interleave, race, verdict
from torch import Tensor, nn

from hspsam_monai.encoders import Encoded
from hspsam_monai.inference.image_inferer import autocast_dtype
from hspsam_monai.networks import HSPSAM, ConvPyramidSAM
from hspsam_monai.training import DiceCE

#: Cached features of a frozen encoder against LoRA on the same images.
CACHE_AIM = 5.0
LORA = "HSP-SAM mobile_sam, LoRA"


@dataclass
class Trainee:
    """A network in train mode, what its forward pass takes, and whether it trains on cached features."""

    network: nn.Module
    inputs: tuple[Tensor | Encoded, ...]
    cached: bool = False

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over what is trained; the learning rate is too small to lead anywhere."""
        return torch.optim.AdamW([p for p in self.network.parameters() if p.requires_grad], lr=1e-6)


def _trainee(build: Callable[[int], nn.Module], image: Tensor) -> Trainee:
    torch.manual_seed(0)
    return Trainee(build(image.shape[-1]).to(image.device).train(), (image,))


def _hsp(adapt: str, size: int) -> nn.Module:
    """HSP-SAM as train.json builds it."""
    return HSPSAM(
        "mobile_sam", image_size=size, prompts_per_level=8, prompt_source="image", decoder="slim", adapt=adapt
    )


def _on_stored_features(image: Tensor) -> Trainee:
    """``network/hsp_sam_frozen.json``: the encoder has done its work, its features are at hand."""
    torch.manual_seed(0)
    network = HSPSAM(
        "mobile_sam", image_size=image.shape[-1], prompts_per_level=8, prompt_source="static", decoder="slim",
        adapt="frozen", inject=False,
    ).to(image.device).train()  # fmt: skip
    with torch.no_grad():
        return Trainee(network, (network.encode(image),), cached=True)


def _pyramid(size: int) -> nn.Module:
    return ConvPyramidSAM("mobile_sam", image_size=size, adapt="full")


def _unet(size: int) -> nn.Module:
    """MONAI's 2-D UNet with two residual units a level, as its tutorials build it."""
    from monai.networks.nets import UNet

    return UNet(2, 3, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)


#: What is trained: name -> builder from the images (B, 3, S, S) in [0, 1]. A builder may do once what training would
#: do once, such as encoding the images of a frozen encoder (``cached``); that time does not count.
TRAINED: dict[str, Callable[[Tensor], Trainee]] = {
    "HSP-SAM mobile_sam, full": partial(_trainee, partial(_hsp, "full")),
    LORA: partial(_trainee, partial(_hsp, "lora")),
    "HSP-SAM mobile_sam, frozen": partial(_trainee, partial(_hsp, "frozen")),
    "HSP-SAM mobile_sam, stored features": _on_stored_features,
    "ConvPyramidSAM mobile_sam, full": partial(_trainee, _pyramid),
    "MONAI UNet": partial(_trainee, _unet),
}


def images(size: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw images (B, 3, S, S) in [0, 1] and discs as labels (B, 1, S, S)."""
    random = torch.Generator().manual_seed(2)
    axis = torch.linspace(-1, 1, size)
    disc = (axis[:, None] ** 2 + axis**2 < 0.3).long()
    image = torch.rand(batch, 3, size, size, generator=random)
    return image.to(device), disc.expand(batch, 1, size, size).contiguous().to(device)


def step(trainee: Trainee, optimizer: torch.optim.Optimizer, label: Tensor, precision: str) -> Tensor:
    """One training step as the bundle makes it.

    Args:
        trainee: network and inputs.
        optimizer: of its parameters.
        label: class indices (B, 1, S, S).
        precision: see :func:`hspsam_monai.inference.image_inferer.autocast_dtype`.

    Returns:
        The loss, a scalar.
    """
    dtype = autocast_dtype(label.device, precision)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(label.device.type, dtype) if dtype is not None else nullcontext():
        output = trainee.network(*trainee.inputs)
    loss = _LOSS(output, label)
    loss.backward()
    optimizer.step()
    return loss


_LOSS = DiceCE()


def measure(precision: str, settings: Settings) -> list[Row]:
    """Interleave one step of every entry of :data:`TRAINED`; ``timing`` is ``None`` where ``note`` says why."""
    image, label = images(settings.train_size, settings.train_batch, settings.device)
    runs, cached = {}, {}
    failures: dict[str, str] = {}
    for name, builder in TRAINED.items():
        try:
            trainee = builder(image)
        except Exception as error:  # costs its row, not the others
            logger.warning("%s cannot be built: %s", name, failed(error))
            failures[name] = failed(error)
            continue
        cached[name] = trainee.cached
        runs[name] = partial(step, trainee, trainee.optimizer(), label, precision)
    times = interleave(
        runs, settings.device, settings.seconds, failures=failures,
        least=settings.least, most=settings.most, warm=max(1, settings.warm),
    )  # fmt: skip
    dtype = autocast_dtype(settings.device, precision)
    return [
        {
            "name": name, "precision": precision, "dtype": str(dtype or torch.float32).removeprefix("torch."),
            "timing": times.get(name), "cached": cached.get(name, False), "note": failures.get(name, ""),
            "load": load(),
        }
        for name in TRAINED
    ]  # fmt: skip


def precisions(settings: Settings) -> tuple[str, ...]:
    """``auto`` and ``float32``; only the latter where ``auto`` is the same on this device."""
    return ("float32",) if autocast_dtype(settings.device, "auto") is None else ("auto", "float32")


def cases(settings: Settings) -> list[Case]:
    """One case a precision; a step costs about three forward passes."""
    flops = encoder_flops("mobile_sam", settings.train_size) * settings.train_batch
    return [
        Case(
            f"training steps, {settings.train_size} px, batch {settings.train_batch}, {precision}",
            settings.cost(flops, 3 * len(TRAINED)),
            partial(measure, precision, settings),
        )
        for precision in precisions(settings)
    ]


def report(rows: Sequence[Row], settings: Settings) -> str:
    """Write steps a second, and the speed against LoRA in the same precision."""
    lines = []
    for row in rows:
        lora = next((r["timing"] for r in rows if r["name"] == LORA and r["precision"] == row["precision"]), None)
        found = race(row["timing"], {LORA: lora} if lora is not None else {})
        gain = found.by_median if found else None
        label = row["precision"] if row["precision"] == row["dtype"] else f"{row['precision']} ({row['dtype']})"
        lines.append([
            row["name"], label, *_cells(row["timing"]),
            None if gain is None else f"{gain:.2f} ×", verdict(gain, CACHE_AIM if row["cached"] else None),
        ])  # fmt: skip
    if not any(row["cached"] for row in rows):
        lines.append(["cached features of a frozen encoder", "–", *[None] * 6, verdict(None, CACHE_AIM)])
    head = ["trained", "precision", "steps/s", *TIMING_HEAD, "speed against LoRA", "aim"]
    same = "" if len(precisions(settings)) > 1 else " `auto` is float32 on this device."
    text = (
        f"Batch {settings.train_batch}, {settings.train_size} px, random weights, images in memory: forward, "
        "0.2 CE + 0.8 Dice, backward, AdamW; no reading, no augmentation, no averaging of weights. HSP-SAM: 8 "
        "prompts a level, `image`, `slim` (stored features: `static`, not injected). "
        f"Steps take turns for {settings.seconds:g} s a precision, at least "
        f"{settings.least} rounds after a warm-up.{same}"
    )
    without = "".join(f" {r['name']}, {r['precision']}: {r['note']}." for r in rows if r["timing"] is None)
    return f"{markdown_table(head, lines)}\n{footer(rows, text + without)}"


def _cells(timing: Timing | None) -> list[str | None]:
    return [None] * 5 if timing is None else [f"{1 / timing.median:.3g}", *timing.cells()]


PART = Part("training-speed", cases, report)
