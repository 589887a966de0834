"""A 2-D prediction on disk: a palette PNG that looks right and reads right."""

from __future__ import annotations

import errno
import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import SaveImaged
from PIL import Image

from hspsam_monai.errors import DataError
from hspsam_monai.files import atomic_write
from hspsam_monai.transforms.resize import plain

# Chosen once by farthest-point search in CIELAB: each next colour maximises its smallest distance to all
# before it, to black, to white and to TRUTH_COLOUR, as seen with normal vision and with each of the three
# colour-vision deficiencies (Machado et al. 2009, full severity). The first eight keep a distance above 20
# in every view; more classes than about sixteen cannot be told apart by colour alone.
_CLASS_COLOURS = """
    33bbee e66100 aa44ff 5d8b74 a2e88b 5d468b a22e17 4600ff e8a2b9 005d5d 8ba25d 8b74a2
    5d74d1 5de8ff 17d146 4646b9 17ffb9 5d7446 a2ff74 8bb98b 465d46 e874d1 d15d2e 46a2ff
    5d2ed1 ff8b00 d18bb9 8be8e8 a24674 5d46a2 74d12e a217ff e82ee8 b9ff5d 8bd18b d15d74
    5d5d8b b9e8d1 2eb946 b92e00 8b462e 5d74b9 5d8bff 74d1ff ffb974 a2748b 8b8b5d 46b9a2
    17a2d1 d18b2e d14600 5d46d1 00d1d1 e8d1a2 b9462e 5d5dd1 b98b8b ffe8a2 46745d 748b46
    e817a2 e8a274 ffa2d1
"""

#: Colours of the classes, (64, 3) uint8 RGB; row 0 is the background, black.
PALETTE: np.ndarray = np.array(
    [(0, 0, 0), *(tuple(bytes.fromhex(colour)) for colour in _CLASS_COLOURS.split())], dtype=np.uint8
)
PALETTE.setflags(write=False)

logger = logging.getLogger(__name__)

#: Errors of writing that the next mask would meet as well.
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
#: Folders of images inside a data set; predictions have no siblings to be told from.
_IMAGE_FOLDERS = ("images", "imagesTr", "imagesTs")


def write_mask_png(path: str | Path, mask: np.ndarray, palette: np.ndarray = PALETTE) -> Path:
    """Write class indices as a palette PNG, whole or not at all.

    A viewer shows coloured classes on black; a reader gets the indices themselves.

    Args:
        path: the file to write.
        mask: (H, W) integers in 0 … 255.
        palette: (N, 3) uint8 RGB, row k for class k.

    Raises:
        DataError: the mask is not two-dimensional, not integer or out of range.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or mask.dtype.kind not in "bui":
        raise DataError(f"A mask PNG needs an (H, W) integer mask; this one is {mask.shape} {mask.dtype}.")
    if mask.min() < 0 or mask.max() > 255:
        raise DataError(f"A mask PNG holds 0 … 255; this mask has {mask.min()} … {mask.max()}.")
    height, width = mask.shape
    picture = Image.frombytes("P", (width, height), np.ascontiguousarray(mask, dtype=np.uint8).tobytes())
    # All 256 entries, so that the file keeps 8 bits a pixel: some readers misread packed 1, 2 or 4 bits.
    picture.putpalette(palette_table(palette).tobytes())
    with atomic_write(path) as part:
        picture.save(part, format="PNG")
    return Path(path)


def palette_table(palette: np.ndarray) -> np.ndarray:
    """All 256 entries of a PNG palette, (256, 3) uint8: the background, then the class colours over and over."""
    palette = np.asarray(palette, dtype=np.uint8)
    return np.concatenate([palette[:1], np.resize(palette[1:], (255, 3))])


def is_own_mask(path: Path) -> bool:
    """Whether a file is a picture with the palette of :func:`write_mask_png`; others' masks have their own."""
    try:
        with Image.open(path) as picture:
            return picture.mode == "P" and bytes(picture.getpalette() or ()) == palette_table(PALETTE).tobytes()
    except (OSError, Image.DecompressionBombError):  # none of ours has more pixels than Pillow reads
        return False


class SaveMaskd(SaveImaged):
    """Write each predicted mask as ``OUTPUT/[sub-folders/]STEM.png``, sub-folders as in the input.

    Folders that only say what their siblings are not (``images``, a Decathlon's ``imagesTr`` and ``imagesTs``) are left
    out. Where ``case`` is the whole name of the file, since others share its stem, the mask is ``NAME.png``
    (``a.jpg.png``).

    A ``SaveImaged``, so that MONAI Label, which saves by itself, recognises and removes it.

    Args:
        output_dir: where the masks go.
        root: folder of the inputs; their sub-folders below it are kept. A file's own folder stands for itself.
        key: key of the prediction, class indices (1, H, W), on any device.
        image_key: key of the image whose meta data name the source file.
        tolerant: a mask that cannot be written is recorded in ``failures`` while the others go on, instead of raising.

    Attributes:
        failures: (case, reason) of every mask that was not written.

    Raises:
        DataError: the mask would replace a picture, or the mask of another case of the same run. Links count as what
            they are called, not as what they lead to.
    """

    def __init__(
        self,
        output_dir: str | Path,
        root: str | Path,
        key: str = "pred",
        image_key: str = "image",
        tolerant: bool = False,
    ) -> None:
        super().__init__(keys=key, output_dir=output_dir, print_log=False)
        root = Path(root).expanduser().absolute()
        self.output_dir = Path(output_dir)
        self.root = root if root.is_dir() else root.parent
        self.image_key, self.tolerant = image_key, tolerant
        self.failures: list[tuple[str, str]] = []
        self._written: dict[Path, Path] = {}

    def target(self, source: str | Path, case: str = "") -> Path:
        """Where the mask of ``source`` goes, the picture of the case of that name."""
        source = Path(source).expanduser().absolute()
        relative = source.relative_to(self.root) if source.is_relative_to(self.root) else Path(source.name)
        parts = [part for part in relative.parent.parts if part not in _IMAGE_FOLDERS]
        name = source.name if case == source.name else source.stem
        return self.output_dir.joinpath(*parts, name + ".png")

    def of_before(self, source: str | Path, case: str = "") -> Path | None:
        """The mask that an earlier run left where that of ``source`` would go."""
        path = self.target(source, case)
        return path if path not in self._written and path.is_file() and is_own_mask(path) else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one case and pass it on, with ``saved_to`` added."""
        data = dict(data)
        source, case = Path(data[self.image_key].meta["filename_or_obj"]), str(data.get("case", ""))
        try:
            data["saved_to"] = str(self._write(data, source, case))
        except (DataError, OSError) as error:
            if not self.tolerant or getattr(error, "errno", None) in _HOPELESS:
                raise
            logger.error("Not written: the mask of %s: %s", case or source.name, error)
            self.failures.append((case or source.name, str(error)))
        return data

    def _write(self, data: Mapping[Hashable, Any], source: Path, case: str) -> Path:
        mask = plain(data[self.keys[0]]).detach().cpu().numpy()[0]  # the engine leaves it where the network ran
        path = self.target(source, case)
        if path.exists() and source.exists() and path.samefile(source):
            raise DataError(f"{path} is the picture itself; expected another folder for the masks.")
        if path.exists() and not is_own_mask(path):
            raise DataError(
                f"{path} is there and no palette PNG of our colours, so no mask of before; expected another folder."
            )
        if self._written.get(path, source) != source:
            raise DataError(f"{path} holds the mask of {self._written[path]}; expected names that differ. Rename one.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mask_png(path, mask.astype(np.uint8))
        self._written[path] = source
        return path
