"""Seeded phantom colonoscopy frames with polyp masks, for demonstrations and tests without patient data."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hspsam_monai.data.phantom_scene import draw_frame
from hspsam_monai.errors import ConfigError, DataError


def phantom(
    seed: int, size: tuple[int, int] = (256, 320), *, empty: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Make one frame; the same arguments give the same pixels.

    Args:
        seed: of everything random, at least 0.
        size: (H, W) in pixels, each at least 32.
        empty: without polyp; None leaves it to the seed (one in ten).

    Returns:
        Image (H, W, 3) uint8 RGB, and mask (H, W) uint8 with 1 on polyps.

    Raises:
        ConfigError: `seed` or `size` out of range.
    """
    if seed < 0 or min(size) < 32:
        raise ConfigError(f"phantom got seed {seed} and size {size}; expected a seed from 0 and sides from 32.")
    rng = np.random.default_rng([seed, 0x50_4F_4C])
    without = bool(rng.random() < 0.1) if empty is None else empty
    return draw_frame(rng, size, without)


def write_phantoms(
    folder: str | Path,
    count: int,
    seed: int = 0,
    size: tuple[int, int] = (256, 320),
    val_fraction: float = 0.2,
    empty_fraction: float = 0.1,
) -> Path:
    """Write a data set of phantoms: ``images/*.jpg``, ``masks/*.png`` (0 and 255) and ``splits.json``.

    It appears whole or not at all: it is built beside its place under a hidden name, and then renamed.

    Args:
        folder: where to; must not exist, or be empty.
        count: frames, at least 1.
        seed: of everything random, at least 0.
        size: (H, W) in pixels.
        val_fraction: share of the split ``val``, in [0, 1); at least one frame when it is above 0.
        empty_fraction: share of frames without polyp, in [0, 1].

    Returns:
        The folder.

    Raises:
        ConfigError: an argument out of range.
        DataError: the folder holds something, or cannot be written.
    """
    folder = Path(folder).expanduser()
    if count < 1 or seed < 0 or not 0 <= val_fraction < 1 or not 0 <= empty_fraction <= 1:
        raise ConfigError(
            f"write_phantoms got count {count}, seed {seed}, val_fraction {val_fraction}, empty_fraction "
            f"{empty_fraction}; expected count from 1, seed from 0, fractions from 0 to 1 (val below 1)."
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise DataError(f"{folder}: found something there already; expected a new or empty folder. Choose another.")
    rng = np.random.default_rng([seed, count])
    seeds = rng.integers(0, 2**31, count).tolist()
    empty = set(rng.permutation(count)[: round(empty_fraction * count)].tolist())
    held_out = max(1, round(val_fraction * count)) if val_fraction > 0 and count > 1 else 0
    val = set(rng.permutation(count)[:held_out].tolist())
    names = [f"phantom_{index:04d}" for index in range(count)]
    splits = {
        "train": [name for index, name in enumerate(names) if index not in val],
        "val": [name for index, name in enumerate(names) if index in val],
    }
    building: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".phantoms-", dir=folder.parent))
        (building / "images").mkdir()
        (building / "masks").mkdir()
        for index, name in enumerate(names):
            image, mask = phantom(seeds[index], size, empty=index in empty)
            Image.fromarray(image).save(building / "images" / f"{name}.jpg", quality=92)
            Image.fromarray(mask * np.uint8(255)).save(building / "masks" / f"{name}.png")
        (building / "splits.json").write_text(json.dumps(splits, indent=1), encoding="utf-8")
        building.chmod(0o755)  # mkdtemp's folder is private
        building.replace(folder)
    except OSError as error:
        raise DataError(f"{folder}: found {error}; expected to write there. Choose another folder.") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)  # gone already when all went well
    return folder
