"""Every fault of a data set at once, before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hspsam_monai.data.cases import content_hash, draw_sides, sides_of
from hspsam_monai.data.decode import FileFault
from hspsam_monai.data.images import read_image, read_mask, size_text
from hspsam_monai.data.layouts import (
    DECATHLON_FILE,
    SPLITS_FILE,
    VOLUME_SUFFIXES,
    Decathlon,
    Folder,
    is_folder_set,
    overlaps,
    read_decathlon,
    scan,
    sub_sets,
)
from hspsam_monai.data.report import Finding, Report
from hspsam_monai.errors import ConfigError, DataError

_SMALL = 32  # pixels; two tokens of SAM's patch of 16
_HASH_SIDE = 16  # 256 bits
# Differing bits of 256. Among 1880 polyp and skin photographs the five pairs within 15 were copies, the next
# pair came above 25; successive video frames begin at 2.
_NEAR = 12
_AFFINE_TOLERANCE = 1e-3  # mm; headers store float32

Progress = Callable[[int, int], None]


def check_dataset(
    root: str | Path,
    num_classes: int = 2,
    labels: Mapping[Any, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read a whole data set and list everything that is wrong with it.

    Every picture and mask is decoded completely, one at a time. Of NIfTI volumes only the headers are read.

    Faults: ``layout``, ``splits``, ``no_cases``, ``same_name``, ``missing_mask``, ``missing_image``,
    ``missing`` (a broken link or a listed file), ``zero_bytes``, ``unreadable``, ``multi_page``, ``nan``,
    ``size_mismatch``, ``affine_mismatch``, ``unknown_label``, ``split_overlap``, ``split_missing_case``,
    ``duplicate`` (byte-identical images in train and another split), ``empty_class`` (in no mask of train, or
    in no mask at all without given splits).

    Warnings: ``duplicate`` (within a split), ``near_duplicate`` (looks the same, on two sides; without given
    splits, in the default draw of ``find_cases``), ``small_image`` (a side under 32 pixels),
    ``not_in_split``.

    Args:
        root: a data set of a layout that ``find_cases`` reads with labels.
        num_classes: classes with background, 2 to 256.
        labels: names of the classes, ``{1: "polyp"}`` or ``{"polyp": 1}``, for the messages.
        progress: called with (cases done, cases in all) after each case.

    Returns:
        The report; faults of the data never raise.

    Raises:
        ConfigError: `num_classes` out of range.
    """
    if not 2 <= num_classes <= 256:
        raise ConfigError(f"num_classes is {num_classes}; expected 2 to 256, background included.")
    root = Path(root).expanduser()
    check = _Check(root, Report(str(root)), num_classes, _class_names(labels))
    try:
        folders = _folders(check)
        decathlon = None if folders else read_decathlon(root if root.is_file() else root / DECATHLON_FILE)
    except DataError as error:
        check.fault("layout", root, str(error))
        return check.report
    if decathlon is not None:
        jobs = _decathlon_jobs(check, decathlon)
    else:
        jobs = [job for folder in folders for job in _folder_jobs(check, folder)]
    if not jobs and check.report.ok:
        check.fault("no_cases", root, "found no case; expected at least one. Check the path.")
    for done, job in enumerate(jobs, start=1):
        _check_case(check, job)
        if progress is not None:
            progress(done, len(jobs))
    _check_set(check, jobs)
    return check.report


@dataclass
class _Job:
    """One case and what reading it showed."""

    case: str
    image: Path
    masks: list[Path]
    split: str | None = None  # None: no splits are given
    prefix: str = ""  # of its folder in a union: each has its own splits or draw
    digest: str = ""
    bits: np.ndarray | None = None
    classes: set[int] = field(default_factory=set)


@dataclass
class _Check:
    root: Path
    report: Report
    num_classes: int
    names: dict[int, str]

    def fault(self, kind: str, file: Path | str, message: str) -> None:
        self.report.faults.append(Finding(kind, self._short(file), message))

    def warn(self, kind: str, file: Path | str, message: str) -> None:
        self.report.warnings.append(Finding(kind, self._short(file), message))

    def file_fault(self, error: FileFault) -> None:
        self.fault(error.kind, Path(error.path), f"found {error.sentence}")

    def count(self, name: str, number: int = 1) -> None:
        self.report.counts[name] = self.report.counts.get(name, 0) + number

    def _short(self, file: Path | str) -> str:
        if isinstance(file, Path) and file.is_relative_to(self.root) and file != self.root:
            return file.relative_to(self.root).as_posix()
        return str(file)


def _class_names(labels: Mapping[Any, Any] | None) -> dict[int, str]:
    """Read ``{1: "polyp"}``, ``{"1": "polyp"}`` and ``{"polyp": 1}`` alike."""
    names: dict[int, str] = {}
    for key, value in (labels or {}).items():
        number, name = (key, value) if str(key).isdigit() else (value, key)
        if str(number).isdigit():
            names[int(number)] = str(name)
    return names


def _folders(check: _Check) -> list[Folder]:
    """Folder data sets at the root; empty when it is a Decathlon list."""
    root = check.root
    if root.is_file() or (root / DECATHLON_FILE).is_file():
        return []
    if not root.is_dir():
        raise DataError("found no such file or folder; expected a data set. Check the path.")
    if is_folder_set(root):
        return [_scan(check, root, "")]
    folders = [_scan(check, sub, f"{sub.name}/") for sub in sub_sets(root)]
    if not folders:
        raise DataError(
            f"found no images/ + masks/ and no {DECATHLON_FILE}; expected one of them, or folders with them. "
            "Arrange the data so."
        )
    return folders


def _scan(check: _Check, root: Path, prefix: str) -> Folder:
    """List one data set; broken splits are a fault like others and do not end the check."""
    try:
        return scan(root, prefix)
    except DataError as error:
        check.fault("splits", root / SPLITS_FILE, str(error))
        return scan(root, prefix, with_splits=False)


def _folder_jobs(check: _Check, folder: Folder) -> list[_Job]:
    for path in folder.twins:
        check.fault("same_name", path, "found another image of this name; expected one. Rename or remove it.")
    for path in folder.orphans:
        check.fault("missing_image", path, "found a mask without image; expected images/ to have its name. Add it.")
    side = _sides(check, folder.splits, set(folder.images), folder.root)
    jobs = []
    for stem, image in sorted(folder.images.items()):
        masks = folder.masks.get(stem, [])
        split = None if side is None else side.get(stem, "")
        if not masks:
            # An image that no split names is never asked for its mask.
            tell = check.warn if split == "" else check.fault
            tell(
                "missing_mask",
                image,
                "found no mask; expected masks/ to have one of this name. Add it (all zero only if nothing is to be "
                "found there), or move the image away.",
            )
        jobs.append(_Job(folder.prefix + stem, image, masks, split, folder.prefix))
    return jobs


def _decathlon_jobs(check: _Check, data: Decathlon) -> list[_Job]:
    if not check.names:
        check.names = _class_names(data.labels)
    splits = data.splits
    if splits is None and "validation" in data.lists:
        splits = {"train": data.lists.get("training", []), "val": data.lists["validation"]}
    tests = set(data.lists.get("test", []))
    side = _sides(check, splits, set(data.items), data.path, tests)
    jobs = []
    for name, item in data.items.items():
        label = item.get("label")
        masks = [] if label is None else label if isinstance(label, list) else [label]
        if not masks and name not in tests:
            check.fault("missing_mask", item["image"], "found no label in the list; expected one. Add it.")
        without = "test" if name in tests else None  # no split is drawn for what is only to be tested
        jobs.append(_Job(name, item["image"], masks, without if side is None else side.get(name, "")))
    return jobs


def _sides(
    check: _Check,
    splits: dict[str, list[str]] | None,
    cases: set[str],
    where: Path,
    unlisted: set[str] = frozenset(),
) -> dict[str, str] | None:
    """Check given splits; case -> split (``train`` and ``val`` win over folds and samples)."""
    if splits is None:
        return None
    for name in overlaps(splits):
        check.fault(
            "split_overlap",
            name,
            f"found in train and in val or test of {where.name}; expected one. Correct the splits.",
        )
    side: dict[str, str] = {}
    for split in sorted(splits, key=lambda key: (key != "train", key != "val", key)):
        for name in splits[split]:
            if name not in cases:
                check.fault(
                    "split_missing_case",
                    name,
                    f"found in split {split!r} of {where.name} without image; "
                    "expected an existing case. Correct the splits.",
                )
            else:
                side.setdefault(name, split)
        check.count(f"split_{split}", len(set(splits[split]) & cases))
    for name in sorted(cases - set(side) - unlisted):
        check.warn("not_in_split", name, "found in no split; expected one. It is used by split 'all' only.")
    return side


def _check_case(check: _Check, job: _Job) -> None:
    check.count("cases")
    if job.image.name.lower().endswith(VOLUME_SUFFIXES):
        from hspsam_monai.data.check_volumes import check_volume_case

        check.count("volumes")
        for error in check_volume_case(job.image, job.masks, _AFFINE_TOLERANCE):
            check.file_fault(error)
        return
    size = _check_image(check, job)
    for path in job.masks:
        try:
            mask = read_mask(path, check.num_classes)
        except FileFault as error:
            check.file_fault(error)
            continue
        if size is not None and size_text(mask) != size:
            check.fault(
                "size_mismatch",
                path,
                f"found {size_text(mask)} pixels; expected {size} as its image. Export it again.",
            )
        pixels = np.bincount(mask.ravel(), minlength=check.num_classes)
        job.classes |= set(np.flatnonzero(pixels).tolist())
        for number in range(check.num_classes):
            check.count(f"pixels_of_class_{number}", int(pixels[number]))
    if job.classes == {0}:
        check.count("empty_masks")


def _check_image(check: _Check, job: _Job) -> str | None:
    """Decode the image of a case; its size as text, or None if unreadable."""
    try:
        image = read_image(job.image)
        job.digest = content_hash(job.image)
    except FileFault as error:
        check.file_fault(error)
        return None
    except DataError as error:
        check.fault("unreadable", job.image, str(error))
        return None
    if min(image.shape[:2]) < _SMALL:
        check.warn(
            "small_image",
            job.image,
            f"found {size_text(image)} pixels; expected {_SMALL} or more. Check its source.",
        )
    job.bits = _picture_hash(image)
    return size_text(image)


def _picture_hash(image: np.ndarray) -> np.ndarray:
    """Difference hash (256,): 1 where one of 16x17 averaged cells is brighter than its left one, else -1."""
    grey = Image.fromarray((image.mean(-1) * 255).astype(np.uint8))
    cells = np.asarray(grey.resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    return np.where(cells[:, 1:] > cells[:, :-1], 1, -1).ravel().astype(np.float32)


def _check_set(check: _Check, jobs: list[_Job]) -> None:
    """Faults that show only in the whole set."""
    readable = [job for job in jobs if job.digest]
    given = any(job.split not in {None, "test"} for job in jobs)
    _draw(readable)
    _check_duplicates(check, readable)
    _check_near(check, readable)
    pictures = [job for job in jobs if job.classes]
    training = [job for job in pictures if not given or job.split == "train"]
    present = set().union(*(job.classes for job in training)) if training else set()
    for number in range(1, check.num_classes) if pictures else ():
        if number not in present:
            name = check.names.get(number, "")
            check.fault(
                "empty_class",
                f"class {number} {name}".strip(),
                f"found in none of {len(training)} {'train ' if given else ''}masks; expected it in some. "
                "Check the labels and the number of classes.",
            )


def _draw(jobs: list[_Job]) -> None:
    """Give cases without a split the side that ``find_cases`` would draw."""
    splits: dict[str, list[str]] = {}
    sets: dict[str, dict[str, str]] = {}
    for job in jobs:
        if job.split is None:
            sets.setdefault(job.prefix, {})[job.case] = job.digest
        elif job.split:
            splits.setdefault(job.split, []).append(job.case)
    # A list's own test cases are not asked where no split is given: a copy of one among the others is a fault.
    known = sides_of({job.case: job.digest for job in jobs if job.split and job.prefix not in sets}, splits)
    sides = {case: side for own in draw_sides(list(sets.values()), 0.2, 0, known) for case, side in own.items()}
    for job in jobs:
        job.split = sides.get(job.case, job.split)


def _check_duplicates(check: _Check, jobs: list[_Job]) -> None:
    first: dict[str, list[_Job]] = {}
    for job in jobs:
        twins = first.setdefault(job.digest, [])
        other = next((twin for twin in twins if _leaks(twin, job)), twins[0] if twins else None)
        if other is not None and _leaks(other, job):
            check.fault(
                "duplicate",
                job.image,
                f"found the same bytes as {other.case} ({other.split}), but in {job.split}; expected both on "
                "one side, or scores are too good. Move one.",
            )
        elif other is not None:
            check.warn("duplicate", job.image, f"found the same bytes as {other.case}; expected it once. Remove one.")
        twins.append(job)


def _leaks(one: _Job, other: _Job) -> bool:
    return one.split != other.split and "train" in {one.split, other.split} and "" not in {one.split, other.split}


def _check_near(check: _Check, jobs: list[_Job]) -> None:
    train = [job for job in jobs if job.split == "train"]
    if not train:
        return
    bits = np.stack([job.bits for job in train])
    for job in jobs:
        if job.split in {"train", ""} or job.bits is None:
            continue
        distance = (bits.shape[1] - bits @ job.bits) / 2
        best = int(distance.argmin())
        if distance[best] <= _NEAR and train[best].digest != job.digest:
            check.warn(
                "near_duplicate",
                job.image,
                f"found in {job.split} and looks like {train[best].case} in train ({int(distance[best])} of "
                f"{bits.shape[1]} bits differ); expected other patients. "
                "Keep them on one side with a splits.json.",
            )
