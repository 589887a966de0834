"""Phantoms: the same seed gives the same frame, and a written set is a whole data set."""

import json

import numpy as np
import pytest
from PIL import Image

from hspsam_monai.data import find_cases, phantom, read_image, read_mask, write_phantoms
from hspsam_monai.errors import ConfigError, DataError


def test_deterministic():
    image, mask = phantom(7)
    again, same = phantom(7)
    assert image.shape == (256, 320, 3)
    assert mask.shape == (256, 320)
    assert image.dtype == mask.dtype == np.uint8
    assert np.array_equal(image, again)
    assert np.array_equal(mask, same)
    assert not np.array_equal(image, phantom(8)[0])


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (97, 211), (512, 640)])
def test_any_size(size):
    image, mask = phantom(3, size, empty=False)
    assert image.shape == (*size, 3)
    assert mask.shape == size
    assert mask.any()


def test_empty_or_with_polyp():
    for seed in range(12):
        assert not phantom(seed, (64, 80), empty=True)[1].any()
        mask = phantom(seed, (64, 80), empty=False)[1]
        assert set(np.unique(mask)) == {0, 1}
        assert mask.mean() < 0.5


def test_looks_like_tissue():
    """Red over green over blue on average, a dark and a bright part, and no clipped picture."""
    for seed in range(6):
        image, _ = phantom(seed, (128, 160))
        lit = image[image.max(-1) > 40].astype(float)
        assert lit[:, 0].mean() > lit[:, 1].mean() > lit[:, 2].mean() - 12
        assert len(lit) > 0.3 * 128 * 160
        assert (image.min(-1) > 250).mean() < 0.2


def test_written_set(tmp_path):
    root = write_phantoms(tmp_path / "a" / "p", 10, 5, (64, 80), val_fraction=0.3, empty_fraction=0.2)
    cases = find_cases(root)
    assert len(cases) == 10
    assert len(find_cases(root, "val")) == 3
    assert len(find_cases(root, "train")) == 7
    masks = [read_mask(case["label"]) for case in cases]
    assert sum(not mask.any() for mask in masks) == 2
    assert set(np.unique(np.asarray(Image.open(cases[0]["label"])))) <= {0, 255}
    assert read_image(cases[0]["image"]).shape == (64, 80, 3)
    assert sorted(path.name for path in root.parent.iterdir()) == ["p"]
    again = write_phantoms(tmp_path / "q", 10, 5, (64, 80), val_fraction=0.3, empty_fraction=0.2)
    for path in sorted(root.rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(root)).read_bytes()
    assert set(json.loads((root / "splits.json").read_text())) == {"train", "val"}


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match="no space left"):
        write_phantoms(tmp_path / "p", 2)
    assert list(tmp_path.iterdir()) == []


def test_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(DataError, match="already"):
        write_phantoms(tmp_path, 2)
    with pytest.raises(ConfigError, match="count 0"):
        write_phantoms(tmp_path / "p", 0)
    with pytest.raises(ConfigError, match="seed -1"):
        phantom(-1)
    with pytest.raises(ConfigError, match="sides from 32"):
        phantom(0, (8, 8))
