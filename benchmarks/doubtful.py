"""What dropping doubtful components brings and costs: images with an object, and parts of them without one.

The data sets hold hardly any empty image, a day in a clinic hardly any other. Empty ones are cut from the images at
hand: the largest band beside the object's bounding box. Every bar is applied to the same probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import argument_parser, start_logging
from results import machine_line, markdown_table, publish
from scoring import MISSED, image_tensor, measure_argument, measured, mirror_inferer

from hspsam_monai.data import read_mask
from hspsam_monai.inference import ImageInferer
from hspsam_monai.scores import score_masks
from hspsam_monai.transforms import drop_doubtful

SECTION = "doubtful"
BARS = (0.0, 0.55, 0.6, 0.65, 0.7, 0.8)
#: Least side of an empty band, as a fraction of the image's; thinner ones look like no image.
LEAST_SIDE = 0.3


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argument_parser("doubtful", __doc__)
    measure_argument(parser)
    parser.add_argument("--bars", nargs="+", type=float, default=list(BARS), help="min_confidence")
    parser.add_argument("--limit", type=int, help="only the first cases of each source")
    args = parser.parse_args(argv)
    start_logging()
    rows = []
    for one in measured(args):
        found = _score(one.network, mirror_inferer(one.files), one.classes, one.cases[: args.limit], args.bars)
        rows += _rows(one.model, one.label, found)
    head = ["model", "images", "min_confidence", "Dice of images with an object", f"missed (Dice < {MISSED})"]
    head += ["empty parts left empty"]
    text = (
        "Four mirror images averaged, stored resolution. Empty parts: the largest band beside the bounding box of the "
        f"object, if its sides are at least {LEAST_SIDE:g} of the image's; images that are empty themselves count "
        "among them."
    )
    publish(SECTION, f"{markdown_table(head, rows)}\n{text}\n\n{machine_line()}", args, partial=args.limit is not None)


@torch.inference_mode()
def _score(
    network: torch.nn.Module,
    inferer: ImageInferer,
    classes: int,
    cases: Sequence[Mapping[str, Any]],
    bars: Sequence[float],
) -> dict[float, tuple[list[float], list[bool]]]:
    found: dict[float, tuple[list[float], list[bool]]] = {bar: ([], []) for bar in bars}
    for case in cases:
        for image, mask in _parts(image_tensor(case["image"]), read_mask(case["label"], classes)):
            logits = inferer(image, network)[0]
            for bar, (dice, empty) in found.items():
                pred = drop_doubtful(logits, bar).argmax(0).to(torch.uint8).cpu().numpy()
                if mask.any():
                    dice.append(score_masks(pred, mask, classes)["mean_dice"])
                else:
                    empty.append(not pred.any())
    return found


def _parts(image: torch.Tensor, mask: np.ndarray) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """The image itself and, of one with an object, its largest empty band."""
    yield image, mask
    window = empty_band(mask) if mask.any() else None
    if window is not None:
        yield image[(..., *window)], mask[window]


def empty_band(mask: np.ndarray) -> tuple[slice, slice] | None:
    """The largest band of (H, W) above, below, left or right of the foreground; ``None`` if all are thin."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    everything = slice(None)
    bands = [
        (rows[0] / height, (slice(0, rows[0]), everything)),
        (1 - (rows[-1] + 1) / height, (slice(rows[-1] + 1, height), everything)),
        (columns[0] / width, (everything, slice(0, columns[0]))),
        (1 - (columns[-1] + 1) / width, (everything, slice(columns[-1] + 1, width))),
    ]
    share, window = max(bands, key=lambda band: band[0])
    return window if share >= LEAST_SIDE else None


def _rows(model: str, label: str, found: Mapping[float, tuple[list[float], list[bool]]]) -> list[list[Any]]:
    rows = []
    for bar, (dice, empty) in found.items():
        full = [float(np.mean(dice)), f"{np.mean(np.array(dice) < MISSED):.1%}"] if dice else ["–", "–"]
        rows.append([
            model, f"{label} ({len(dice)} with an object, {len(empty)} empty)", f"{bar:g}", *full,
            float(np.mean(empty)) if empty else "–",
        ])  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
