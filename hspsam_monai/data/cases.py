"""Data folder -> cases: pairs an image with its masks, and chooses a split."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hspsam_monai.data.layouts import (
    DECATHLON_FILE,
    IMAGE_SUFFIXES,
    SPLITS_FILE,
    VOLUME_SUFFIXES,
    Decathlon,
    Folder,
    entries,
    is_folder_set,
    overlaps,
    pictures,
    read_decathlon,
    scan,
    some,
    stem_of,
    sub_sets,
)
from hspsam_monai.errors import ConfigError, DataError, TooFewCasesError

logger = logging.getLogger(__name__)

Case = dict[str, Any]

#: Pictures that are not read; other files beside pictures are nobody's images.
_OTHER_PICTURES = {".gif", ".dcm", ".dicom", ".heic", ".heif", ".avif", ".jp2", ".svg", ".pdf", ".mp4", ".avi"}


def find_cases(
    root: str | Path,
    split: str = "all",
    *,
    labels: bool = True,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> list[Case]:
    """List the cases of a data set, sorted by name; nothing is decoded.

    Layouts:
        - ``images/`` and ``masks/`` with equal stems. The mask of ``a.jpg`` may be ``a.png``, ``a_mask.png``
          and further ``a_1.png``, ``a_mask_1.png``, or the files of ``masks/a/``. Optional ``splits.json``:
          ``{"train": [stems], "val": [stems]}``.
        - A folder of such folders: their union, with case names like ``kvasir/a``.
        - A Decathlon ``dataset.json`` or its folder, of pictures or NIfTI volumes.
        - With ``labels=False`` also a flat folder of pictures or volumes, or one file.

    Without given splits, ``"train"`` and ``"val"`` are drawn with `seed`, in each folder of a union its own share;
    byte-identical images stay on one side, also those of different folders, which costs one read of every image. The
    draw depends on names and bytes, not on the folder's place.

    Args:
        root: folder or file.
        split: ``"all"``, ``"train"``, ``"val"`` or any key of the given splits; for Decathlon also
            ``"validation"`` and ``"test"``.
        labels: whether cases need a label; without, the cases have no key ``label``.
        val_fraction: share of cases in a drawn ``"val"``, in (0, 1).
        seed: of the draw.

    Returns:
        ``{"image": path, "label": path or [paths], "case": name}`` for each case.

    Raises:
        DataError: nothing found, no such split, a split names a missing case or has one in train and val, an
            image without mask, two images with one name, a Decathlon path that leaves the folder.
        ConfigError: `val_fraction` out of range.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}; expected a number between 0 and 1.")
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"{root}: found no such file or folder; expected a data set. Check the path.")
    draw = (val_fraction, seed)
    decathlon = root if root.is_file() and root.suffix.lower() == ".json" else root / DECATHLON_FILE
    if decathlon.is_file():
        cases = _decathlon_cases(read_decathlon(decathlon), split, labels, draw)
    elif is_folder_set(root) or (not labels and (root / "images").is_dir()):
        cases = _folder_cases(scan(root), split, labels, draw)
    elif root.is_dir() and (subs := sub_sets(root)):
        cases = _union_cases([scan(sub, f"{sub.name}/") for sub in subs], split, labels, draw)
    elif labels:
        raise _no_layout(root)
    else:
        cases = _flat_cases(root, split)
    return sorted(cases, key=lambda case: case["case"])


def case_name(case: Mapping[str, Any]) -> str:
    """Name of a case: its own, else the stem of its picture's file, since lists of others (MONAI Label's) give none.

    Args:
        case: as listed, its ``image`` a path or several; or as loaded, its ``image`` a MetaTensor.
    """
    if case.get("case") is not None:
        return str(case["case"])
    image = case["image"]
    path = image.meta["filename_or_obj"] if hasattr(image, "meta") else image
    return Path(str(path[0] if isinstance(path, list | tuple) else path)).stem


def has_splits(root: str | Path) -> bool:
    """Whether a data set says which cases are trained on; if not, ``find_cases`` draws."""
    root = Path(root).expanduser()
    decathlon = root if root.suffix.lower() == ".json" else root / DECATHLON_FILE
    if decathlon.is_file():
        data = read_decathlon(decathlon)
        return data.splits is not None or "validation" in data.lists
    return any((folder / SPLITS_FILE).is_file() for folder in ([root] if is_folder_set(root) else sub_sets(root)))


def _no_layout(root: Path) -> DataError:
    found = "a file" if root.is_file() else f"{len(pictures(root))} pictures and no images/ + masks/"
    return DataError(
        f"{root}: found {found}; expected images/ and masks/ with equal names, a folder of such folders, "
        f"or a Decathlon {DECATHLON_FILE}. Arrange the data so; pictures alone are read with labels=False."
    )


def _folder_cases(folder: Folder, split: str, labels: bool, draw: tuple[float, int]) -> list[Case]:
    if not folder.images:
        raise DataError(
            f"{folder.root / 'images'}: found no picture; expected {', '.join(IMAGE_SUFFIXES)} files. "
            "Check that the data set was copied completely."
        )
    if folder.twins:
        raise DataError(
            f"{folder.root}: found several images of one name ({some(p.name for p in folder.twins)}); "
            "expected each name once, whatever the suffix. Rename or remove them."
        )
    names = _choose(split, sorted(folder.images), folder.splits, folder.root, draw, folder.images)
    if labels:
        bare = [name for name in names if name not in folder.masks]
        if bare:
            raise DataError(
                f"{folder.root}: found {len(bare)} images without mask ({some(bare)}); expected a file of "
                "the same name in masks/ for each. Add an all-zero mask where nothing is to be found."
            )
    return [_case(folder.prefix + n, folder.images[n], folder.masks.get(n) if labels else None) for n in names]


def _union_cases(folders: list[Folder], split: str, labels: bool, draw: tuple[float, int]) -> list[Case]:
    """The cases of several folders; those without splits are drawn together, so that no image is on both sides."""
    drawn = [folder for folder in folders if folder.splits is None and folder.images]
    if drawn and split in {"train", "val"}:
        known: dict[str, str] = {}
        for folder in folders:
            listed = {name for names in (folder.splits or {}).values() for name in names} & set(folder.images)
            known |= sides_of({name: content_hash(folder.images[name]) for name in listed}, folder.splits or {})
        sets = [{name: content_hash(path) for name, path in folder.images.items()} for folder in drawn]
        for folder, sides in zip(drawn, draw_sides(sets, *draw, known), strict=True):
            folder.splits = {part: [name for name in sides if sides[name] == part] for part in ("train", "val")}
        # A small folder may have nothing on one side: the union's counts.
        some_side = [folder for folder in folders if folder not in drawn or folder.splits[split]]
        if not some_side:
            raise TooFewCasesError(
                f"{folders[0].root.parent}: found too few different images to draw a split {split!r}; expected at "
                "least two. Add cases or use split 'all'."
            )
        folders = some_side
    return [case for folder in folders for case in _folder_cases(folder, split, labels, draw)]


def _decathlon_cases(data: Decathlon, split: str, labels: bool, draw: tuple[float, int]) -> list[Case]:
    labelled = [name for name, item in data.items.items() if "label" in item]
    splits = data.splits
    if splits is None and "validation" in data.lists:
        splits = {"train": data.lists.get("training", []), "val": data.lists["validation"]}
    extra = {key: data.lists[key] for key in ("validation", "test") if key in data.lists}
    if splits is not None:
        splits = {**extra, **splits}
    if split in extra and splits is None:
        names = extra[split]
    else:
        everything = labelled if labels else list(data.items)
        drawn_from = data.lists.get("training", [])
        names = _choose(
            split,
            everything if split == "all" else drawn_from,
            splits,
            data.path.parent,
            draw,
            {name: item["image"] for name, item in data.items.items()},
        )
    if not names:
        raise DataError(f"{data.path}: found no {'labelled ' if labels else ''}case; expected a list 'training'.")
    bare = [name for name in names if "label" not in data.items[name]] if labels else []
    if bare:
        raise DataError(
            f"{data.path}: found {len(bare)} cases without label ({some(bare)}) in split {split!r}; expected "
            "a label for each. Add them, or read the cases with labels=False."
        )
    cases = [_case(n, data.items[n]["image"], data.items[n].get("label") if labels else None) for n in names]
    files = [path for case in cases for path in [case["image"], *_as_list(case.get("label"))]]
    # Where pictures are only to be segmented, each that cannot be read is named and the others are done.
    missing = [path for path in files if not Path(path).is_file()] if labels else []
    if missing:
        raise DataError(
            f"{data.path}: found {len(missing)} listed files missing ({some(missing)}); expected them all. "
            "Copy the data set again or remove the entries."
        )
    return cases


def _flat_cases(root: Path, split: str) -> list[Case]:
    if split != "all":
        raise DataError(f"{root}: found no splits; expected split 'all' for pictures alone, not {split!r}.")
    suffixes = (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES)
    if root.is_file():
        paths = [root]
        if not root.name.lower().endswith(suffixes):
            raise DataError(f"{root}: found another kind of file; expected {', '.join(suffixes)}.")
    else:
        paths = pictures(root, suffixes)
    if not paths:
        raise DataError(
            f"{root}: found no picture or volume; expected {', '.join(suffixes)} files. "
            "Check the path; sub-folders are not searched."
        )
    if root.is_dir():
        known = set(paths)
        _tell_ignored([path for path in entries(root) if path not in known])
    stems = [stem_of(path) for path in paths]
    times = Counter(stems)
    # Two files of one stem keep their suffix in the name, or their predictions would overwrite each other.
    return [_case(path.name if times[stem] > 1 else stem, path, None) for path, stem in zip(paths, stems, strict=True)]


def _tell_ignored(others: list[Path]) -> None:
    """Say what of a flat folder is not read, where it could have been meant to be."""
    meant = [path.name + "/" if path.is_dir() else path.name for path in others if _meant(path)]
    if meant:
        logger.warning(
            "Left out %d entries that are no %s files (%s); sub-folders are not searched.",
            len(meant), ", ".join(IMAGE_SUFFIXES), some(meant),
        )  # fmt: skip


def _meant(path: Path) -> bool:
    return bool(pictures(path)) if path.is_dir() else path.suffix.lower() in _OTHER_PICTURES


def _case(name: str, image: Path, label: Path | list[Path] | None) -> Case:
    case: Case = {"image": str(image), "case": name}
    if label is not None:
        files = _as_list(label)
        case["label"] = files[0] if len(files) == 1 else files
    return case


def _as_list(label: Path | str | list[Any] | None) -> list[str]:
    if label is None:
        return []
    return [str(one) for one in label] if isinstance(label, list) else [str(label)]


def _choose(
    split: str,
    names: list[str],
    splits: dict[str, list[str]] | None,
    root: Path,
    draw: tuple[float, int],
    images: dict[str, Path],
) -> list[str]:
    """Case names of one split: given, drawn, or all of `names`."""
    if split == "all":
        return names
    if splits is None:
        if split not in {"train", "val"}:
            raise DataError(
                f"{root}: found no {SPLITS_FILE}; expected split 'all', 'train' or 'val' (drawn), not "
                f"{split!r}. Write the file to have other splits."
            )
        train, val = draw_split({name: images[name] for name in names}, *draw)
        chosen = train if split == "train" else val
        if not chosen:
            raise TooFewCasesError(
                f"{root}: found {len(names)} cases, too few different ones to draw a split {split!r}; "
                "expected at least two. Add cases or use split 'all'."
            )
        return chosen
    if split not in splits:
        raise DataError(f"{root}: found the splits {some(sorted(splits))}; expected one named {split!r}.")
    both = overlaps(splits)
    if both:
        raise DataError(
            f"{root}: found {len(both)} cases in train and in val or test ({some(both)}); expected each on "
            f"one side, or scores are too good. Correct {SPLITS_FILE}."
        )
    missing = [name for name in splits[split] if name not in images]
    if missing:
        hint = "Leave out the suffix." if any(stem_of(Path(n)) in images for n in missing) else "Correct the file."
        raise DataError(
            f"{root}: found {len(missing)} names in split {split!r} without image ({some(missing)}); "
            f"expected names of existing cases. {hint}"
        )
    if not splits[split]:
        raise DataError(f"{root}: found an empty split {split!r}; expected at least one case.")
    return sorted(set(splits[split]))


def draw_split(images: dict[str, Path], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Draw train and val, keeping byte-identical images on one side.

    Args:
        images: case name -> file; every file is read once.
        val_fraction: wanted share of val; at least one case goes there when two different images exist.
        seed: of the draw.

    Returns:
        The sorted case names of train and of val.
    """
    (sides,) = draw_sides([{name: content_hash(images[name]) for name in sorted(images)}], val_fraction, seed)
    return tuple(sorted(name for name in images if sides[name] == part) for part in ("train", "val"))


def draw_sides(
    sets: Sequence[Mapping[str, str]], val_fraction: float, seed: int, known: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Draw ``train`` or ``val`` for the cases of several sets, one side for the same bytes wherever they are.

    Args:
        sets: for each set case name -> hash of its image.
        val_fraction: wanted share of val in each set; at least one case goes there when it has two different images
            that no other set has placed.
        seed: of the draw.
        known: hash -> side where that is given already.

    Returns:
        For each set case name -> side.
    """
    placed = dict(known or {})
    for digests in sets:
        groups: dict[str, list[str]] = {}
        for name in sorted(digests):
            if digests[name] not in placed:
                groups.setdefault(digests[name], []).append(name)
        order = np.random.default_rng(seed).permutation(len(groups))
        contents = list(groups)
        in_order = [contents[index] for index in order]
        wanted = max(1, round(val_fraction * sum(map(len, groups.values()))))
        chosen: set[str] = set()
        count = 0
        for digest in in_order[1:]:  # the first group always trains
            if count + len(groups[digest]) <= wanted or not count:
                chosen.add(digest)
                count += len(groups[digest])
            if count >= wanted:
                break
        placed |= {digest: "val" if digest in chosen else "train" for digest in groups}
    return [{name: placed[digest] for name, digest in digests.items()} for digests in sets]


def sides_of(digests: Mapping[str, str], splits: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Hash -> ``train`` or ``val``, of cases whose splits are given; what is in any other split must not be trained."""
    train = {digests[name] for name in splits.get("train", ()) if name in digests}
    return {digest: "train" if digest in train else "val" for digest in digests.values()}


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: found {error}; expected a readable file. Check it.") from error
