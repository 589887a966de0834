"""Lay out many tasks as one folder: what the shipped Proxy Prompt was trained on (``task/many.json`` reads it).

Photographs are copied, volumes become slices, one task a structure; every task keeps its own split. BUSI stays out: it
is the task that ``support_curve.py`` asks about.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

from common import cases_of, shared_folder, start_logging
from slices import write_slices

from hspsam_monai.data import mask_values
from hspsam_monai.files import atomic_write

#: Data set -> cases of its training and validation split that are taken, so that no task outweighs the others.
PICTURES = {"polyp/kvasir": (500, 24), "skin/isic2018": (500, 24)}
#: Set of volumes -> (slices a volume, structure -> label values that make it up).
VOLUMES: dict[str, tuple[int, dict[str, set[int]]]] = {
    "ct/synapse": (
        12,
        {
            "aorta": {1},
            "gallbladder": {2},
            "left_kidney": {3},
            "right_kidney": {4},
            "liver": {5},
            "pancreas": {6},
            "spleen": {7},
            "stomach": {8},
        },
    ),
    "mr/hippocampus": (1, {"hippocampus": {1, 2}, "hippocampus_anterior": {1}, "hippocampus_posterior": {2}}),
}


def main(argv: list[str] | None = None) -> None:
    """Write the folder; what is there already is kept."""
    parser = argparse.ArgumentParser("tasks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shared = shared_folder()
    parser.add_argument("--data", type=Path, default=shared and shared / "data", help="the folder of all data sets")
    parser.add_argument("--output", type=Path, required=True, help="gets TASK/{images,masks,splits.json}")
    parser.add_argument("--seed", type=int, default=0, help="which photographs are taken")
    args = parser.parse_args(argv)
    start_logging()
    for name, counts in PICTURES.items():
        copy_part(args.data / name, args.output / Path(name).name, counts, args.seed)
    for name, (per_volume, structures) in VOLUMES.items():
        write_slices(args.data / name, args.output, structures, per_volume)
    for root in sorted(path for path in args.output.iterdir() if path.is_dir()):
        splits = json.loads((root / "splits.json").read_text())
        print(f"{root.name}: " + ", ".join(f"{len(cases)} {split}" for split, cases in splits.items()))


def copy_part(source: Path, root: Path, counts: tuple[int, int], seed: int) -> None:
    """Copy a seeded part of the cases that show an object, unless it is there."""
    if (root / "splits.json").is_file():
        return
    splits: dict[str, list[str]] = {}
    for split, count in zip(("train", "val"), counts, strict=True):
        cases = [case for case in cases_of(source, split) if mask_values(case["label"]) != {0}]
        cases = sorted(random.Random(seed).sample(cases, min(count, len(cases))), key=lambda case: case["image"])
        for case in cases:
            for kind, file in (("images", Path(case["image"])), ("masks", Path(case["label"]))):
                (root / kind).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, root / kind / file.name)
            splits.setdefault(split, []).append(Path(case["image"]).stem)
    with atomic_write(root / "splits.json") as part:  # last: it marks the data set as whole
        part.write_text(json.dumps(splits, indent=1) + "\n")


if __name__ == "__main__":
    main()
