"""What mirror images bring, and what it brings to look at each of them in its own size (`scales`), beside one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import argument_parser, start_logging
from results import machine_line, markdown_table, publish
from scoring import MISSED, PRECISION, image_tensor, measure_argument, measured, paired_bootstrap
from torch import nn

from hspsam_monai.data import read_mask
from hspsam_monai.inference import ImageInferer
from hspsam_monai.scores import score_masks

SECTION = "mirror-scales"
SCALES = (0.9, 1.0, 1.2, 1.4)
ONE, MIRRORS, SCALED = "one pass", "mirror images, one size", "mirror images, own sizes"


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argument_parser("mirror_scales", __doc__)
    measure_argument(parser)
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    parser.add_argument("--every", type=int, default=1, help="only every so many cases of each source")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    args = parser.parse_args(argv)
    start_logging()
    rows = []
    for one in measured(args):
        inferers = {
            ONE: ImageInferer(one.size, PRECISION),
            MIRRORS: ImageInferer(one.size, PRECISION, flips=True),
            SCALED: ImageInferer(one.size, PRECISION, flips=True, scales=args.scales),
        }
        found = _score(one.network, inferers, one.classes, one.cases[args.start :: args.every])
        rows += _rows(f"{one.model}, {one.size} px", one.label, found)
    head = ["model", "images", "inference", "Dice", f"missed (Dice < {MISSED})"]
    head += ["minus mirror images of one size [95 % CI over images]"]
    text = (
        "Dice is the per-image mean at stored resolution, nothing dropped (`min_confidence` 0). Own sizes: itself, "
        f"left-right, upside down and both at {', '.join(f'{scale:g}' for scale in args.scales)} times the network's, "
        "brought to multiples of 32."
    )
    partial = args.every > 1 or args.start > 0
    publish(SECTION, f"{markdown_table(head, rows)}\n{text}\n\n{machine_line()}", args, partial=partial)


@torch.inference_mode()
def _score(
    network: nn.Module, inferers: Mapping[str, ImageInferer], classes: int, cases: Sequence[Mapping[str, Any]]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in inferers}
    for case in cases:
        image, truth = image_tensor(case["image"]), read_mask(case["label"], classes)
        for name, inferer in inferers.items():
            mask = inferer(image, network)[0].argmax(0).to(torch.uint8).cpu().numpy()
            found[name].append(score_masks(mask, truth, classes)["mean_dice"])
    return found


def _rows(model: str, label: str, found: Mapping[str, Sequence[float]]) -> list[list[Any]]:
    rows, base = [], np.array(found[MIRRORS])
    for name, values in found.items():
        dice = np.array(values)
        gain = "–" if name == MIRRORS else str(paired_bootstrap(dice, base))
        rows.append([model, f"{label} ({len(dice)})", name, dice.mean(), f"{(dice < MISSED).mean():.1%}", gain])
    return rows


if __name__ == "__main__":
    main()
