"""One picture file -> its plain values, whatever the file format; every failure is one named error.

Pillow decodes what it keeps exactly. What it would cut down to 8 bits goes elsewhere: TIFF with more than
8 bits to tifffile, colour PNG with 16 bits to torchvision.
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from hspsam_monai.data.layouts import VOLUME_SUFFIXES
from hspsam_monai.errors import DataError

_ORIENTATION = 274  # tag number shared by EXIF and TIFF
_PHOTOMETRIC = 262  # its tag for what a number means
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Pillow warns of pictures above ``MAX_IMAGE_PIXELS`` and refuses those above twice as many (PIL.Image,
#: ``_decompression_bomb_check``), masks of our own as well; so it goes for what others decode.
_LIMIT_FACTOR = 2
_PNG_GREY, _PNG_GREY_ALPHA, _PNG_RGB, _PNG_RGBA = 0, 4, 2, 6

# tifffile logs what it also raises; the error below carries it to the user once.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class FileFault(DataError):
    """A fault of one file.

    Args:
        path: the file.
        kind: short name of the fault, such as ``"unreadable"`` or ``"zero_bytes"``.
        found: what is there.
        expected: what should be there.
        advice: what to do about it.
    """

    def __init__(self, path: Path | str, kind: str, found: str, expected: str, advice: str) -> None:
        self.path, self.kind = str(path), kind
        self.found, self.expected, self.advice = found, expected, advice
        super().__init__(path, kind, found, expected, advice)  # all five, so that it pickles between processes

    def __str__(self) -> str:
        return f"{self.path}: found {self.sentence}"

    @property
    def sentence(self) -> str:
        """Found, expected and advice, without the file name."""
        return f"{self.found}; expected {self.expected}. {self.advice}"


@dataclass(frozen=True)
class Picture:
    """The decoded values of one file, upright.

    Args:
        values: (H, W, C) with C 1 (grey or palette index) or 3 (RGB); bool, integer or float as stored.
        alpha: (H, W) float32 in [0, 1], or None for an opaque picture.
        lossy: whether the compression may have changed single values (JPEG, lossy WebP).
        inverted_palette: a two-colour palette whose index 0 is white and 1 black (only with ``indices``).
    """

    values: np.ndarray
    alpha: np.ndarray | None = None
    lossy: bool = False
    inverted_palette: bool = False


def decode(path: str | Path, *, indices: bool = False) -> Picture:
    """Decode one picture file completely.

    Args:
        path: PNG, JPEG, TIFF, BMP, WebP or another format Pillow reads; the content decides, not the suffix.
        indices: keep palette indices (masks) instead of looking up their colours (photographs).

    Raises:
        FileFault: missing, zero bytes, no picture, damaged, several pages, not finite, unsupported layout, more pixels
            than Pillow's limit.
    """
    path = Path(path)
    head = _head(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd metadata of files that decode well.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            if head.startswith(_TIFF_MAGIC):
                picture = _decode_tiff(path, indices)
            elif _is_deep_colour_png(head):
                picture = _decode_deep_png(path)
            else:
                picture = _decode_pillow(path, head, indices)
    except FileFault:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from error
    except UnidentifiedImageError as error:
        if path.name.lower().endswith(VOLUME_SUFFIXES):
            raise FileFault(
                path, "volume", "a volume", "a picture", "Export its slices as pictures, such as PNG."
            ) from error
        raise FileFault(
            path, "unreadable", "no known picture format", "PNG, JPEG, TIFF, BMP or WebP", "Export it again."
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, RuntimeError …
        raise FileFault(
            path,
            "unreadable",
            f"a file that cannot be decoded ({type(error).__name__}: {error})",
            "a complete picture",
            "Copy or export the file again.",
        ) from error
    if not np.isfinite(picture.values).all():
        raise FileFault(
            path,
            "nan",
            f"{int((~np.isfinite(picture.values)).sum())} values that are NaN or infinite",
            "finite values only",
            "Replace them before training, for example with numpy.nan_to_num.",
        )
    return picture


def _head(path: Path) -> bytes:
    """First bytes of an existing, non-empty file."""
    advice = "Check the path and that the data set was copied completely."
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise FileFault(path, "missing", found, "a picture file", advice)
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise FileFault(path, "unreadable", str(error), "a readable file", "Check its permissions.") from error
    if not head:
        raise FileFault(path, "zero_bytes", "an empty file (zero bytes)", "a picture", advice)
    return head


def _is_deep_colour_png(head: bytes) -> bool:
    return head.startswith(_PNG_MAGIC) and head[24] == 16 and head[25] != _PNG_GREY


def _several_pages(path: Path, count: int) -> FileFault:
    return FileFault(
        path,
        "multi_page",
        f"{count} pages or frames",
        "one picture a file",
        "Save each page as a file of its own.",
    )


def _too_large(path: Path, found: str) -> FileFault:
    return FileFault(
        path,
        "too_large",
        f"a picture of more pixels than are read ({found})",
        f"at most {pixel_limit()} pixels",
        "Cut it into parts or make it smaller; a program may raise PIL.Image.MAX_IMAGE_PIXELS.",
    )


def pixel_limit() -> float:
    """How many pixels a picture may have, H times W."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else _LIMIT_FACTOR * Image.MAX_IMAGE_PIXELS


def _decode_pillow(path: Path, head: bytes, indices: bool) -> Picture:
    if head.startswith(_PNG_MAGIC):
        with Image.open(path) as image:
            image.verify()  # checksums; decoding alone misses flipped bits
    # Through a stream: Pillow maps an uncompressed TIFF's pixels into memory, at a turned picture's final size.
    with path.open("rb") as stream, Image.open(stream) as opened:
        frames = getattr(opened, "n_frames", 1)
        # MPO is a camera's JPEG with an extra preview; its first picture is the photograph.
        if frames > 1 and opened.format != "MPO":
            raise _several_pages(path, frames)
        opened.load()
        lossy = opened.format in {"JPEG", "MPO", "JPEG2000"} or (opened.format == "WEBP" and b"VP8L" not in head)
        image = ImageOps.exif_transpose(opened)
    if image.mode in {"P", "PA"} and indices:
        index = np.asarray(image.convert("P") if image.mode == "PA" else image)[..., None]
        return Picture(index, lossy=lossy, inverted_palette=_is_inverted(image))
    if image.mode not in {"1", "L", "LA", "RGB", "RGBA", "F", "I"} and not image.mode.startswith("I;16"):
        transparent = image.mode in {"PA", "La", "RGBa"} or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "RGB")
    elif "transparency" in image.info and image.mode in {"L", "RGB"} and not indices:
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    if indices and head.startswith(_PNG_MAGIC) and head[25] == _PNG_GREY and head[24] in {2, 4}:
        # Pillow stretches 2- and 4-bit grey to 0..255; a mask means the stored numbers.
        stretch = 255 // (2 ** head[24] - 1)
        values = values if set(np.unique(values)) <= {0, 255} else values // stretch
    return _split_alpha(values, lossy)


def _is_inverted(image: Image.Image) -> bool:
    """Whether a picture of indices 0 and 1 paints 0 white and 1 black."""
    colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    index = np.asarray(image.convert("P") if image.mode == "PA" else image).reshape(-1)
    black = index == 1
    # A picture of one colour counts by its 1, which must not be drawn black; all 0 is empty in either reading.
    return bool(
        set(np.unique(index)) <= {0, 1}
        and black.any()
        and not colours[black].any()
        and (colours[~black] == 255).all()
        and _paints_white(image, 0)
    )


def _paints_white(image: Image.Image, index: int) -> bool:
    palette = image.getpalette("RGB") or []
    return palette[3 * index : 3 * index + 3] == [255, 255, 255]


def _split_alpha(values: np.ndarray, lossy: bool = False) -> Picture:
    """(H, W, 1..4) -> colour and alpha; an even number of channels ends with alpha."""
    if values.shape[-1] in {1, 3}:
        return Picture(values, lossy=lossy)
    full = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    alpha = np.clip(values[..., -1].astype(np.float32) / full, 0, 1)
    return Picture(values[..., :-1], None if (alpha == 1).all() else alpha, lossy)


def _decode_deep_png(path: Path) -> Picture:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    values = decode_png(data, ImageReadMode.UNCHANGED).numpy().transpose(1, 2, 0)
    return _split_alpha(_upright(values, orientation))


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undo a camera's rotation: EXIF orientation 1..8 of an (H, W, C) array."""
    turned = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }.get(orientation, lambda a: a)(values)
    return np.ascontiguousarray(turned)


def _decode_tiff(path: Path, indices: bool) -> Picture:
    with tifffile.TiffFile(path) as tiff:
        page, series, count = tiff.pages.first, tiff.series[0], len(tiff.pages)
        planes = series.axes in {"CYX", "SYX"} and series.shape[0] in {1, 3, 4} and len(tiff.series) == 1
        if count > 1 and not planes:
            raise _several_pages(path, count)
        height, width = page.imagelength, page.imagewidth
        if height * width > pixel_limit():
            raise _too_large(path, f"{height} x {width}")
        if indices and _PHOTOMETRIC in page.tags and int(page.photometric) == 0:  # tifffile says 0 without the tag
            raise FileFault(
                path,
                "unknown_label",
                "a TIFF mask in which white is zero (tifffile and scikit-image store boolean arrays so)",
                "zero stored as black, since programs read this kind the one way or the other",
                "Save it as 8-bit grey PNG or TIFF with 0 and 255.",
            )
        if count == 1 and page.dtype in {np.dtype(np.uint8), np.dtype(bool)} and page.samplesperpixel <= 4:
            picture = _decode_pillow(path, b"", indices)  # knows palettes, LZW, JPEG, CMYK and YCbCr
            return Picture(picture.values, picture.alpha, page.compression in {6, 7}, picture.inverted_palette)
        try:
            values = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            if page.samplesperpixel == 1 and count == 1:
                return _decode_pillow(path, b"", indices)
            raise FileFault(
                path,
                "unreadable",
                f"{page.compression.name} compression of {page.samplesperpixel} channels over 8 bits",
                "no compression or deflate",
                "Save it so, or install imagecodecs.",
            ) from error
        axes, photometric, extra = series.axes, int(page.photometric), len(page.extrasamples)
        orientation = page.tags.valueof(_ORIENTATION, 1)
    if axes == "YX":
        values = values[..., None]
    elif axes in {"SYX", "CYX"}:
        values = np.moveaxis(values, 0, -1)
    elif axes not in {"YXS", "YXC"}:
        values = values.reshape(*values.shape, 1)[..., None]  # refused below, with its true shape
    channels = values.shape[-1]
    grey, rgb = photometric in {0, 1}, photometric == 2
    fits = values.ndim == 3 and (channels in {1, 3} or (channels == 4 and (rgb or extra)) or (channels == 2 and extra))
    if not fits or not (grey or rgb or (photometric == 3 and indices)) or values.dtype.kind not in "biuf":
        raise FileFault(
            path,
            "layout",
            f"a TIFF with axes {axes}, shape {tuple(series.shape)}, type {series.dtype}, "
            f"{page.photometric.name.lower()}",
            "one grey, RGB or RGBA picture",
            "Export it as such.",
        )
    if photometric == 0 and values.dtype.kind == "u" and not indices:  # white is zero
        values = np.iinfo(values.dtype).max - values
    return _split_alpha(_upright(values, orientation))
