"""Folders of masks against folders of masks: which prediction belongs to which label, and their scores."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from hspsam_monai.data.images import read_mask
from hspsam_monai.data.layouts import DECATHLON_FILE, VOLUME_SUFFIXES, is_folder_set, read_decathlon, scan, sub_sets
from hspsam_monai.errors import DataError
from hspsam_monai.scores import CaseScore, score_masks

#: Folders of masks inside a data set.
MASK_FOLDERS = ("masks", "labelsTr")
MASK_SUFFIXES = (*VOLUME_SUFFIXES, ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")


def score_folders(
    predictions: str | Path,
    labels: str | Path,
    num_classes: int,
    *,
    cases: Iterable[str] | None = None,
    partial: bool = False,
    surface: bool = False,
    tolerance: float = 1.0,
) -> list[CaseScore]:
    """Score a folder of predicted masks against a folder of true ones.

    Files pair by their path inside the folder without suffix, so trees (``source/ID.png``) pair too. Where a folder
    holds ``masks/`` or ``labelsTr/``, only what lies in there counts; the labels of a data set pair by case, several
    masks a case included. Pictures are palette or 0/255 masks; volumes are NIfTI and bring their spacing.

    Args:
        predictions: folder, or one file.
        labels: folder, or one file.
        num_classes: K, background included.
        cases: score these stems only (the cases of a split); each needs both files.
        partial: accept labels without a prediction; refused otherwise, since missing cases flatter the mean.
        surface: also HD95 and NSD, see :func:`score_masks`.
        tolerance: of NSD, in mm for volumes and pixels for pictures.

    Raises:
        DataError: names every file that is unpaired, unreadable or does not match its partner, all at once.
    """
    (found, _), (wanted, own_names) = _label_files(Path(predictions)), _label_files(Path(labels))
    # A prediction may also be called as the mask is.
    found = {own_names.get(name, name) if name not in wanted else name: file for name, file in found.items()}
    if Path(predictions).is_file() and Path(labels).is_file() and found and wanted:
        wanted = dict(zip(found, wanted.values(), strict=True))  # two single files pair whatever their names
    chosen = {*found, *wanted} if cases is None else set(cases)
    faults = [f"{name}: neither predicted nor labelled" for name in sorted(chosen - {*found, *wanted})]
    found, wanted = ({name: f for name, f in files.items() if name in chosen} for files in (found, wanted))
    faults += [f"{_first(found[name])}: no label of this name" for name in sorted(found.keys() - wanted.keys())]
    missed = [] if partial else sorted(wanted.keys() - found.keys())
    faults += [f"{_first(wanted[name])}: no prediction of this name" for name in missed]
    rows = []
    for name in sorted(found.keys() & wanted.keys()):
        try:
            pred, truth, spacing = _read_pair(found[name], wanted[name], num_classes)
            scores = score_masks(pred, truth, num_classes, spacing, surface=surface, tolerance=tolerance)
            rows.append(CaseScore.from_scores(name, _first(found[name]), scores))
        except DataError as error:
            faults.append(f"{_first(found[name])}: {error}")
    if not rows and not faults:
        faults.append(f"no mask ({', '.join(MASK_SUFFIXES)}) in {predictions} and {labels}")
    if faults:
        raise DataError("These masks cannot be scored:\n  " + "\n  ".join(faults))
    return rows


def _label_files(root: Path) -> tuple[dict[str, Path | list[Path]], dict[str, str]]:
    """Masks of a data set that :func:`hspsam_monai.data.find_cases` knows, or of a folder of masks alone.

    Returns:
        Case name -> its mask or masks; and, of masks that the data set gives to a case, their own name -> the case's.
    """
    decathlon = root if root.suffix.lower() == ".json" else root / DECATHLON_FILE
    if decathlon.is_file():
        items = read_decathlon(decathlon).items
        cases = {name: _as_list(item["label"]) for name, item in items.items() if "label" in item}
        others = _mask_files(decathlon.parent) if (decathlon.parent / "labelsTr").is_dir() else {}
        return _named_by_case(others, cases)
    found = _mask_files(root)
    folders = [scan(root, with_splits=False)] if is_folder_set(root) else []
    if not folders and root.is_dir():
        folders = [scan(sub, f"{sub.name}/", with_splits=False) for sub in sub_sets(root)]
    cases = {folder.prefix + stem: masks for folder in folders for stem, masks in folder.masks.items()}
    return _named_by_case(found, cases)


def _named_by_case(
    found: Mapping[str, Path], cases: Mapping[str, list[Path]]
) -> tuple[dict[str, Path | list[Path]], dict[str, str]]:
    case_of = {path: name for name, masks in cases.items() for path in masks}
    own_names = {name: case_of[path] for name, path in found.items() if path in case_of}
    single = {name: masks[0] if len(masks) == 1 else masks for name, masks in cases.items()}
    return {name: path for name, path in found.items() if path not in case_of} | single, own_names


def _as_list(label: Path | list[Path]) -> list[Path]:
    return label if isinstance(label, list) else [label]


def _first(label: Path | list[Path]) -> Path:
    return label[0] if isinstance(label, list) else label


def _mask_files(root: Path) -> dict[str, Path]:
    """Case name -> mask file, for a folder (searched to the bottom) or one file."""
    if not root.exists():
        raise DataError(f"{root} does not exist; expected a folder of masks or one mask.")
    base, files = (root.parent, [root]) if root.is_file() else (root, sorted(root.rglob("*")))
    paths = [f.relative_to(base) for f in files if f.is_file() and f.name.lower().endswith(MASK_SUFFIXES)]
    paths = [p for p in paths if not any(part.startswith(".") for part in p.parts)]  # unfinished writes
    if (base / "gallery.html").is_file():  # a run's contact sheet may lie among its masks, which have a palette
        paths = [p for p in paths if p != Path("gallery.png") or not _is_sheet(base / p)]
    paths = [p for p in paths if set(p.parent.parts) & set(MASK_FOLDERS)] or paths
    named: dict[str, Path] = {}
    twice = []
    for path in paths:
        suffix = next(s for s in MASK_SUFFIXES if path.name.lower().endswith(s))
        parts = [part for part in path.parent.parts if part not in MASK_FOLDERS]
        name = "/".join([*parts, path.name[: -len(suffix)]])
        if name in named:
            twice.append(f"{named[name]} and {base / path} are both {name}")
        named[name] = base / path
    if twice:
        raise DataError("Each case needs one mask:\n  " + "\n  ".join(twice))
    return named


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.mode == "RGB"
    except OSError:
        return False  # reading it as a mask names the fault


def _read_pair(
    pred: Path | list[Path], truth: Path | list[Path], num_classes: int
) -> tuple[np.ndarray, np.ndarray, list[float] | None]:
    """Read a prediction and its truth; volumes bring the spacing of their common grid."""
    volumes = [_first(files).name.lower().endswith(VOLUME_SUFFIXES) for files in (pred, truth)]
    if not any(volumes):
        return read_mask(pred, num_classes), read_mask(truth, num_classes), None
    if not all(volumes):
        raise DataError(f"one of it and {_first(truth)} is a picture, the other a volume.")
    if isinstance(pred, list) or isinstance(truth, list):
        raise DataError(f"its case has several volumes (label {_first(truth)}); expected one.")
    (pred_grid, pred_affine), (truth_grid, truth_affine) = (_read_volume(file) for file in (pred, truth))
    # A thousandth of a mm: headers store float32, and two writers round differently.
    if pred_grid.shape == truth_grid.shape and not np.allclose(pred_affine, truth_affine, atol=1e-3, rtol=0):
        raise DataError(f"its affine differs from that of {truth}; resample it to the grid of the label.")
    return pred_grid, truth_grid, np.linalg.norm(truth_affine[:3, :3], axis=0).tolist()


def _read_volume(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Class indices (X, Y, Z) and affine (4, 4) of a NIfTI label."""
    try:
        volume = nibabel.load(file)
        values = np.asarray(volume.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise DataError(f"{file} cannot be read as NIfTI: {error}") from error
    if values.dtype.kind == "f":  # some tools store labels as float or with a scale factor
        if not np.array_equal(np.rint(values), values):
            raise DataError(f"{file} holds values that are not whole numbers; expected class indices.")
        values = values.astype(np.int64)
    return values, np.asarray(volume.affine)
