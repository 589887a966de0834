"""Dynamic int8 quantisation of the encoder's linear layers on the CPU: what it gains in time, what it costs in Dice.

It would be offered at 1.3 times the speed for at most 0.005 of Dice. Weights become int8 once, activations at each
call; convolutions, attention and the decoder (a tenth of the work) stay in float32. Both networks see the same images
one after the other.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, cases_of, spread, start_logging
from results import machine_line, markdown_table, publish
from scoring import PRECISION, image_tensor, load_network
from torch import nn

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.data import read_mask
from hspsam_monai.encoders.lora import merge_lora
from hspsam_monai.inference import ImageInferer
from hspsam_monai.scores import score_masks
from hspsam_monai.transforms import fit_image

SECTION = "int8"
#: What it must reach to be offered: times faster, and the largest loss of Dice.
GAIN, LOSS = 1.3, 0.005
#: Images of the section in RESULTS.md, spread over the split.
IMAGES = 12

logger = logging.getLogger("benchmarks")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argument_parser(SECTION, __doc__)
    parser.add_argument("--model", type=Path, default=bundle_root() / "models" / "model.pt", help="checkpoint")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=IMAGES, help="so many images, spread over the split")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each network over each image")
    args = parser.parse_args(argv)
    start_logging()
    beside = args.model.parent / "network.json"
    files = [beside if beside.is_file() else bundle_root() / "configs" / "inference.json"]
    network, size, classes = load_network(args.model, files)
    cases = cases_of(args.data, args.split)
    chosen = spread(cases, args.limit)
    rows = measure(network.cpu(), size, classes, chosen, args.rounds)
    publish(SECTION, report(rows, args), args, partial=len(chosen) < IMAGES)


def quantise(network: nn.Module) -> nn.Module:
    """Copy a network with every ``nn.Linear`` of its encoder in dynamic int8; LoRA is merged first."""
    network = copy.deepcopy(network).eval()
    merge_lora(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao, the successor, is another package
        network.encoder = torch.ao.quantization.quantize_dynamic(network.encoder, {nn.Linear}, dtype=torch.qint8)
    return network


@torch.inference_mode()
def measure(
    network: nn.Module, size: int, classes: int, cases: Sequence[Mapping[str, Any]], rounds: int
) -> list[dict[str, float]]:
    """Dice of both networks, share of pixels that differ, and the least seconds of each, a case."""
    networks = {"float32": network.eval(), "int8": quantise(network)}
    inferer = ImageInferer(size, PRECISION)
    for one in networks.values():  # the first call allocates and plans
        one(torch.rand(1, 3, size, size))
    rows = []
    for count, case in enumerate(cases, 1):
        image, truth = image_tensor(case["image"]).cpu(), read_mask(case["label"], classes)
        masks = {name: inferer(image, one).argmax(1)[0].to(torch.uint8).numpy() for name, one in networks.items()}
        row = {f"dice {name}": score_masks(mask, truth, classes)["mean_dice"] for name, mask in masks.items()}
        row["differ"] = float((masks["float32"] != masks["int8"]).mean())
        seconds: dict[str, list[float]] = {name: [] for name in networks}
        small = fit_image(image, size)
        for turn in range(rounds):
            for name in list(networks)[:: 1 if turn % 2 else -1]:  # neither is always first
                start = time.perf_counter()
                networks[name](small)
                seconds[name].append(time.perf_counter() - start)
        row |= {f"seconds {name}": min(values) for name, values in seconds.items()}
        rows.append(row)
        logger.info("%d of %d images", count, len(cases))
    return rows


def report(rows: Sequence[Mapping[str, float]], args: argparse.Namespace) -> str:
    """The table, whether int8 is worth it, and how it was measured."""
    column = {key: [row[key] for row in rows] for key in rows[0]}
    speed = [a / b for a, b in zip(column["seconds float32"], column["seconds int8"], strict=True)]
    gain = statistics.median(speed)
    loss = statistics.fmean(column["dice float32"]) - statistics.fmean(column["dice int8"])
    table = markdown_table(
        [
            "linear layers of the encoder",
            "mean Dice",
            "ms/image, min",
            "ms/image, median",
            "times as fast, median [min, max]",
        ],
        [
            [
                name,
                statistics.fmean(column[f"dice {name}"]),
                round(1000 * min(column[f"seconds {name}"])),
                round(1000 * statistics.median(column[f"seconds {name}"])),
                "1" if name == "float32" else f"{gain:.2f} [{min(speed):.2f}, {max(speed):.2f}]",
            ]
            for name in ("float32", "int8")
        ],
    )
    verdict = "It reaches that." if gain >= GAIN and loss <= LOSS else "It does not reach that, so it is not offered."
    return (
        f"{table}\nMean Dice changes by {-loss:+.4f}; {100 * statistics.fmean(column['differ']):.2f} % of the pixels "
        f"change their class. Asked for: at least {GAIN} times as fast for at most {LOSS} of Dice. {verdict}\n\n"
        f"{len(rows)} images spread over split `{args.split}`, one pass (no mirror images); time: the network alone at "
        f"its size, batch 1, the least of {args.rounds} passes an image, both networks in turn.\n\n{machine_line()}"
    )


if __name__ == "__main__":
    main()
