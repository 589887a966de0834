"""What a person looks at: overlays, palette masks, contact sheets, the HTML page, learning curves."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.inference.mask_files import PALETTE, write_mask_png
from hspsam_monai.report import (
    TRUTH_COLOUR,
    GalleryItem,
    gallery_html,
    gallery_png,
    learning_curve_png,
    overlay,
    worst_first,
)
from hspsam_monai.report.charts import nice_ticks
from hspsam_monai.report.overlay import CONFUSED, FALSE_NEGATIVE, FALSE_POSITIVE
from hspsam_monai.scores import CaseScore, score_masks, summarise

VOID = {"meta", "input", "img", "line"}


def square(size=96, start=30, stop=66, value=1):
    mask = np.zeros((size, size), np.uint8)
    mask[start:stop, start:stop] = value
    return mask


def item(name, shift, size=96, **more):
    truth = square(size)
    pred = np.roll(truth, shift, axis=1)
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    scores = CaseScore.from_scores(name, f"{name}.png", score_masks(pred, truth, 2), **more)
    return GalleryItem(name, image, truth, pred, scores)


def near(pixel, colour, tolerance=30):
    return np.abs(np.asarray(pixel, int) - np.asarray(colour, int)).max() <= tolerance


def test_palette_is_fixed_distinct_and_safe_for_the_first_classes():
    assert PALETTE.shape == (64, 3) and PALETTE.dtype == np.uint8
    assert tuple(PALETTE[0]) == (0, 0, 0)
    assert len({tuple(c) for c in PALETTE}) == 64
    with pytest.raises(ValueError):
        PALETTE[0] = 1
    # Machado 2009, full severity, in linear RGB: protan, deutan, tritan.
    views = [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    colours = np.vstack([PALETTE[:9], [TRUTH_COLOUR]]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    for i, view in enumerate(views):
        xyz = np.clip(linear @ np.array(view).T, 0, 1) @ to_xyz.T / (0.9505, 1.0, 1.0888)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=2)[np.triu_indices(len(lab), 1)]
        assert distance.min() > (11 if i == 3 else 20)  # tritan deficiency is a thousand times rarer


def test_overlay_draws_both_outlines_and_leaves_the_rest():
    image = np.full((96, 96, 3), 128, np.uint8)
    drawn = overlay(image, square(), square(start=10, stop=86), line=3)
    assert drawn.shape == (96, 96, 3) and drawn.dtype == np.uint8
    assert near(drawn[48, 30], PALETTE[1]) and near(drawn[48, 10], TRUTH_COLOUR)
    assert near(drawn[48, 48], (128, 128, 128), 0) and near(drawn[2, 2], (128, 128, 128), 0)
    assert (image == 128).all()  # the caller's image is untouched
    for tone in (0, 255):  # the seam or the line stands out on any ground
        plain = np.full((96, 96), tone, np.uint8)
        assert np.abs(overlay(plain, square()).astype(int) - tone).max() > 150


def test_overlay_lines_are_antialiased_and_scale():
    mask = np.hypot(*np.mgrid[-60:60, -60:60]) < 40
    drawn = overlay(np.zeros((120, 120), np.uint8), mask.astype(int), line=2)
    assert len(np.unique(drawn[..., 2])) > 20
    widths = []
    for size in (100, 600):
        drawn = overlay(np.full((size, size), 200, np.uint8), square(size, size // 3, size * 2 // 3))
        widths.append((drawn[size // 2, : size // 2] != 200).any(axis=-1).sum())
    assert widths[1] >= 2.5 * widths[0]


def test_overlay_fill_and_error_map():
    image = np.full((96, 96), 0.5)
    filled = overlay(image, square(), fill=1.0)
    assert near(filled[48, 48], PALETTE[1], 1)
    truth, pred = square(start=20, stop=60), square(start=40, stop=80)
    truth[44:56, 44:56], pred[44:56, 44:56] = 1, 2
    errors = overlay(image, pred, truth, errors=True).astype(int)
    tint = {"fp": (72, 72), "fn": (28, 28), "other": (50, 50)}
    for name, colour in (("fp", FALSE_POSITIVE), ("fn", FALSE_NEGATIVE), ("other", CONFUSED)):
        expected = 128 + (np.array(colour) - 128) * 0.65
        assert near(errors[tint[name]], expected, 1)
    assert near(errors[90, 5], (128, 128, 128), 1)


@pytest.mark.parametrize("mask", [np.zeros((20, 24), int), np.ones((20, 24), bool), np.eye(20, 24, dtype=int) * 200])
def test_overlay_of_empty_full_and_odd_masks(mask):
    drawn = overlay(np.zeros((20, 24, 1), np.float32), mask, mask, fill=0.2)
    assert drawn.shape == (20, 24, 3)


def test_overlay_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="expected one size"):
        overlay(np.zeros((9, 9)), np.zeros((9, 8), int))
    with pytest.raises(DataError, match="expected uint8"):
        overlay(np.zeros((9, 9), np.int16), np.zeros((9, 9), int))
    with pytest.raises(DataError, match="error map"):
        overlay(np.zeros((9, 9)), np.zeros((9, 9), int), errors=True)


def test_mask_png_reads_back_as_indices_and_shows_colours(tmp_path):
    mask = np.random.default_rng(0).integers(0, 256, (37, 53))
    path = write_mask_png(tmp_path / "m.png", mask)
    with Image.open(path) as picture:
        assert picture.mode == "P" and picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), mask)
        colours = np.asarray(picture.convert("RGB"))
    assert np.array_equal(colours[mask < 64], PALETTE[mask[mask < 64]])
    assert colours[mask > 0].any(axis=1).all()  # no class is black
    binary = write_mask_png(tmp_path / "b.png", square().astype(bool))
    assert binary.read_bytes()[24] == 8  # bit depth in the header
    assert list(tmp_path.glob(".*")) == []
    for wrong in (mask - 1, mask + 1, mask / 2, mask[None]):
        with pytest.raises(DataError):
            write_mask_png(tmp_path / "w.png", wrong)
    assert not (tmp_path / "w.png").exists()


def test_worst_first_order():
    loose = [GalleryItem(n, square(), None, square(), confidence=c) for n, c in (("x", 0.9), ("y", 0.2), ("z", None))]
    items = [item("good", 1), item("bad", 30), item("middle", 10), *loose]
    assert [i.case for i in worst_first(items)] == ["bad", "middle", "good", "y", "x", "z"]


def test_gallery_png_grows_with_its_cases_and_caps_them(tmp_path):
    items = [item(f"case{i}", i) for i in range(5)]
    sizes = []
    for count, rows in ((1, 9), (5, 9), (5, 1)):
        path = gallery_png(tmp_path / "g.png", items[:count], 2, "A title", max_rows=rows, panel=96)
        with Image.open(path) as picture:
            picture.load()
            sizes.append(picture.size)
    assert sizes[1][1] > sizes[0][1] == sizes[2][1]
    assert sizes[0][0] == sizes[1][0] > 2 * 4 * 96


def test_gallery_png_takes_long_names_odd_sizes_loaders_and_no_truth(tmp_path):
    wide = np.zeros((20, 90), np.uint8)
    items = [
        GalleryItem("x" * 300 + "\n\u0000", lambda: wide, None, lambda: wide, confidence=0.5),
        GalleryItem("grey", square() / 2, None, square()),
        item("scored", 3),
    ]
    assert gallery_png(tmp_path / "g.png", items, columns=1).stat().st_size > 0
    with pytest.raises(DataError, match="at least one"):
        gallery_png(tmp_path / "g.png", [])
    with pytest.raises(ConfigError):
        gallery_png(tmp_path / "g.png", items, columns=0)
    with pytest.raises(DataError, match="odd: the prediction is"):
        gallery_png(tmp_path / "g.png", [GalleryItem("odd", wide, None, square())])


class Page(HTMLParser):
    """Collects what a page holds and checks that its tags nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.names = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag == "tr" and "data-name" in dict(attrs):
            self.names.append(dict(attrs)["data-name"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_self_contained_and_escaped(tmp_path):
    evil = 'a/<script>alert("1")</script>{body}&'
    items = [item("b/good", 1, confidence=0.5), item(evil, 20), item("b/bad", 34)]
    path = gallery_html(tmp_path / "g.html", items, summarise([i.scores for i in items]), "<script>t</script>{body}")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.names == ["b/bad", evil.lower(), "b/good"]  # worst first, and the name survives its escaping
    assert page.tags.count("script") == 1 and "<script>alert" not in text and "<script>t" not in text
    assert page.tags.count("img") == 3 * 4 and page.tags.count("svg") == 1
    for tag, key, value in page.attributes:
        if key in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
            assert tag == "img" and value.startswith("data:image/jpeg;base64,")
        assert not key.startswith("on")  # no inline handlers
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'data:image/jpeg;base64,[^"]+', "", text))
    assert "default-src 'none'" in text
    assert f"{summarise([i.scores for i in items])['dice']['mean']:.3f}" in text and "95 % CI" in text
    for value in re.findall(r'data:image/jpeg;base64,([^"]+)', text):
        with Image.open(io.BytesIO(base64.b64decode(value))) as picture:
            assert max(picture.size) <= 320


def test_html_without_truth(tmp_path):
    items = [GalleryItem(n, square(), None, square(), confidence=c) for n, c in (("sure", 0.9), ("unsure", 0.1))]
    text = gallery_html(tmp_path / "g.html", items, title="Predictions").read_text(encoding="utf-8")
    page = Page(text)
    assert page.names == ["unsure", "sure"]
    assert page.tags.count("img") == 4 and "svg" not in page.tags and "Dice below" not in text


def test_html_says_how_many_cases_it_leaves_out(tmp_path):
    items = [item(f"case{i}", i) for i in range(6)]
    text = gallery_html(tmp_path / "g.html", items, max_items=2, thumbnail=64).read_text(encoding="utf-8")
    assert Page(text).names == ["case5", "case4"]
    assert "2 of 6 cases" in text and "4 more are left out" in text
    with pytest.raises(ConfigError):
        gallery_html(tmp_path / "g.html", items, thumbnail=1000)
    with pytest.raises(DataError):
        gallery_html(tmp_path / "g.html", [])


def test_learning_curve(tmp_path):
    series = {
        "train loss": [1.0, 0.5, 0.2],
        "val Dice": [None, 0.8, float("nan")],
        "val IoU": [0.1, 0.7, 0.75],
    }
    path = learning_curve_png(tmp_path / "l.png", [1, 2, 3], series, title="Run")
    with Image.open(path) as picture:
        assert picture.size == (900, 380)
        assert len(picture.getcolors(1 << 20)) > 50
    flat = {"loss": [0.0], "empty": [None]}
    assert learning_curve_png(tmp_path / "l.png", [5], flat, best="loss").exists()
    with pytest.raises(DataError, match="of length"):
        learning_curve_png(tmp_path / "l.png", [1, 2], {"loss": [1.0]})
    with pytest.raises(DataError, match="at least one"):
        learning_curve_png(tmp_path / "l.png", [], {})
    with pytest.raises(ConfigError, match="no series"):
        learning_curve_png(tmp_path / "l.png", [1], {"loss": [1.0]}, best="Dice")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.81, 0.83), (-3, 1e6), (1e-7, 2e-7), (3e-13, 3e-13), (5, 5), (0, 0)]
)
def test_ticks_enclose_and_are_few(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert np.diff(ticks) == pytest.approx(ticks[1] - ticks[0])
