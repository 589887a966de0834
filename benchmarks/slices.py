"""2-D tasks from volumes: slices as grey pictures, each with the mask of one structure, laid out as a data set.

Proxy Prompt and the baselines it is compared with are 2-D; hippocampus in MR and organs in CT are tasks that look
unlike any photograph. Slices of one volume stay on the volume's side of the split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from hspsam_monai.errors import DataError
from hspsam_monai.files import atomic_write

#: Greys are spread between these percentiles of the volume.
_PERCENTILES = (0.5, 99.5)
#: Pixels a slice must show of a structure; fewer are the rim of it, where partial volume decides the mask.
_LEAST_PIXELS = 16


def write_slices(volumes: Path, folder: Path, values: Mapping[str, set[int]], per_volume: int = 3) -> list[Path]:
    """Write slices of a Decathlon set, one data set a structure, unless they are there.

    Args:
        volumes: folder with ``dataset.json`` and ``splits.json``.
        folder: gets one data set a structure, ``FOLDER/STRUCTURE/{images,masks,splits.json}``.
        values: structure -> label values that make it up.
        per_volume: slices across the third axis, at even distances among those that show the structure.

    Returns:
        The data sets, in the order of ``values``.

    Raises:
        DataError: no volume shows a structure.
    """
    splits = json.loads((volumes / "splits.json").read_text())
    found = []
    for structure, numbers in values.items():
        root = folder / structure
        found.append(root)
        if (root / "splits.json").is_file():
            continue
        names: dict[str, list[str]] = {}
        for split, cases in splits.items():
            for case in cases:
                names.setdefault(split, []).extend(_of_volume(volumes, case, numbers, root, per_volume))
        if not all(names.values()):
            raise DataError(f"{volumes}: found a split without {structure}; expected volumes that show it in each.")
        with atomic_write(root / "splits.json") as part:  # last: it marks the data set as whole
            part.write_text(json.dumps(names, indent=1) + "\n")
    return found


def _of_volume(volumes: Path, case: str, numbers: set[int], root: Path, count: int) -> list[str]:
    image = np.asarray(nibabel.load(volumes / "imagesTr" / f"{case}.nii.gz").dataobj, dtype=np.float32)
    label = np.asarray(nibabel.load(volumes / "labelsTr" / f"{case}.nii.gz").dataobj)
    mask = np.isin(label, list(numbers))
    low, high = np.percentile(image, _PERCENTILES)
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255
    shown = np.flatnonzero(mask.sum((0, 1)) >= _LEAST_PIXELS)
    if not len(shown):
        return []
    places = shown[np.linspace(0, len(shown) - 1, count + 2).round().astype(int)[1:-1]]
    names = []
    for place in sorted(set(places.tolist())):
        names.append(f"{case}_{place:03d}")
        for kind, plane in (("images", grey[:, :, place]), ("masks", mask[:, :, place] * 255)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            # Rows run from the front of the head or body to its back, as radiologists look at slices.
            Image.fromarray(np.rot90(plane).astype(np.uint8)).save(root / kind / f"{names[-1]}.png")
    return names
