"""One Proxy Prompt on a task it has never seen: Dice against the number of supports, without training.

For each draw, supports come from the training split of the unseen task (a draw of fewer is part of the draw of more),
give the network its context, and the validation split is segmented. Nothing of the task was seen in training or chooses
anything. Two references that need no generator stand beside the curve: ``copy``, the supports' mean mask whatever
the image shows, and ``nearest``, the masks of the supports' cells most alike (the selective map without CSM and CCM).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scoring
import torch
from common import argument_parser, cases_of, data_digest, shared_folder, start_logging
from results import machine_line, markdown_table, publish
from scoring import MISSED, device, image_tensor, known_dice, load_network, paired_bootstrap, score_cases
from studies import code_digest
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.data import draw_cases, mask_values, read_mask
from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.contextual_selection import SHARPNESS, read_values, selective_map, unit_cells
from hspsam_monai.transforms import fit_image

SECTION = "support-curve"
#: Data set below ``--data`` that no training of the shipped Proxy Prompt has seen.
UNSEEN = "ultrasound/busi"
SUPPORTS = (1, 4, 16)
METHODS = ("proxy", "nearest", "copy")


def main(argv: list[str] | None = None) -> None:
    """Score the curve and print its table."""
    parser = argument_parser("support_curve", __doc__)
    shared = shared_folder()
    parser.set_defaults(data=shared and shared / "data")
    parser.add_argument("--model", type=Path, help="folder of a training run; default: the shipped Proxy Prompt")
    parser.add_argument("--unseen", nargs="+", default=[UNSEEN], metavar="FOLDER", help="data sets below --data")
    parser.add_argument("--supports", nargs="+", type=int, default=list(SUPPORTS), help="K")
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2], help="seeds of the supports")
    args = parser.parse_args(argv)
    start_logging()

    network, size, files = _network(args.model)
    # Scores belong to one model, one state of the code and one state of the data.
    kept = args.output / code_digest([*files, __file__, scoring.__file__])
    tables = []
    for name in args.unseen:
        train, val = (cases_of(args.data / name, split) for split in ("train", "val"))
        tests = [case for case in val if mask_values(case["label"]) != {0}]
        folder = kept / f"{Path(name).name}-{data_digest([*train, *val])}"
        scores = {}
        for draw in args.draws:
            for count in sorted(set(args.supports)):
                supports = draw_cases(train, count, draw)
                for method, candidate in _candidates(network, size, supports).items():
                    table = folder / f"{method}-{count}-{draw}.csv"
                    if known_dice(table, tests) is None:
                        score_cases(candidate, size, 2, tests, table)
                    scores[method, count, draw] = known_dice(table, tests)
        tables.append(_report(name, sorted(set(args.supports)), args.draws, scores))
    trained = _trained(args.model)
    publish(SECTION, "\n\n".join([*tables, trained, machine_line()]), args)


def _network(model: Path | None) -> tuple[nn.Module, int, list[Path]]:
    """Load a Proxy Prompt; returns it, its size in pixels, and the files it is made of."""
    if model is not None:
        weights, configs = model / "model.pt", [model / "network.json"]
    else:
        folder = bundle_root() / "configs"
        weights = bundle_root() / "models" / "proxy_prompt.safetensors"
        configs = [folder / "inference.json", folder / "network" / "proxy_prompt.json"]
    network, size, classes = load_network(weights, configs)
    if not hasattr(network, "set_context") or classes != 2:
        raise ConfigError(f"{type(network).__name__} of {classes} classes; expected a Proxy Prompt of one object.")
    return network, size, [weights, *configs]


class _Copy(nn.Module):
    """The mean mask of the supports, whatever the image shows."""

    def __init__(self, masks: Tensor) -> None:
        super().__init__()
        self.mean = masks.mean(0)[None, None]

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 2, H, W) of an image (B, 3, H, W)."""
        logits = torch.logit(self.mean, eps=1e-4).expand(len(image), -1, -1, -1)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


class _Nearest(nn.Module):
    """The share of mask in the supports' cells most alike; CSM's selective map with nothing learned."""

    def __init__(self, network: nn.Module, images: Tensor, masks: Tensor) -> None:
        super().__init__()
        self.network, self.top_k = network, network.csm.top_k
        embeddings = [network.encoder.embedding_of(network.encode(image[None]).features) for image in images]
        self.keys = torch.cat([unit_cells(embedding)[0] for embedding in embeddings])[None]
        self.values = F.adaptive_avg_pool2d(masks[:, None], embeddings[0].shape[-2:]).reshape(1, -1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 2, H, W) of an image (B, 3, H, W)."""
        embedding = self.network.encoder.embedding_of(self.network.encode(image).features)
        weights, index = selective_map(unit_cells(embedding), self.keys, self.top_k, SHARPNESS)
        share = read_values(self.values, weights, index).transpose(1, 2).unflatten(2, tuple(embedding.shape[-2:]))
        share = F.interpolate(share, image.shape[-2:], mode="bilinear", align_corners=False)
        logits = torch.logit(share, eps=1e-4)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


@torch.no_grad()
def _candidates(network: nn.Module, size: int, supports: Sequence[Mapping[str, Any]]) -> dict[str, nn.Module]:
    images = [image_tensor(case["image"])[0] for case in supports]
    masks = [torch.from_numpy(read_mask(case["label"], 2)).to(device()) for case in supports]
    network.set_context(images, masks)
    fitted = torch.cat([fit_image(image[None], size) for image in images])
    drawn = torch.cat([F.interpolate(mask[None, None].float(), (size, size), mode="nearest-exact") for mask in masks])
    return {"proxy": network, "nearest": _Nearest(network, fitted, drawn[:, 0]), "copy": _Copy(drawn[:, 0])}


def _report(name: str, counts: Sequence[int], draws: Sequence[int], scores: dict) -> str:
    rows = []
    for method in METHODS:
        before = None
        for count in counts:
            runs = [scores[method, count, draw] for draw in draws]
            means = [float(np.mean(list(run.values()))) for run in runs]
            spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
            missed = np.mean([np.mean(np.array(list(run.values())) < MISSED) for run in runs])
            own = np.mean([list(run.values()) for run in runs], axis=0)
            step = "–" if before is None else str(paired_bootstrap(own, before))
            rows.append([method, count, *means, f"{statistics.mean(means):.4f}{spread}", f"{missed:.1%}", step])
            before = own
    head = ["method", "supports", *(f"Dice, draw {draw}" for draw in draws), "mean ± sd over draws"]
    head += [f"missed (Dice < {MISSED})", "step from the row above [95 % CI over images]"]
    number = len(scores[METHODS[0], counts[0], draws[0]])
    return (
        f"{name}, validation split, {number} images with an object. Dice is the per-image mean at stored resolution, "
        f"one pass.\n\n{markdown_table(head, rows)}"
    )


def _trained(model: Path | None) -> str:
    record = (model or bundle_root() / "docs" / "training" / "proxy_prompt") / "splits.json"
    if not record.is_file():
        return ""
    names = {case.rpartition("/")[0] for case in json.loads(record.read_text())["train"]}
    return f"Tasks the generator was trained on: {', '.join(sorted(names))}."


if __name__ == "__main__":
    main()
