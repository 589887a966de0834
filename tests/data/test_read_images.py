"""Every kind of picture file read right, or refused with a sentence that helps."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from monai.bundle import ConfigParser
from monai.transforms import LoadImaged
from PIL import Image

from hspsam_monai.data import MaskReader, read_image, read_mask
from hspsam_monai.data.decode import FileFault
from hspsam_monai.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
BLOB = np.zeros((20, 30), np.uint8)
BLOB[5:12, 8:20] = 1


def save(path, array, mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def deep_png(path, array, colour_type):
    """A 16-bit PNG, which Pillow cannot write in colour."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + array[y].astype(">u2").tobytes() for y in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


class TestTooLarge:
    """More pixels than Pillow reads, whoever decodes the file."""

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "deep.tif", "deep.png"])
    def test_the_reason_and_the_limit_are_named(self, tmp_path, monkeypatch, name):
        path = tmp_path / name
        if name == "deep.tif":
            tifffile.imwrite(path, np.zeros((20, 30), np.uint16))
        elif name == "deep.png":
            deep_png(path, np.zeros((20, 30, 3), np.uint16), 2)
        else:
            save(path, RGB)
        read_image(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
        with pytest.raises(FileFault, match=r"more pixels than are read .* at most 598 pixels") as caught:
            read_image(path)
        assert caught.value.kind == "too_large"
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        read_image(path)


class TestReadImage:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
    def test_rgb_is_exact(self, tmp_path, suffix):
        options = {"lossless": True} if suffix == "webp" else {}
        image = read_image(save(tmp_path / f"a.{suffix}", RGB, **options))
        assert image.dtype == np.float32
        assert image.flags.writeable
        np.testing.assert_allclose(image, RGB / 255, atol=1e-6)

    @pytest.mark.parametrize("mode", ["L", "1"])
    def test_grey_is_repeated(self, tmp_path, mode):
        grey = Image.fromarray(RGB).convert(mode)
        image = read_image(save(tmp_path / "a.png", grey))
        assert image.shape == (20, 30, 3)
        np.testing.assert_allclose(image[..., 1], np.asarray(grey.convert("L")) / 255, atol=1e-6)
        assert (image[..., :1] == image).all()

    def test_transparency_is_laid_on_black(self, tmp_path):
        alpha = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
        image = read_image(save(tmp_path / "a.png", np.dstack([RGB, alpha])))
        np.testing.assert_allclose(image, RGB / 255 * (alpha / 255)[..., None], atol=1e-6)
        grey = read_image(save(tmp_path / "b.png", Image.fromarray(np.dstack([RGB[..., 0], alpha]), "LA")))
        np.testing.assert_allclose(grey[..., 0], RGB[..., 0] / 255 * alpha / 255, atol=1e-6)

    def test_palette_gives_colours_and_its_transparency(self, tmp_path):
        indexed = Image.fromarray(BLOB, "P")
        indexed.putpalette([10, 20, 30, 200, 100, 50])
        np.testing.assert_allclose(read_image(save(tmp_path / "a.png", indexed))[6, 9], np.array([200, 100, 50]) / 255)
        image = read_image(save(tmp_path / "b.png", indexed, transparency=1))
        assert not image[6, 9].any()
        assert image[0, 0].any()

    def test_cmyk(self, tmp_path):
        flat = np.full((20, 30, 3), (200, 60, 40), np.uint8)
        image = read_image(save(tmp_path / "a.jpg", flat, "CMYK", quality=95))
        np.testing.assert_allclose(image[3, 3] * 255, [200, 60, 40], atol=6)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_undone(self, tmp_path, orientation):
        """The bright corner lies at the upper left of the upright picture, whatever the camera stored."""
        upright = np.zeros((16, 32, 3), np.uint8)
        upright[:8, :8] = 255
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.swapaxes(0, 1),
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].swapaxes(0, 1),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[274] = orientation
        image = read_image(save(tmp_path / "a.jpg", np.ascontiguousarray(stored), exif=exif))
        assert image.shape == (16, 32, 3)
        assert image[2, 2].min() > 0.9
        assert image[12, 28].max() < 0.1
        tifffile.imwrite(
            tmp_path / "b.tif",
            stored.astype(np.uint16),
            photometric="rgb",
            extratags=[(274, "H", 1, orientation)],
        )
        assert np.array_equal(read_image(tmp_path / "b.tif"), upright / 255)
        mask = save(tmp_path / "m.png", np.ascontiguousarray(stored[..., 0]), exif=exif)
        assert np.array_equal(read_mask(mask), upright[..., 0] // 255)

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
    @pytest.mark.parametrize("orientation", [1, 6, 8])
    def test_exif_orientation_of_an_uncompressed_tiff(self, tmp_path, mode, orientation):
        """Pillow maps such files into memory when it opens them by name."""
        upright = np.zeros((20, 30), np.uint8)
        upright[:10, :5] = 255
        stored = np.ascontiguousarray(np.rot90(upright, {1: 0, 6: 1, 8: -1}[orientation]))
        path = tmp_path / "a.tif"
        Image.fromarray(stored).convert(mode).save(path, tiffinfo={274: orientation})
        assert np.array_equal(read_image(path), np.repeat(upright[..., None] / 255, 3, 2))
        if mode == "L":
            assert np.array_equal(read_mask(path), upright // 255)

    @pytest.mark.parametrize("kind", ["png", "tif", "png_rgb", "tif_rgb", "tif_planar", "float"])
    def test_more_than_8_bits_is_scaled_by_percentiles(self, tmp_path, kind):
        """12-bit data in a 16-bit file must not come out black."""
        deep = RNG.integers(100, 4096, (40, 50, 3), dtype=np.uint16)
        deep[0, 0] = 65535  # a hot pixel must not set the range
        path = tmp_path / f"a.{'png' if 'png' in kind else 'tif'}"
        if kind == "png":
            deep = deep[..., :1]
            save(path, deep[..., 0])
        elif kind == "png_rgb":
            deep_png(path, deep, 2)
        elif kind == "tif_planar":
            tifffile.imwrite(path, deep.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
        elif kind == "tif_rgb":
            tifffile.imwrite(path, deep, photometric="rgb", compression="zlib")
        else:
            deep = deep[..., :1]
            tifffile.imwrite(path, deep[..., 0].astype(np.float32 if kind == "float" else np.uint16))
        low, high = np.percentile(deep.astype(float), (0.5, 99.5))
        expected = np.clip((deep.astype(float) - low) / (high - low), 0, 1)
        np.testing.assert_allclose(read_image(path), np.broadcast_to(expected, (40, 50, 3)), atol=1e-5)

    def test_16_bit_alpha(self, tmp_path):
        deep = RNG.integers(0, 65536, (9, 7, 4), dtype=np.uint16)
        deep[..., 3] = 65535
        deep[:4, :, 3] = 0
        image = read_image(deep_png(tmp_path / "a.png", deep, 6))
        assert not image[:4].any()
        assert image[4:].max() == 1

    def test_constant_deep_picture_is_zero_and_sparse_one_is_not(self, tmp_path):
        assert not read_image(save(tmp_path / "a.png", np.full((9, 9), 5000, np.uint16))).any()
        sparse = np.zeros((40, 40), np.uint16)
        sparse[3, 3] = 900
        assert read_image(save(tmp_path / "b.png", sparse))[3, 3, 0] == 1

    def test_white_is_zero_tiff(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 65535]] * 4, np.uint16), photometric="miniswhite")
        assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [1, 0]


def bytes_of(array, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "content", "kind", "words"),
        [
            ("a.png", b"", "zero_bytes", "zero bytes"),
            ("a.jpg", b"<html>404</html>", "unreadable", "no known picture format"),
            ("a.jpg", bytes_of(NOISE, "JPEG")[:1500], "unreadable", "truncated"),
            ("a.png", bytes_of(NOISE, "PNG")[:6000], "unreadable", "cannot be decoded"),
            ("a.tif", bytes_of(NOISE, "TIFF")[:3000], "unreadable", "cannot be decoded"),
            ("a.tif", b"II*\0 nothing", "unreadable", "cannot be decoded"),
        ],
    )
    def test_damaged_file(self, tmp_path, name, content, kind, words):
        (tmp_path / name).write_bytes(content)
        for read in (read_image, read_mask):
            with pytest.raises(DataError, match=words) as caught:
                read(tmp_path / name)
            assert caught.value.kind == kind
            assert name in str(caught.value)
            assert "expected" in str(caught.value)

    def test_one_flipped_byte_in_png(self, tmp_path):
        content = bytearray(bytes_of(NOISE, "PNG", compress_level=0))
        content[5000] ^= 8
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.png"):
            read_image(tmp_path / "a.png")

    def test_truncated_deep_tiff(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 9999, (64, 64), dtype=np.uint16))
        (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:4000])
        with pytest.raises(DataError, match=r"a\.tif"):
            read_image(tmp_path / "a.tif")

    def test_missing_and_folder(self, tmp_path):
        with pytest.raises(DataError, match="no such file"):
            read_image(tmp_path / "a.png")
        with pytest.raises(DataError, match="a folder"):
            read_image(tmp_path)

    def test_nan(self, tmp_path):
        values = np.ones((8, 8), np.float32)
        values[2, 3] = np.nan
        tifffile.imwrite(tmp_path / "a.tif", values)
        with pytest.raises(DataError, match="1 values that are NaN") as caught:
            read_image(tmp_path / "a.tif")
        assert caught.value.kind == "nan"

    def test_several_pages(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 16, 16), np.uint8), photometric="minisblack")
        Image.fromarray(RGB).save(tmp_path / "b.png", save_all=True, append_images=[Image.fromarray(255 - RGB)])
        for name in ("a.tif", "b.png"):
            with pytest.raises(DataError, match="pages or frames"):
                read_image(tmp_path / name)

    def test_unusual_channels(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", np.zeros((16, 16, 7), np.uint16), photometric="minisblack")
        with pytest.raises(DataError, match=r"one grey, RGB or RGBA picture|pages"):
            read_image(tmp_path / "a.tif")

    def test_fault_survives_a_process_border(self):
        fault = pickle.loads(pickle.dumps(FileFault("a.png", "nan", "b", "c", "d.")))
        assert str(fault) == "a.png: found b; expected c. d."
        assert fault.kind == "nan"


class TestReadMask:
    @pytest.mark.parametrize("scale", [1, 255])
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1"])
    def test_binary(self, tmp_path, scale, mode):
        image = Image.fromarray(BLOB * np.uint8(scale))
        if mode == "1":
            image = Image.fromarray(BLOB.astype(bool))
        mask = read_mask(save(tmp_path / "a.png", image, mode))
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, BLOB)

    def test_palette_index(self, tmp_path):
        classes = RNG.integers(0, 9, (20, 30), dtype=np.uint8)
        image = Image.fromarray(classes, "P")
        image.putpalette(RNG.integers(0, 256, 27).tolist())
        assert np.array_equal(read_mask(save(tmp_path / "a.png", image), 9), classes)
        assert np.array_equal(read_mask(save(tmp_path / "b.png", image, transparency=0), 9), classes)

    def test_palette_that_would_be_read_inverted(self, tmp_path):
        image = Image.fromarray(1 - BLOB, "P")
        image.putpalette([255, 255, 255, 0, 0, 0])
        with pytest.raises(DataError, match="index 0 is white"):
            read_mask(save(tmp_path / "a.png", image))
        empty = Image.fromarray(np.ones_like(BLOB), "P")
        empty.putpalette([255, 255, 255, 0, 0, 0])
        with pytest.raises(DataError, match="index 0 is white"):
            read_mask(save(tmp_path / "b.png", empty))
        full = Image.fromarray(np.ones_like(BLOB), "P")
        full.putpalette([0, 0, 0, 255, 255, 255])
        assert read_mask(save(tmp_path / "c.png", full)).all()

    @pytest.mark.parametrize("array", [BLOB.astype(bool), BLOB * 255, BLOB.astype(np.uint16) * 65535])
    def test_tiff_masks_whose_white_is_zero(self, tmp_path, array):
        """Boolean arrays come so from tifffile, not inverted; other programs' files of this kind are."""
        tifffile.imwrite(tmp_path / "a.tif", array, photometric=None if array.dtype == bool else "miniswhite")
        with pytest.raises(DataError, match="white is zero"):
            read_mask(tmp_path / "a.tif")

    def test_a_tiff_mask_that_does_not_say_what_white_is(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", BLOB.astype(np.uint16), photometric="minisblack")
        raw = bytearray((tmp_path / "a.tif").read_bytes())
        entry = raw.index(struct.pack("<HH", 262, 3))
        raw[entry : entry + 2] = struct.pack("<H", 65000)  # a private tag in its place
        (tmp_path / "b.tif").write_bytes(raw)
        assert np.array_equal(read_mask(tmp_path / "b.tif"), BLOB)

    def test_classes_in_8_and_16_bit(self, tmp_path):
        classes = RNG.integers(0, 9, (20, 30), dtype=np.uint8)
        for name, array in [("a.png", classes), ("b.png", classes.astype(np.uint16))]:
            assert np.array_equal(read_mask(save(tmp_path / name, array), 9), classes)
        tifffile.imwrite(tmp_path / "c.tif", classes.astype(np.uint16))
        tifffile.imwrite(tmp_path / "d.tif", classes.astype(np.float32))
        assert np.array_equal(read_mask(tmp_path / "c.tif", 9), classes)
        assert np.array_equal(read_mask(tmp_path / "d.tif", 9), classes)

    def test_4_bit_grey_means_the_stored_numbers(self, tmp_path):
        rows = b"".join(b"\0" + bytes([0x01, 0x23]) for _ in range(4))
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 4, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        ]
        body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        assert read_mask(tmp_path / "a.png", 4)[0].tolist() == [0, 1, 2, 3]

    def test_jpeg_of_a_binary_task(self, tmp_path):
        for mode in ("L", "RGB"):
            path = save(tmp_path / "a.jpg", Image.fromarray(BLOB * np.uint8(255)), mode, quality=80)
            assert np.array_equal(read_mask(path), BLOB)

    @pytest.mark.parametrize(
        ("content", "classes", "words"),
        [
            (BLOB * np.uint8(7), 2, "unknown label 7 in 84 of 600 pixels"),
            (BLOB * np.uint8(255), 3, r"unknown label 255 .*class numbers 0\.\.2"),
            (
                np.arange(20, dtype=np.uint8)[:, None].repeat(30, 1),
                2,
                "2, 3, 4, 5, 6, 7, 8, 9 and 10 more in 540",
            ),
            (np.full((8, 8), 300, np.uint16), 256, "unknown label 300"),
            (RGB, 2, "colour-coded"),
            (np.dstack([BLOB * 0, BLOB * 0, BLOB * 0, BLOB * np.uint8(255)]), 2, "transparency only"),
        ],
    )
    def test_refused_values(self, tmp_path, content, classes, words):
        with pytest.raises(DataError, match=words) as caught:
            read_mask(save(tmp_path / "a.png", content), classes)
        assert caught.value.kind == "unknown_label"

    def test_fractions_are_no_labels(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", BLOB.astype(np.float32) * 0.5)
        with pytest.raises(DataError, match=r"unknown label 0\.5"):
            read_mask(tmp_path / "a.tif")

    @pytest.mark.parametrize(("content", "classes"), [(RGB, 2), (RGB[..., 0], 2), (BLOB * np.uint8(40), 2), (BLOB, 3)])
    def test_refused_jpeg(self, tmp_path, content, classes):
        with pytest.raises(DataError, match=r"PNG|colour-coded"):
            read_mask(save(tmp_path / "a.jpg", content), classes)

    def test_several_masks_merge_by_maximum(self, tmp_path):
        other = np.roll(BLOB, 6, 1) * np.uint8(2)
        paths = [save(tmp_path / "a.png", BLOB), save(tmp_path / "b.png", other)]
        assert np.array_equal(read_mask(paths, 3), np.maximum(BLOB, other))
        paths.append(save(tmp_path / "c.png", BLOB[:10]))
        with pytest.raises(DataError, match="found a mask of 30x10 pixels; expected 30x20"):
            read_mask(paths, 3)

    def test_arguments(self, tmp_path):
        with pytest.raises(ConfigError, match="num_classes is 1"):
            read_mask(tmp_path / "a.png", 1)
        with pytest.raises(ConfigError, match="empty list"):
            read_mask([])
        with pytest.raises(ConfigError, match="num_classes is 300"):
            MaskReader(300)


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestReaders:
    def test_from_a_bundle_configuration(self, tmp_path):
        config = {
            "image": {
                "_target_": "LoadImaged",
                "keys": "image",
                "reader": "hspsam_monai.data.PhotoReader",
                "ensure_channel_first": True,
            },
            "label": {
                "_target_": "LoadImaged",
                "keys": "label",
                "reader": "hspsam_monai.data.MaskReader",
                "num_classes": 3,
                "ensure_channel_first": True,
            },
        }
        parser = ConfigParser(config)
        other = np.roll(BLOB, 6, 1) * np.uint8(2)
        case = {
            "image": str(save(tmp_path / "a.png", RGB)),
            "label": [str(save(tmp_path / "m.png", BLOB)), str(save(tmp_path / "n.png", other))],
        }
        loaded = parser.get_parsed_content("label")(parser.get_parsed_content("image")(case))
        image, label = loaded["image"], loaded["label"]
        assert image.shape == (3, 20, 30)
        assert image.dtype == torch.float32
        np.testing.assert_allclose(image.numpy(), RGB.transpose(2, 0, 1) / 255, atol=1e-6)
        assert label.shape == (1, 20, 30)
        assert np.array_equal(label[0].numpy(), np.maximum(BLOB, other))
        assert image.meta["filename_or_obj"] == case["image"]
        assert tuple(image.meta["spatial_shape"]) == (20, 30)
        assert image.meta["original_channel_dim"] == -1
        assert np.isnan(label.meta["original_channel_dim"])
        assert torch.equal(image.affine, torch.eye(4, dtype=torch.float64))

    def test_a_faulty_mask_is_not_read_by_another_reader(self, tmp_path):
        """LoadImage tries MONAI's readers after ours; they would return label 7."""
        load = LoadImaged(keys="label", reader="hspsam_monai.data.MaskReader", num_classes=2)
        with pytest.raises(DataError, match="unknown label 7"):
            load({"label": str(save(tmp_path / "a.png", BLOB * np.uint8(7)))})

    def test_suffixes_and_several_photographs(self, tmp_path):
        reader = MaskReader()
        assert reader.verify_suffix(["a.PNG", "b.tiff"])
        assert not reader.verify_suffix("a.nii.gz")
        load = LoadImaged(keys="image", reader="hspsam_monai.data.PhotoReader")
        path = str(save(tmp_path / "a.png", RGB))
        with pytest.raises(DataError, match="one file a case"):
            load({"image": [path, path]})
