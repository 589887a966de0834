"""What the parts of the speed benchmark share: settings, cases, and the notes beneath their tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import machine_line
from scoring import device
from timing import failed, load

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.encoders.sam_vit import VARIANTS

#: A row of a table before it is text.
Row = dict[str, Any]
#: FLOP/s that the first guess of the remaining time assumes; corrected as soon as a case is done.
_GUESS = {"cpu": 1e11, "cuda": 5e13}
#: Seconds to build the networks of a case, for the same guess.
_BUILD = 3.0


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long.

    Attributes:
        sizes: sides of the images in pixels.
        batches: images at a time.
        precisions: of the encoders' race.
        encoders: names for :func:`hspsam_monai.encoders.build_encoder`.
        seconds: budget of a case after its warm-up.
        least: rounds that every case gets.
        most: rounds that no case exceeds.
        compile: also measure compiled rows.
        compile_batches: batches of the compiled rows (each shape is compiled anew).
        network_encoder: encoder of the randomly initialised networks.
        latency_rounds: warm images; a 99th percentile needs a hundred.
        cold_rounds: fresh processes of the cold start.
        train_size: side of the training images in pixels.
        train_batch: images of a training step.
        model: checkpoint of the shipped network.
        network_files: configurations that describe it.
        data: folder of data sets for the guard; ``None``: the guard is not measured.
        split: whose images the guard segments.
        guard_images: only so many of them, spread over the split; ``None``: all.
    """

    sizes: tuple[int, ...] = (256, 512, 1024)
    batches: tuple[int, ...] = (1, 4)
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    encoders: tuple[str, ...] = ("sam_vit_b", "mobile_sam")
    seconds: float = 15.0
    least: int = 3
    most: int = 200
    compile: bool = False
    compile_batches: tuple[int, ...] = (1, 8, 32)
    network_encoder: str = "sam_vit_b"
    latency_rounds: int = 100
    cold_rounds: int = 3
    train_size: int = 256
    train_batch: int = 8
    model: Path | None = None
    network_files: tuple[Path, ...] = ()
    data: Path | None = None
    split: str = "val"
    guard_images: int | None = None

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return device()

    @property
    def warm(self) -> int:
        """Warm-up rounds; each contender has also run once for the comparison of outputs."""
        return 3 if self.device.type == "cuda" else 0

    def network_precisions(self) -> tuple[str, ...]:
        """Precisions of whole networks: float32, as the bundle infers; on a GPU bfloat16 too."""
        return ("float32", "bfloat16") if self.device.type == "cuda" else ("float32",)

    def cost(self, flops: float, passes: int) -> float:
        """Guess the seconds of a case: ``passes`` forward passes of ``flops`` a round."""
        a_round = flops * passes / _GUESS[self.device.type]
        return _BUILD + a_round + max(min(self.seconds, self.most * a_round), self.least * a_round)


class Case(NamedTuple):
    """One thing to measure: what the log calls it, expected seconds, and what does it, giving rows of the table."""

    label: str
    cost: float
    run: Callable[[], list[Row]]


class Part(NamedTuple):
    """One section of RESULTS.md.

    ``cases`` lists what is measured (and builds nothing yet); ``report`` turns the rows of all cases, at least one,
    into Markdown; ``needs`` says what a part without cases lacks.
    """

    section: str
    cases: Callable[[Settings], list[Case]]
    report: Callable[[Sequence[Row], Settings], str]
    needs: str = "see benchmarks/README.md"


def encoder_flops(name: str, size: int) -> float:
    """Real work of an encoder on one image, to guess times by."""
    from work import tiny_flops, vit_flops

    variant = VARIANTS.get(name.removeprefix("sam_vit_"))
    return vit_flops(variant, size) if variant is not None else tiny_flops(size)


def shipped(settings: Settings) -> Path | None:
    """Checkpoint of the shipped model, or ``None`` where the bundle has none."""
    model = settings.model or bundle_root() / "models" / "model.pt"
    return model if model.is_file() else None


def shipped_files(settings: Settings) -> list[Path]:
    """List the configurations that describe the shipped network."""
    return list(settings.network_files) or [bundle_root() / "configs" / "inference.json"]


def footer(rows: Sequence[Mapping[str, Any]], text: str, packages: Sequence[str] = ()) -> str:
    """Write what stands beneath a table: how it was measured, the load meanwhile, further versions, the machine.

    Args:
        rows: of the table; their ``load`` is averaged.
        text: how it was measured.
        packages: distributions besides those of :func:`results.machine` whose versions matter.
    """
    loads = [row["load"] for row in rows if row.get("load") is not None]
    meanwhile = f" Load while measuring: median {statistics.median(loads):.1f}." if loads else ""
    others = ", ".join(f"{name} {_version(name)}" for name in packages)
    return f"{text}{meanwhile}{f' Further versions: {others}.' if others else ''}\n\n{machine_line()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


__all__ = ["Case", "Part", "Row", "Settings", "encoder_flops", "failed", "footer", "load", "shipped", "shipped_files"]
