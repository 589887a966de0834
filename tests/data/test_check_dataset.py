"""The check before training finds all planted faults in one pass, and nothing in good data."""

import json

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from hspsam_monai.data import check_dataset, find_cases, write_phantoms
from hspsam_monai.errors import ConfigError


def scene(seed, size=(64, 80)):
    """A smooth picture with structure, unlike every other seed's."""
    noise = np.random.default_rng(seed).normal(size=(*size, 3))
    smooth = gaussian_filter(noise, (4, 4, 0))
    return np.clip(128 + smooth * 700, 0, 255).astype(np.uint8)


def good_set(root, count=6, splits=True):
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    mask = np.zeros((64, 80), np.uint8)
    mask[10:30, 10:30] = 255
    for index in range(count):
        Image.fromarray(scene(index)).save(root / "images" / f"c{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"c{index}.png")
    if splits:
        stems = [f"c{index}" for index in range(count)]
        (root / "splits.json").write_text(json.dumps({"train": stems[:-2], "val": stems[-2:]}))
    return root


def kinds(findings):
    return sorted((finding.kind, finding.file) for finding in findings)


def test_good_data(tmp_path):
    seen = []
    report = check_dataset(good_set(tmp_path / "d"), progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert not report.warnings
    assert report.counts["cases"] == 6
    assert report.counts["split_train"] == 4
    assert report.counts["pixels_of_class_1"] == 2400
    assert seen == [(n, 6) for n in range(1, 7)]
    assert json.loads(report.to_json())["ok"] is True
    assert "0 faults, 0 warnings" in report.table()


def test_phantoms_are_good_data(tmp_path):
    report = check_dataset(write_phantoms(tmp_path / "p", 8, 1, (64, 80)))
    assert report.ok, report.table()
    assert report.counts["empty_masks"] == 1


def test_every_fault_of_files_in_one_pass(tmp_path):
    root = good_set(tmp_path / "d", 12, splits=False)
    (root / "masks" / "c0.png").unlink()
    (root / "images" / "c1.png").unlink()
    truncated = root / "images" / "c2.png"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    (root / "images" / "c3.png").write_bytes(b"")
    (root / "masks" / "c4.png").write_bytes(b"")
    Image.fromarray(np.zeros((64, 70), np.uint8)).save(root / "masks" / "c5.png")
    Image.fromarray(np.full((64, 80), 7, np.uint8)).save(root / "masks" / "c6.png")
    values = np.full((64, 80), np.nan, np.float32)
    (root / "images" / "c7.png").unlink()
    tifffile.imwrite(root / "images" / "c7.tif", values)
    Image.fromarray(scene(99)).save(root / "images" / "c8.jpg")
    Image.fromarray(scene(50, (20, 80))).save(root / "images" / "c9.png")
    Image.fromarray(np.zeros((20, 80), np.uint8)).save(root / "masks" / "c9.png")
    (root / "images" / "c10.png").unlink()
    (root / "images" / "c10.png").symlink_to(root / "nowhere.png")
    report = check_dataset(root)
    assert not report.ok
    assert kinds(report.faults) == [
        ("missing", "images/c10.png"),
        ("missing_image", "masks/c1.png"),
        ("missing_mask", "images/c0.png"),
        ("nan", "images/c7.tif"),
        ("same_name", "images/c8.png"),
        ("size_mismatch", "masks/c5.png"),
        ("unknown_label", "masks/c6.png"),
        ("unreadable", "images/c2.png"),
        ("zero_bytes", "images/c3.png"),
        ("zero_bytes", "masks/c4.png"),
    ]
    assert kinds(report.warnings) == [("small_image", "images/c9.png")]
    assert all("expected" in finding.message for finding in report.faults)
    assert "70x64" in report.table()
    assert "… and 9 more" in report.table(limit=1)
    assert len(json.loads(report.to_json())["faults"]) == 10


def test_faults_of_splits(tmp_path):
    root = good_set(tmp_path / "d")
    splits = {"train": ["c0", "c1", "c2"], "val": ["c2", "c3", "zz"], "fold": ["c0"]}
    (root / "splits.json").write_text(json.dumps(splits))
    report = check_dataset(root)
    assert kinds(report.faults) == [("split_missing_case", "zz"), ("split_overlap", "c2")]
    assert kinds(report.warnings) == [("not_in_split", "c4"), ("not_in_split", "c5")]
    (root / "splits.json").write_text("[]")
    (root / "masks" / "c0.png").unlink()
    assert [kind for kind, _ in kinds(check_dataset(root).faults)] == ["missing_mask", "splits"]


def test_an_image_no_split_names_needs_no_mask(tmp_path):
    root = good_set(tmp_path)
    Image.fromarray(scene(90)).save(root / "images" / "later.png")
    report = check_dataset(root)
    assert not report.faults and ("missing_mask", "images/later.png") in kinds(report.warnings)
    assert [case["case"] for case in find_cases(root, "val")] == ["c4", "c5"]
    (root / "splits.json").unlink()  # now it would be drawn
    assert kinds(check_dataset(root).faults) == [("missing_mask", "images/later.png")]


def test_duplicates(tmp_path):
    root = good_set(tmp_path / "d")  # val: c4, c5
    images = root / "images"
    (images / "c4.png").write_bytes((images / "c0.png").read_bytes())
    (images / "c2.png").write_bytes((images / "c1.png").read_bytes())
    brighter = np.clip(scene(3).astype(float) * 1.1, 0, 255).astype(np.uint8)
    Image.fromarray(brighter).resize((160, 128)).resize((80, 64)).save(images / "c5.png")
    report = check_dataset(root)
    assert kinds(report.faults) == [("duplicate", "images/c4.png")]
    assert kinds(report.warnings) == [("duplicate", "images/c2.png"), ("near_duplicate", "images/c5.png")]


def test_classes(tmp_path):
    root = good_set(tmp_path / "d")
    both = np.zeros((64, 80), np.uint8)
    both[5:9], both[20:30] = 1, 2
    for path in (root / "masks").iterdir():
        Image.fromarray(both * (both < 2) if path.stem < "c4" else both).save(path)
    Image.fromarray(np.zeros_like(both)).save(root / "masks" / "c0.png")
    for labels in ({"2": "tool"}, {2: "tool"}, {"tool": 2}):
        report = check_dataset(root, 3, labels)
        assert kinds(report.faults) == [("empty_class", "class 2 tool")]
        assert report.counts["empty_masks"] == 1


def test_copies_in_folders_without_splits_are_drawn_to_one_side(tmp_path):
    good_set(tmp_path / "u" / "one", splits=False)
    good_set(tmp_path / "u" / "two")
    for path in (tmp_path / "u" / "one" / "images").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
        mask = tmp_path / "u" / "one" / "masks" / path.name
        mask.rename(mask.with_name(f"other_{path.name}"))
    report = check_dataset(tmp_path / "u")
    assert report.ok and [finding.kind for finding in report.warnings] == ["duplicate"] * 6
    (tmp_path / "u" / "one" / "splits.json").write_text(json.dumps({"train": [f"other_c{i}" for i in range(6)]}))
    assert kinds(check_dataset(tmp_path / "u").faults) == [("duplicate", f"two/images/c{i}.png") for i in (4, 5)]


def test_a_test_case_among_the_others_of_a_list_is_a_fault(tmp_path):
    """The draw is find_cases' own, which does not know the list's test cases."""
    root = good_set(tmp_path / "d", 10, splits=False)
    (root / "images" / "t.png").write_bytes((root / "images" / "c0.png").read_bytes())
    training = [{"image": f"images/c{i}.png", "label": f"masks/c{i}.png"} for i in range(10)]
    (root / "dataset.json").write_text(json.dumps({"training": training, "test": ["images/t.png"]}))
    train = [case["case"] for case in find_cases(root, "train")]
    report = check_dataset(root)
    assert "c0" in train and kinds(report.faults) == [("duplicate", "images/t.png")]


def test_union_and_nothing(tmp_path):
    good_set(tmp_path / "u" / "one")
    good_set(tmp_path / "u" / "two")
    report = check_dataset(tmp_path / "u")
    assert kinds(report.warnings)[0] == ("duplicate", "two/images/c0.png")
    assert [f.file for f in report.faults] == []
    assert [f.kind for f in check_dataset(tmp_path / "none").faults] == ["layout"]
    (tmp_path / "empty" / "images").mkdir(parents=True)
    assert [f.kind for f in check_dataset(tmp_path / "empty").faults] == ["layout"]
    (tmp_path / "empty" / "masks").mkdir()
    assert [f.kind for f in check_dataset(tmp_path / "empty").faults] == ["no_cases"]
    with pytest.raises(ConfigError, match="num_classes"):
        check_dataset(tmp_path / "u", 1)


class TestVolumes:
    def volume(self, path, shape=(8, 9, 10), affine=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4) if affine is None else affine), path)

    def test_headers(self, tmp_path):
        entries = []
        for name in "abcdef":
            self.volume(tmp_path / "imagesTr" / f"{name}.nii.gz")
            self.volume(tmp_path / "labelsTr" / f"{name}.nii.gz")
            entries.append({"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"})
        del entries[5]["label"]
        self.volume(tmp_path / "labelsTr" / "b.nii.gz", (8, 9, 11))
        self.volume(tmp_path / "labelsTr" / "c.nii.gz", affine=np.diag([1, 1, 1.01, 1]))
        (tmp_path / "labelsTr" / "d.nii.gz").write_bytes(b"")
        (tmp_path / "imagesTr" / "e.nii.gz").write_bytes(b"broken")
        (tmp_path / "labelsTr" / "e.nii.gz").unlink()
        content = {"training": entries, "splits": {"train": ["a", "b", "c", "d"], "val": ["e", "x"]}}
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        report = check_dataset(tmp_path)
        assert kinds(report.faults) == [
            ("affine_mismatch", "labelsTr/c.nii.gz"),
            ("missing", "labelsTr/e.nii.gz"),
            ("missing_mask", "imagesTr/f.nii.gz"),
            ("size_mismatch", "labelsTr/b.nii.gz"),
            ("split_missing_case", "x"),
            ("unreadable", "imagesTr/e.nii.gz"),
            ("zero_bytes", "labelsTr/d.nii.gz"),
        ]
        assert report.counts["volumes"] == 6

    def test_broken_list(self, tmp_path):
        (tmp_path / "dataset.json").write_text('{"training": [{"image": "../a.nii"}]}')
        [fault] = check_dataset(tmp_path).faults
        assert fault.kind == "layout"
        assert "expected one inside" in fault.message
