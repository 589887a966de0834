"""HSP-SAM without any prompt against MobileSAM that is given the true box of every polyp.

The boxes come from the truth, so MobileSAM is told where each polyp is and how large; HSP-SAM is told nothing.
MobileSAM is kornia's model with the official weights, used as SAM prescribes: longest side to 1024 pixels, pixel
statistics, padding at the bottom and right; box corners are the first and last pixel of the object. Both see the same
images in one process and are scored at stored resolution.
"""

from __future__ import annotations

import csv
import hashlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scoring
import torch
from common import argument_parser, cases_of, data_digest, fingerprint, logger, spread, start_logging, weights_file
from PIL import Image, ImageDraw
from results import machine, machine_line, markdown_table, publish
from scipy import ndimage
from scoring import MISSED, PRECISION, device, image_tensor, load_network, mirror_inferer, paired_bootstrap
from studies import code_digest
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.data import read_image, read_mask
from hspsam_monai.encoders.catalogue import verify
from hspsam_monai.errors import ConfigError
from hspsam_monai.files import atomic_write
from hspsam_monai.inference import ImageInferer
from hspsam_monai.report.overlay import overlay
from hspsam_monai.scores import score_masks
from hspsam_monai.training.handlers import clock

SECTION = "box-prompt"
#: As the bundle infers, four mirror images averaged; and one pass, a quarter of the work.
OURS = "HSP-SAM, no prompt"
ONE_PASS = "HSP-SAM, no prompt, one pass"
#: Row -> (whether every polyp has its own box, whether three masks are offered).
PEERS = {
    "MobileSAM, a box a polyp": (True, False),
    "MobileSAM, a box a polyp, best of 3": (True, True),
    "MobileSAM, one box": (False, False),
    "MobileSAM, one box, best of 3": (False, True),
}
SAM_SIZE = 1024
#: SAM's pixel statistics on the 0-255 scale (segment_anything's build_sam).
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class BoxedMobileSAM:
    """MobileSAM by kornia, prompted with boxes.

    Args:
        weights: official ``mobile_sam.pt``; its hash must be the catalogue's.
    """

    def __init__(self, weights: str | Path) -> None:
        from kornia.models.sam import Sam, SamConfig

        verify(weights)
        self.model = Sam.from_config(SamConfig("mobile_sam"))
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
        self.model.to(device()).eval()
        self.mean = torch.tensor(PIXEL_MEAN, device=device()).view(1, 3, 1, 1)
        self.std = torch.tensor(PIXEL_STD, device=device()).view(1, 3, 1, 1)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode one image.

        Args:
            image: (1, 3, H, W) in [0, 1].

        Returns:
            SAM's embedding (1, 256, 64, 64), and the image's (height, width) inside the 1024 frame.
        """
        height, width = image.shape[-2:]
        scale = SAM_SIZE / max(height, width)
        inner = (int(height * scale + 0.5), int(width * scale + 0.5))
        x = F.interpolate(image, inner, mode="bilinear", antialias=True)
        x = (x * 255 - self.mean) / self.std  # kornia's Sam does not normalise
        x = F.pad(x, (0, SAM_SIZE - inner[1], 0, SAM_SIZE - inner[0]))
        return self.model.image_encoder(x), inner

    def segment(
        self, embedding: Tensor, inner: tuple[int, int], boxes: Tensor, size: tuple[int, int], best: bool
    ) -> np.ndarray:
        """Segment every box and unite the masks.

        Args:
            embedding: (1, 256, 64, 64) of :meth:`embed`.
            inner: (height, width) of the image in the 1024 frame.
            boxes: (N, 4) first and last column and row as x0, y0, x1, y1 in pixels of the stored image.
            size: (H, W) of the stored image.
            best: of SAM's three masks take the one with the highest predicted IoU; else its single mask.

        Returns:
            (H, W) uint8, 1 is polyp.
        """
        if not len(boxes):
            return np.zeros(size, np.uint8)
        ratio = torch.tensor([inner[1] / size[1], inner[0] / size[0]] * 2, device=boxes.device)
        prompts = self.model.prompt_encoder
        sparse, dense = prompts(points=None, boxes=boxes * ratio, masks=None)
        logits, iou = self.model.mask_decoder(
            image_embeddings=embedding,
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=best,
        )
        logits = logits[torch.arange(len(boxes)), iou.argmax(1)][:, None]
        logits = F.interpolate(logits, (SAM_SIZE, SAM_SIZE), mode="bilinear", align_corners=False)
        logits = F.interpolate(logits[..., : inner[0], : inner[1]], size, mode="bilinear", align_corners=False)
        return (logits[:, 0] > 0).any(0).to(torch.uint8).cpu().numpy()


def true_boxes(truth: np.ndarray, separate: bool, least: int) -> Tensor:
    """Boxes of a mask.

    Args:
        truth: (H, W), above 0 is polyp.
        separate: a box for each 8-connected component, else one for all of them together.
        least: components of fewer pixels get no box: specks that JPEG left in the masks.

    Returns:
        (N, 4) float32 x0, y0, x1, y1: first and last column and row, in pixels.
    """
    parts, count = ndimage.label(truth > 0, np.ones((3, 3)))
    large = np.flatnonzero(np.bincount(parts.ravel(), minlength=count + 1)[1:] >= least) + 1
    regions = [parts == index for index in large] if separate else [np.isin(parts, large)] * bool(len(large))
    boxes = []
    for region in regions:
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        boxes.append([columns[0], rows[0], columns[-1], rows[-1]])
    return torch.tensor(boxes, dtype=torch.float32, device=device()).reshape(-1, 4)


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argument_parser("box_prompt", __doc__)
    parser.add_argument("--model", type=Path, default=bundle_root() / "models" / "model.pt", help="HSP-SAM checkpoint")
    parser.add_argument("--network", type=Path, help="network.json of its training; default: beside it, or the bundle")
    parser.add_argument("--split", default="val")
    parser.add_argument("--least", type=int, default=16, help="components of fewer pixels get no box")
    parser.add_argument("--limit", type=int, help="only so many images, spread over the split")
    parser.add_argument("--pictures", type=int, default=6, help="save so many side-by-side pictures")
    args = parser.parse_args(argv)
    start_logging()

    weights = weights_file(args.weights)
    if not weights:
        raise ConfigError("MobileSAM needs its official weights; --weights none does not fit here.")
    whole = cases_of(args.data, args.split)
    cases = spread(whole, args.limit)
    files = _network_files(args.model, args.network)
    network, image_size, num_classes = load_network(args.model, files)
    if num_classes != 2:
        raise ConfigError(f"The model has {num_classes} classes; boxes of polyps need background and one class.")
    digest = hashlib.sha256(args.model.read_bytes() + b"".join(f.read_bytes() for f in files)).hexdigest()[:12]
    folder = _kept(args.output, digest, Path(weights), whole, args.least)
    inferers = {OURS: mirror_inferer(files), ONE_PASS: ImageInferer(image_size, PRECISION)}
    rows = _measure(network, inferers, BoxedMobileSAM(weights), cases, folder, args.least, args.pictures)
    publish(SECTION, _report(rows, digest, image_size, args), args, partial=len(rows) < len(whole))


def _kept(output: Path, model: str, weights: Path, cases: Sequence[dict[str, Any]], least: int) -> Path:
    """Name the folder of finished cases.

    Results belong to one model and network, MobileSAM's weights, one state of the code and of the split's data, one
    rule for boxes and, for the times, one device and number of threads.

    Args:
        output: of the script.
        model: fingerprint of the model and its network.
        weights: MobileSAM's.
        cases: of the whole split, so that a part of it is found again.
        least: see ``--least``.
    """
    made_of = fingerprint([code_digest([__file__, scoring.__file__]), data_digest(cases), weights])
    return output / f"{model}-{made_of}-{least}-{device().type}-{torch.get_num_threads()}"


def _network_files(model: Path, network: Path | None) -> list[Path]:
    """Find what describes the network: the given overlay, the one beside the model, or the bundle's inference.json."""
    beside = model.parent / "network.json"
    if network is not None:
        return [network]
    return [beside] if beside.is_file() else [bundle_root() / "configs" / "inference.json"]


@torch.inference_mode()
def _measure(
    network: nn.Module,
    inferers: dict[str, ImageInferer],
    peer: BoxedMobileSAM,
    cases: Sequence[dict[str, Any]],
    folder: Path,
    least: int,
    pictures: int,
) -> list[dict[str, Any]]:
    """Dice and seconds of every method on every case; finished cases are read from ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "cases.csv"
    known = _read(table)
    todo = [case for case in cases if case["case"] not in known]
    logger.info("%d images, %d of them finished before.", len(cases), len(cases) - len(todo))
    if todo:  # the first call of each network allocates and plans
        warm = image_tensor(todo[0]["image"])
        for inferer in inferers.values():
            inferer(warm, network)
        peer.embed(warm)
    begin = printed = time.monotonic()
    for count, case in enumerate(todo, 1):
        truth = read_mask(case["label"], 2)
        image = image_tensor(case["image"])
        boxes = {separate: true_boxes(truth, separate, least) for separate in (True, False)}
        masks, seconds = {}, {}
        for name, inferer in inferers.items():
            start = _now()
            masks[name] = inferer(image, network).argmax(1)[0].to(torch.uint8).cpu().numpy()
            seconds[name] = _now() - start
        start = _now()
        embedding, inner = peer.embed(image)
        shared = _now() - start
        for name, (separate, best) in PEERS.items():
            start = _now()
            masks[name] = peer.segment(embedding, inner, boxes[separate], truth.shape, best)
            seconds[name] = shared + _now() - start
        row: dict[str, Any] = {"case": case["case"], "boxes": len(boxes[True]), "load": machine()["load"] or 0.0}
        row |= {f"dice {name}": score_masks(mask, truth, 2)["mean_dice"] for name, mask in masks.items()}
        row |= {f"seconds {name}": value for name, value in seconds.items()}
        known[case["case"]] = row
        _write(table, list(known.values()))
        if len(known) <= pictures:
            _picture(folder / f"{case['case'].replace('/', '_')}.png", read_image(case["image"]), truth, masks, boxes)
        now = time.monotonic()
        if now - printed > 30 or count == len(todo):
            printed = now
            logger.info(
                "%d of %d images, %s left", count, len(todo), clock((now - begin) / count * (len(todo) - count))
            )
    return [known[case["case"]] for case in cases]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _read(table: Path) -> dict[str, dict[str, Any]]:
    if not table.is_file():
        return {}
    with table.open(newline="", encoding="utf-8") as file:
        rows = [{k: v if k == "case" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return {row["case"]: row for row in rows}


def _write(table: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(table) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _picture(path: Path, image: np.ndarray, truth: np.ndarray, masks: dict[str, np.ndarray], boxes: dict) -> None:
    """Save the truth with its boxes, HSP-SAM and MobileSAM with a box a polyp, side by side; truth is yellow."""
    first = Image.fromarray(overlay(image, None, truth))
    for x0, y0, x1, y1 in boxes[True].tolist():
        ImageDraw.Draw(first).rectangle((x0, y0, x1, y1), outline=(255, 255, 255))
    panels = [np.asarray(first)] + [overlay(image, masks[name], truth) for name in (OURS, next(iter(PEERS)))]
    with atomic_write(path) as part:
        Image.fromarray(np.concatenate(panels, axis=1)).save(part, format="PNG")


def _report(rows: list[dict[str, Any]], digest: str, image_size: int, args: Any) -> str:
    head = ["images", "method", "mean Dice [95 % CI]", "median", f"missed (Dice < {MISSED})"]
    head += ["HSP-SAM minus it [95 % CI]", "HSP-SAM better in", "ms/image, min", "ms/image, median"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["case"].rpartition("/")[0] or "all", []).append(row)
    if len(groups) > 1:
        groups["all"] = rows
    lines = []
    for group, members in groups.items():
        ours = np.array([row[f"dice {OURS}"] for row in members])
        for name in (OURS, ONE_PASS, *PEERS):
            dice = np.array([row[f"dice {name}"] for row in members])
            times = [1e3 * row[f"seconds {name}"] for row in members]
            versus = ("–", "–") if name == OURS else (paired_bootstrap(ours, dice), f"{np.mean(ours > dice):.1%}")
            lines.append([
                f"{group} ({len(members)})", name, paired_bootstrap(dice).unsigned(), float(np.median(dice)),
                f"{np.mean(dice < MISSED):.1%}", *versus, f"{min(times):.0f}", f"{statistics.median(times):.0f}",
            ])  # fmt: skip
    load = statistics.median(row["load"] for row in rows)
    text = (
        f"Split `{args.split}`, scored at stored resolution. HSP-SAM: model {digest} at {image_size} pixels, told "
        "nothing, four mirror images averaged as the bundle does (and in one pass). MobileSAM: official weights at "
        f"{SAM_SIZE} pixels, **given the true boxes** (components of at least {args.least} pixels; `one box`: around "
        "all of them), so its rows are no automatic method. `best of 3`: the mask with the highest predicted IoU. If "
        "the model's epoch was picked on this split, its figures are "
        f"a little too high. Time: picture in memory to mask, batch 1, {PRECISION}, methods interleaved, median "
        f"load {load:.1f}; "
        "where MobileSAM's boxes would come from is not counted."
    )
    return f"{markdown_table(head, lines)}\n{text}\n\n{machine_line()}"


if __name__ == "__main__":
    main()
