"""A few cases of a data set, drawn by seed: what a training from a handful of masks may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hspsam_monai.data.cases import content_hash
from hspsam_monai.data.images import read_mask
from hspsam_monai.errors import ConfigError, DataError


def draw_cases(
    cases: Sequence[Mapping[str, Any]], count: int, seed: int = 0, num_classes: int = 2
) -> list[Mapping[str, Any]]:
    """Draw cases that differ and show an object.

    A draw of fewer cases with the same seed is a part of a draw of more, so that curves over the number are nested.

    Args:
        cases: of one split, from :func:`hspsam_monai.data.find_cases`.
        count: how many.
        seed: of the draw.
        num_classes: K, background included, to read the masks.

    Returns:
        ``count`` of the cases, sorted by name.

    Raises:
        ConfigError: ``count`` is below 1.
        DataError: there are too few different cases with an object, or a file is unreadable.

    Cost: one read of an image and a mask for each case looked at, hardly more than ``count``.
    """
    if count < 1:
        raise ConfigError(f"train_cases is {count}; expected at least 1.")
    chosen: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    for index in np.random.default_rng(seed).permutation(len(cases)).tolist():
        case = cases[index]
        content = content_hash(Path(case["image"]))
        if content in seen or not read_mask(case["label"], num_classes).any():
            continue
        seen.add(content)
        chosen.append(case)
        if len(chosen) == count:
            return sorted(chosen, key=lambda one: one["case"])
    raise DataError(
        f"Found {len(chosen)} different cases with an object among {len(cases)}; expected {count} (train_cases). Ask "
        "for fewer, or add cases."
    )
