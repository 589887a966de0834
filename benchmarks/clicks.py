"""How far clicks bring a mask: SAM-SP's automatic one refined by them, against MobileSAM that has only the clicks.

A simulated person looks at the mask and clicks in the middle of what is wrong, the pixel deepest inside the difference
to the truth, until the mask is right or ``--clicks`` are spent. MobileSAM is given them as SAM prescribes: after the
first its best of three masks, from then on the mask so far with all clicks. Both are scored at stored resolution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from box_prompt import SAM_SIZE, BoxedMobileSAM
from common import argument_parser, cases_of, logger, spread, start_logging, weights_file
from results import machine_line, markdown_table, publish
from scipy import ndimage
from scoring import PRECISION, image_tensor, load_model, paired_bootstrap
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.data import read_mask
from hspsam_monai.errors import ConfigError
from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks import SAMSP
from hspsam_monai.networks.user_prompts import user_prompts
from hspsam_monai.scores import score_masks
from hspsam_monai.training.handlers import clock

SECTION = "clicks"
PEER = "MobileSAM, clicks alone"
#: Masks below this Dice are what a person would correct.
POOR = 0.85
#: A click that takes more Dice than this made the mask worse.
WORSE = 0.01

#: Marks so far -> (H, W) bool.
Segment = Callable[[list[tuple[int, float, float, int]]], np.ndarray]


def main(argv: list[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argument_parser("clicks", __doc__)
    parser.add_argument("--models", nargs="+", default=["sam_sp"], metavar="RUN", help="sam_sp, or folders of runs")
    parser.add_argument("--split", default="val")
    parser.add_argument("--clicks", type=int, default=5)
    parser.add_argument("--limit", type=int, help="only so many images, spread over the split")
    args = parser.parse_args(argv)
    start_logging()
    weights = weights_file(args.weights)
    if not weights:
        raise ConfigError("MobileSAM needs its official weights; --weights none does not fit here.")
    whole = cases_of(args.data, args.split)
    cases = spread(whole, args.limit)
    if args.clicks < 1:
        raise ConfigError(f"--clicks is {args.clicks}; expected 1 or more.")
    names = [Path(name).name for name in args.models]
    if len(set(names)) != len(names):
        raise ConfigError(f"Models need different names, not {', '.join(names)}.")
    methods: dict[str, Callable[[Tensor], Segment]] = {}
    for name in args.models:
        network, _, size, classes = load_model(name)
        if classes != 2 or not isinstance(network, SAMSP):
            raise ConfigError(f"{name} is no SAM-SP of background and one class; clicks refine nothing else here.")
        methods[Path(name).name] = _automatic(network, ImageInferer(size, PRECISION))
    methods[PEER] = _mobile_sam(BoxedMobileSAM(weights))
    found = measure(methods, cases, args.clicks)
    publish(SECTION, _report(found, cases, args), args, partial=len(cases) < len(whole))


@torch.inference_mode()
def measure(
    methods: Mapping[str, Callable[[Tensor], Segment]], cases: Sequence[Mapping[str, Any]], clicks: int
) -> dict[str, np.ndarray]:
    """Dice of every method after 0 … ``clicks`` clicks: name -> (cases, clicks + 1)."""
    found: dict[str, list[list[float]]] = {name: [] for name in methods}
    begin = printed = time.monotonic()
    for count, case in enumerate(cases, 1):
        truth = read_mask(case["label"], 2) > 0
        image = image_tensor(case["image"])
        for name, method in methods.items():
            found[name].append(_refined(method(image), truth, clicks))
        now = time.monotonic()
        if now - printed > 30 or count == len(cases):
            printed = now
            left = clock((now - begin) / count * (len(cases) - count))
            logger.info("%d of %d images, %s left", count, len(cases), left)
    return {name: np.array(rows) for name, rows in found.items()}


def _refined(segment: Segment, truth: np.ndarray, clicks: int) -> list[float]:
    """Dice after each click; a mask without a fault stays as it is."""
    marks: list[tuple[int, float, float, int]] = []
    mask = segment(marks)
    dice = [_dice(mask, truth)]
    for _ in range(clicks):
        mark = next_click(mask, truth)
        if mark is not None:
            marks.append(mark)
            mask = segment(marks)
        dice.append(_dice(mask, truth))
    return dice


def next_click(mask: np.ndarray, truth: np.ndarray) -> tuple[int, float, float, int] | None:
    """Where a person would click next: (object, x, y, on or off it); ``None`` if nothing is wrong.

    The pixel deepest inside the difference, whose outside begins at the border of the picture.
    """
    wrong = mask != truth
    if not wrong.any():
        return None
    depth = ndimage.distance_transform_edt(np.pad(wrong, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return 1, float(x), float(y), int(truth[y, x])


def _dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return score_masks(mask.astype(np.uint8), truth.astype(np.uint8), 2)["mean_dice"]


def _automatic(network: nn.Module, inferer: ImageInferer) -> Callable[[Tensor], Segment]:
    """SAM-SP: one call with all marks, as an annotation tool makes it."""

    def method(image: Tensor) -> Segment:
        def segment(marks: list[tuple[int, float, float, int]]) -> np.ndarray:
            logits = inferer(image, network, prompts=user_prompts(1, clicks=marks))
            return logits.argmax(1)[0].bool().cpu().numpy()

        return segment

    return method


def _mobile_sam(peer: BoxedMobileSAM) -> Callable[[Tensor], Segment]:
    """MobileSAM, which has no mask before the first click."""

    def method(image: Tensor) -> Segment:
        size = tuple(image.shape[-2:])
        embedding, inner = peer.embed(image)
        last: list[Tensor] = []

        def segment(marks: list[tuple[int, float, float, int]]) -> np.ndarray:
            if not marks:
                return np.zeros(size, bool)
            ratio = torch.tensor([inner[1] / size[1], inner[0] / size[0]], device=embedding.device)
            points = torch.tensor([[mark[1:3] for mark in marks]], device=embedding.device) * ratio
            labels = torch.tensor([[mark[3] for mark in marks]], device=embedding.device)
            prompts = peer.model.prompt_encoder
            sparse, dense = prompts(points=(points, labels), boxes=None, masks=last[-1] if last else None)
            logits, iou = peer.model.mask_decoder(
                image_embeddings=embedding,
                image_pe=prompts.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=not last,
            )
            last.append(logits[:, iou.argmax(1)])
            up = F.interpolate(last[-1], (SAM_SIZE, SAM_SIZE), mode="bilinear", align_corners=False)
            up = F.interpolate(up[..., : inner[0], : inner[1]], size, mode="bilinear", align_corners=False)
            return (up[0, 0] > 0).cpu().numpy()

        return segment

    return method


def _report(found: Mapping[str, np.ndarray], cases: Sequence[Mapping[str, Any]], args: Any) -> str:
    head = ["images", "method", *(f"{count} clicks" for count in range(args.clicks + 1))]
    head += ["first click gains [95 % CI]", f"first click costs more than {WORSE:g}"]
    rows = []
    first = next(iter(found.values()))[:, 0]
    for label, chosen in (("all", np.ones(len(cases), bool)), (f"automatic Dice below {POOR:g}", first < POOR)):
        for name, table in found.items():
            part = table[chosen]
            if not len(part):
                continue
            gained: list[Any] = ["–", "–"]
            if name != PEER:
                gained = [paired_bootstrap(part[:, 1], part[:, 0]), f"{np.mean(part[:, 1] < part[:, 0] - WORSE):.1%}"]
            rows.append([f"{label} ({len(part)})", name, *map(float, part.mean(0)), *gained])
    text = (
        f"Mean Dice per image at stored resolution after so many clicks, split `{args.split}`, one pass, {PRECISION}. "
        "A simulated person, who knows the truth, clicks the pixel deepest inside what is wrong. Poor masks are those "
        "of the first row's method. MobileSAM works at 1024 pixels and has no mask before the first click."
    )
    return f"{markdown_table(head, rows)}\n{text}\n\n{machine_line()}"


if __name__ == "__main__":
    main()
