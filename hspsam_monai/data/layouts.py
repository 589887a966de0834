"""What lies in a data folder: pictures, their masks and splits, found without judging them.

:mod:`hspsam_monai.data.cases` raises on the first fault found here, :mod:`hspsam_monai.data.check` lists all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hspsam_monai.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
VOLUME_SUFFIXES = (".nii.gz", ".nii")
SPLITS_FILE = "splits.json"
DECATHLON_FILE = "dataset.json"

_IGNORED = {"thumbs.db", "desktop.ini"}
# A mask's name without these is its image's name; tried in this order, the whole name first.
_MASK_TAILS = (re.compile(r"_mask$"), re.compile(r"_mask_\d+$"), re.compile(r"_\d+$"))
_LISTED = 5


@dataclass
class Folder:
    """One data set of layout ``images/`` + ``masks/``.

    Args:
        root: its folder.
        prefix: goes before each stem in a case's name, such as ``"kvasir/"``.
        images: stem -> picture.
        masks: stem of an image -> its masks, sorted; only stems of `images`.
        orphans: masks without an image.
        twins: pictures whose stem another picture already has.
        splits: split name -> stems, or None without a ``splits.json``.
    """

    root: Path
    prefix: str = ""
    images: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, list[Path]] = field(default_factory=dict)
    orphans: list[Path] = field(default_factory=list)
    twins: list[Path] = field(default_factory=list)
    splits: dict[str, list[str]] | None = None


def some(names: Iterable[object]) -> str:
    """List the first five names and how many more there are, for an error message."""
    names = [str(name) for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def entries(folder: Path) -> list[Path]:
    """Visible entries of a folder, sorted by name; hidden files and system litter are left out."""
    try:
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(
            f"{folder}: found a folder that cannot be listed ({error}); expected a readable one. Check its permissions."
        ) from error
    return [path for path in found if not path.name.startswith(".") and path.name.lower() not in _IGNORED]


def pictures(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """Files named like pictures, sorted; broken links are among them, so that they get reported."""
    return [path for path in entries(folder) if path.name.lower().endswith(suffixes) and not path.is_dir()]


def stem_of(path: Path | PurePosixPath) -> str:
    """File name without picture or volume suffix (``a.nii.gz`` -> ``a``)."""
    name = path.name
    for suffix in (*VOLUME_SUFFIXES, *IMAGE_SUFFIXES):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def is_folder_set(root: Path) -> bool:
    """Whether `root` has ``images/`` and ``masks/``."""
    return (root / "images").is_dir() and (root / "masks").is_dir()


def sub_sets(root: Path) -> list[Path]:
    """Sub-folders with ``images/`` and ``masks/``, one level down, each real folder once."""
    found: dict[Path, Path] = {}
    for path in entries(root):
        if path.is_dir() and is_folder_set(path):
            found.setdefault(path.resolve(), path)  # two links to one folder would double its cases
    return list(found.values())


def scan(root: Path, prefix: str = "", *, with_splits: bool = True) -> Folder:
    """List one data set of ``images/`` (+ ``masks/``, + ``splits.json``); no picture is opened.

    Raises:
        DataError: a folder cannot be listed, or ``splits.json`` is not of its form.
    """
    folder = Folder(root, prefix, splits=read_splits(root) if with_splits else None)
    for path in pictures(root / "images"):
        stem = stem_of(path)
        if stem in folder.images:
            folder.twins.append(path)
        else:
            folder.images[stem] = path
    if not (root / "masks").is_dir():
        return folder
    masks = [(stem_of(path), path) for path in pictures(root / "masks")]
    for sub in entries(root / "masks"):
        if sub.is_dir():
            masks += [(sub.name, path) for path in pictures(sub)]
    for name, path in masks:
        stem = _image_stem(name, folder.images)
        if stem is None:
            folder.orphans.append(path)
        else:
            folder.masks.setdefault(stem, []).append(path)
    return folder


def _image_stem(name: str, images: dict[str, Path]) -> str | None:
    candidates = [name, *(tail.sub("", name) for tail in _MASK_TAILS)]
    return next((stem for stem in candidates if stem in images), None)


def read_splits(root: Path) -> dict[str, list[str]] | None:
    """Read ``splits.json`` beside the data; None when there is none.

    Raises:
        DataError: not JSON of the form ``{"train": ["name", …], "val": […]}``.
    """
    path = root / SPLITS_FILE
    return checked_splits(read_json(path), path) if path.is_file() else None


def checked_splits(splits: Any, path: Path) -> dict[str, list[str]]:
    """Return `splits` when it maps names to lists of names.

    Raises:
        DataError: it does not.
    """
    good = isinstance(splits, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in splits.values()
    )
    if not good:
        raise DataError(
            f"{path}: found splits of another form; expected "
            '{"train": ["name", …], "val": ["name", …]} with case names without suffix. Correct the file.'
        )
    return splits


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: found {error}; expected a JSON file. Correct or copy it again.") from error


def overlaps(splits: dict[str, list[str]]) -> list[str]:
    """Names that are in ``train`` and also in a split that judges the training (every other common name).

    Other keys may overlap freely: they may be folds or samples.
    """
    judged = {name for key in ("val", "validation", "test") for name in splits.get(key, [])}
    return sorted(judged & set(splits.get("train", [])))


@dataclass
class Decathlon:
    """A Decathlon ``dataset.json``.

    Args:
        path: the file.
        items: case name -> ``{"image": path, "label": path or paths}``, without label where none is listed.
        lists: ``"training"``, ``"validation"`` or ``"test"`` -> case names.
        splits: split name -> case names, from its key ``splits`` or the ``splits.json`` beside it.
        labels: class number -> name, as the file says.
    """

    path: Path
    items: dict[str, dict[str, Any]]
    lists: dict[str, list[str]]
    splits: dict[str, list[str]] | None
    labels: dict[str, Any]


def read_decathlon(path: Path) -> Decathlon:
    """Read a Decathlon ``dataset.json``; no picture or volume is opened.

    Raises:
        DataError: not of its form, a name twice, or a path that leaves the folder.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("training", []), list):
        raise DataError(f'{path}: found another form; expected {{"training": [{{"image": …, "label": …}}, …]}}.')
    items: dict[str, dict[str, Any]] = {}
    lists: dict[str, list[str]] = {}
    for key in ("training", "validation", "test"):
        for entry in data.get(key) or []:
            item = _decathlon_item(entry, path)
            name = stem_of(item["image"])
            if name in items:
                raise DataError(
                    f"{path}: found the case {name} twice; expected each name once. "
                    "Rename one: predictions are stored by this name."
                )
            items[name] = item
            lists.setdefault(key, []).append(name)
    splits = checked_splits(data["splits"], path) if "splits" in data else read_splits(path.parent)
    labels = data.get("labels")
    return Decathlon(path, items, lists, splits, labels if isinstance(labels, dict) else {})


def _decathlon_item(entry: Any, path: Path) -> dict[str, Any]:
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise DataError(f'{path}: found the entry {entry!r:.200}; expected {{"image": "path", "label": "path"}}.')
    item: dict[str, Any] = {"image": _inside(entry["image"], path)}
    label = entry.get("label")
    if isinstance(label, str):
        item["label"] = _inside(label, path)
    elif isinstance(label, list) and label and all(isinstance(one, str) for one in label):
        item["label"] = [_inside(one, path) for one in label]
    elif label is not None:
        raise DataError(f"{path}: found the label {label!r:.200}; expected a path or a list of paths.")
    return item


def _inside(relative: str, path: Path) -> Path:
    """Join a path of `dataset.json` with its folder; refuse one that would leave it.

    A received data set must not make the program read other files of this machine.
    """
    parts = PurePosixPath(relative.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", relative) or not parts.parts:
        raise DataError(
            f"{path}: found the path {relative!r}; expected one inside {path.parent}. "
            "Use relative paths without '..' and put the files there."
        )
    return path.parent / parts
