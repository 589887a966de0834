"""What the command line looks through before a run: faults of a data set, and cases a model was trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hspsam_monai.cli.console import progress, tell
from hspsam_monai.errors import DataError

logger = logging.getLogger(__name__)


def warn_of_trained(folder: Path, data: str, split: str) -> None:
    """Say how many of the cases a model was trained on, by the record beside it; a drawn split moves as a set grows.

    By name, and by bytes as long as the run's own data is still there: other sets number their images from 1, too.
    """
    from hspsam_monai.data import find_cases
    from hspsam_monai.data.cases import content_hash
    from hspsam_monai.data.layouts import SPLITS_FILE, some

    record = folder / SPLITS_FILE
    if not record.is_file():
        return
    try:
        cases = find_cases(data, split)
    except DataError:
        return  # the evaluation says it
    trained = set(json.loads(record.read_text(encoding="utf-8")).get("train", ()))
    images = _images_of_run(folder)

    def same(case: Mapping[str, Any]) -> bool:
        own = images.get(case["case"])
        return own is None or own == Path(case["image"]) or content_hash(own) == content_hash(Path(case["image"]))

    known = [case["case"] for case in cases if case["case"] in trained and same(case)]
    if known:
        logger.warning(
            "%d of the %d cases of split %s are among those this model was trained on, by %s (%s). Their scores are "
            "too good: give the data set the %s of the run.",
            len(known), len(cases), split, "name and content" if images else "name", some(known), record,
        )  # fmt: skip


def _images_of_run(folder: Path) -> dict[str, Path]:
    """Case -> image of the data a run was trained on; nothing where that is gone."""
    from hspsam_monai.data import find_cases

    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dataset_dir"]
        return {case["case"]: Path(case["image"]) for case in find_cases(data, "all", labels=False)}
    except (OSError, KeyError, DataError):
        return {}


def class_count(labels: Mapping[str, int], num_classes: Any) -> int:
    """Classes with background: as configured, or one a label where that is an expression."""
    return num_classes if isinstance(num_classes, int) else len(labels)


def require_readable(cases: Sequence[Mapping[str, Any]], num_classes: int) -> None:
    """Read every image and mask once, as minutes of scoring would else end at the first that cannot be read.

    Raises:
        DataError: files that cannot be read, or a mask and an image of different sizes; all are named.
    """
    from hspsam_monai.data import read_image, read_mask

    faults = []
    with progress("Reading") as bar:
        for done, case in enumerate(cases, 1):
            try:
                height, width, _ = read_image(case["image"]).shape
                h, w = read_mask(case["label"], num_classes).shape
                if (h, w) != (height, width):
                    faults.append(
                        f"{case['case']}: found a mask of {w} x {h} pixels for an image of {width} x {height}; "
                        "expected equal sizes."
                    )
            except DataError as error:
                faults.append(f"{case['case']}: {error}")
            bar(done, len(cases))
    if faults:
        for fault in faults:
            logger.error("%s", fault)
        raise DataError(
            f"{len(faults)} of {len(cases)} cases cannot be scored: {' '.join(faults[:3])}"
            f"{' …' if len(faults) > 3 else ''} Mend or remove them; `hspsam check` looks at all splits."
        )


def require_good_data(data: str | Path, labels: Mapping[str, int], num_classes: Any) -> None:
    """Look through a data set; list its faults and refuse it if there are any.

    Raises:
        DataError: there is at least one fault, or a volume.
    """
    from hspsam_monai.data import check_dataset

    classes = class_count(labels, num_classes)
    with progress(f"Checking {Path(data).name}") as bar:
        report = check_dataset(data, classes, labels, bar)
    if not report.ok:
        tell(report.table())
        raise DataError(
            f"{data} has faults ({len(report.faults)}), listed above. Mend them (train --no-check goes on regardless)."
        )
    if volumes := report.counts.get("volumes", 0):
        raise DataError(
            f"{data}: found {volumes} volumes; expected pictures to train on. Export the slices, such as PNG, to "
            "images/ and masks/."
        )
    logger.info("Checked %d cases: no faults, %d warnings.", report.counts.get("cases", 0), len(report.warnings))
