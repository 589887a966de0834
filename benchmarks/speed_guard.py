"""R8: what the fast rows cost in accuracy: masks of the shipped model against those of float32 eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from common import cases_of, spread
from parts import Case, Part, Row, Settings, failed, footer, load, shipped, shipped_files
from results import markdown_table
from scoring import image_tensor, load_network
from timing import verdict

from hspsam_monai.data import read_mask
from hspsam_monai.inference import ImageInferer
from hspsam_monai.scores import score_masks

#: Share of pixels whose class may change, in percent, and change of the mean Dice; both are means over images.
PIXELS_AIM, DICE_AIM = 0.1, 0.001
#: Seconds an image takes each path, to guess the remaining time by.
_IMAGE = 0.2


class Change(NamedTuple):
    """One image, a fast path against float32 eager.

    ``pixels``: percent of pixels whose class differs. ``dice``: mean Dice of the fast mask minus that of the exact
    one. ``logit``: largest difference of a logit.
    """

    pixels: float
    dice: float
    logit: float = 0.0


def change(fast: np.ndarray, exact: np.ndarray, truth: np.ndarray, classes: int, logit: float = 0.0) -> Change:
    """Compare two masks of one image.

    Args:
        fast: class indices (H, W) of the fast path.
        exact: the same of float32 eager.
        truth: the same of the label.
        classes: K, background included.
        logit: largest difference of a logit, passed through.
    """
    scores = [score_masks(mask, truth, classes)["mean_dice"] for mask in (fast, exact)]
    return Change(100.0 * float(np.mean(fast != exact)), scores[0] - scores[1], logit)


def paths(settings: Settings, network: torch.nn.Module) -> dict[str, tuple[str, Callable[..., Any]]]:
    """Fast path -> (precision, network): every kind of row that is not float32 eager."""
    found: dict[str, tuple[str, Callable[..., Any]]] = {"bfloat16 autocast": ("bfloat16", network)}
    if settings.compile:
        compiled = torch.compile(network, dynamic=False)
        found["compiled, float32"] = ("float32", compiled)
        found["compiled, bfloat16"] = ("bfloat16", compiled)
    return found


@torch.inference_mode()
def measure(settings: Settings, cases: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Segment every image in every way; one pass, at stored resolution.

    Returns:
        One row a fast path with its ``changes``; a path that fails has ``note`` instead.
    """
    network, size, classes = load_network(shipped(settings), shipped_files(settings))
    changes: dict[str, list[Change]] = {}
    notes: dict[str, str] = {}
    fast_paths = paths(settings, network)
    for case in cases:
        image, truth = image_tensor(case["image"]), read_mask(case["label"], classes)
        exact = ImageInferer(size, "float32")(image, network)
        exact_mask = exact.argmax(1)[0].cpu().numpy()
        for name, (precision, fast) in fast_paths.items():
            if name in notes:
                continue
            try:
                logits = ImageInferer(size, precision)(image, fast)
            except Exception as error:  # a compiler that fails costs its row, not the benchmark
                notes[name] = failed(error)
                continue
            largest = float((logits - exact).abs().max())
            mask = logits.argmax(1)[0].cpu().numpy()
            changes.setdefault(name, []).append(change(mask, exact_mask, truth, classes, largest))
    return [
        {"name": name, "changes": changes.get(name, []), "note": notes.get(name, ""), "images": len(cases),
         "load": load()}
        for name in fast_paths
    ]  # fmt: skip


def chosen(settings: Settings) -> list[Mapping[str, Any]]:
    """Cases of the split, or as many as the settings allow, spread over it; none without data or model."""
    if settings.data is None or shipped(settings) is None:
        return []
    found = cases_of(settings.data, settings.split)
    if settings.guard_images is None or settings.guard_images >= len(found):
        return list(found)
    return spread(found, settings.guard_images)


def guard_cases(settings: Settings) -> list[Case]:
    """One case, or none without data or model."""
    images = chosen(settings)
    if not images:
        return []
    ways = 4 if settings.compile else 2
    return [
        Case(f"accuracy guard, {len(images)} images", _IMAGE * ways * len(images), partial(measure, settings, images))
    ]


def report(rows: Sequence[Row], settings: Settings) -> str:
    """Write the means beside their aims, and the worst image."""
    lines = []
    for row in rows:
        changes = row["changes"]
        if not changes or row["note"]:
            lines.append([row["name"], len(changes), *[None] * 6, row["note"] or "–"])
            continue
        pixels = float(np.mean([c.pixels for c in changes]))
        dice = float(np.mean([c.dice for c in changes]))
        lines.append([
            row["name"], len(changes), f"{pixels:.4f} %", f"{max(c.pixels for c in changes):.3f} %",
            verdict(pixels, PIXELS_AIM, at_most=True), f"{dice:+.5f}", f"{max(abs(c.dice) for c in changes):.4f}",
            verdict(abs(dice), DICE_AIM, at_most=True), f"{max(c.logit for c in changes):.3f}",
        ])  # fmt: skip
    head = ["fast path", "images", "pixels changed, mean", "worst image", "aim (%)"]
    head += ["Dice change, mean", "largest", "aim", "largest logit change"]
    text = (
        f"Shipped model in one pass on the images of split `{settings.split}`, masks at stored resolution, against "
        "float32 eager. Float32 eager is the encoder of the tables above, which equals the published one. Compiled "
        "rows are measured on a GPU."
    )
    return f"{markdown_table(head, lines)}\n{footer(rows, text)}"


PART = Part(
    "accuracy-guard", guard_cases, report, "it needs the polyp images (--data) and the bundle's models/model.pt"
)
