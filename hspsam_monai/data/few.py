"""A few cases of a data set, drawn by seed: what a training from a handful of masks may see."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hspsam_monai.data.cases import content_hash, find_cases, has_splits
from hspsam_monai.data.images import read_mask
from hspsam_monai.errors import ConfigError, TooFewCasesError

logger = logging.getLogger(__name__)


def few_cases(root: str | Path, split: str, count: int, seed: int = 0, num_classes: int = 2) -> list[Mapping[str, Any]]:
    """Draw from a split of a data set, or from all of one that gives no splits and is too small to be split.

    Args:
        root: data set, see :func:`hspsam_monai.data.find_cases`.
        split: whose cases.
        count: see :func:`draw_cases`, as are the others.
        seed: of the draw.
        num_classes: K, background included.

    Raises:
        ConfigError, DataError: see :func:`draw_cases` and :func:`hspsam_monai.data.find_cases`.
    """
    try:
        return draw_cases(find_cases(root, split), count, seed, num_classes)
    except TooFewCasesError:
        if split != "train" or has_splits(root):
            raise
    logger.warning(
        "%s gives no splits, and the drawn training split has too few cases: the %d are drawn from all, those that "
        "would be validated on among them.",
        root, count,
    )  # fmt: skip
    return draw_cases(find_cases(root, "all"), count, seed, num_classes)


def draw_cases(
    cases: Sequence[Mapping[str, Any]], count: int, seed: int = 0, num_classes: int = 2
) -> list[Mapping[str, Any]]:
    """Draw cases that differ and show an object, every class in at least one of them.

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
        DataError: there are too few different cases with an object, ``count`` of them do not show every class, or a
            file is unreadable.

    Cost: one read of an image and a mask for each case looked at; hardly more than ``count``, or as many as it takes to
    meet every class.
    """
    if count < 1:
        raise ConfigError(f"train_cases is {count}; expected at least 1.")
    seen: set[str] = set()

    def shown(index: int) -> set[int]:
        content = content_hash(Path(cases[index]["image"]))
        found = set() if content in seen else set(np.unique(read_mask(cases[index]["label"], num_classes)).tolist())
        if found - {0}:  # a copy without its object may not hide one that shows it
            seen.add(content)
        return found

    order = np.random.default_rng(seed).permutation(len(cases)).tolist()
    chosen, missing = showing_all(order, shown, count, num_classes)
    if len(chosen) < count:
        raise TooFewCasesError(
            f"Found {len(chosen)} different cases with an object among {len(cases)}; expected {count} (train_cases). "
            "Ask for fewer, or add cases."
        )
    if missing:
        raise TooFewCasesError(
            f"The {count} cases drawn from {len(cases)} show no class {min(missing)}; expected every class in at least "
            "one (train_cases). Ask for more, or add cases that show it."
        )
    return sorted((cases[index] for index in chosen), key=lambda one: one["case"])


def showing_all(
    order: Iterable[int], shown: Callable[[int], set[int]], count: int, num_classes: int
) -> tuple[list[int], set[int]]:
    """Walk cases in an order and choose some that together show every class.

    Those that show a class no case before did come first, then the others with an object, each in the given order: a
    choice of fewer is a part of one of more.

    Args:
        order: cases.
        shown: the classes a case shows; asked once a case, until ``count`` are found and every class is met.
        count: how many to choose; fewer where there are no more.
        num_classes: K, background included.

    Returns:
        The chosen cases, and the classes that none of them shows.
    """
    missing, first, others = set(range(1, num_classes)), [], []
    for index in order:
        classes = shown(index) - {0}
        if classes & missing:
            first.append((index, classes))
            missing -= classes
        elif classes:
            others.append((index, classes))
        if not missing and len(first) + len(others) >= count:
            break
    chosen = (first + others)[:count]
    met = set().union(*(classes for _, classes in chosen))
    return [index for index, _ in chosen], set(range(1, num_classes)) - met
