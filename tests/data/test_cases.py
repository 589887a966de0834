"""Folders to cases: layouts, splits, and every refusal."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hspsam_monai.data import find_cases
from hspsam_monai.errors import ConfigError, DataError


def picture(path, value=0, size=(40, 40)):
    """A file that differs by its value; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


def folder_set(root, stems=("a", "b", "c"), suffix=".jpg"):
    for index, stem in enumerate(stems):
        picture(root / "images" / f"{stem}{suffix}", 10 * index)
        picture(root / "masks" / f"{stem}.png")
    return root


def names(cases):
    return [case["case"] for case in cases]


def relative(case, root):
    label = case["label"]
    return [os.path.relpath(path, root / "masks") for path in ([label] if isinstance(label, str) else label)]


class TestFolder:
    def test_pairs(self, tmp_path):
        folder_set(tmp_path, suffix=".JPG")
        (tmp_path / "images" / ".hidden.jpg").write_bytes(b"")
        (tmp_path / "images" / "Thumbs.db").write_bytes(b"")
        (tmp_path / "images" / "notes.txt").write_bytes(b"")
        cases = find_cases(tmp_path)
        assert names(cases) == ["a", "b", "c"]
        assert cases[0] == {
            "image": str(tmp_path / "images" / "a.JPG"),
            "label": str(tmp_path / "masks" / "a.png"),
            "case": "a",
        }
        assert find_cases(str(tmp_path)) == cases

    def test_mask_names(self, tmp_path):
        for stem in ("a", "a_1", "b", "c_mask", "d"):
            picture(tmp_path / "images" / f"{stem}.png")
        for name in ("a", "a_2", "a_1", "b_mask", "b_mask_1", "c_mask", "d/x", "d/y"):
            picture(tmp_path / "masks" / f"{name}.png")
        found = {case["case"]: relative(case, tmp_path) for case in find_cases(tmp_path)}
        assert found == {
            "a": ["a.png", "a_2.png"],
            "a_1": ["a_1.png"],  # an image has this name, so it is no second mask of a
            "b": ["b_mask.png", "b_mask_1.png"],
            "c_mask": ["c_mask.png"],
            "d": [os.path.join("d", "x.png"), os.path.join("d", "y.png")],
        }

    def test_union_of_sub_folders(self, tmp_path):
        folder_set(tmp_path / "kvasir")
        folder_set(tmp_path / "clinicdb", ("1", "2"))
        (tmp_path / "other").mkdir()
        assert names(find_cases(tmp_path)) == ["clinicdb/1", "clinicdb/2", "kvasir/a", "kvasir/b", "kvasir/c"]
        (tmp_path / "again").symlink_to(tmp_path / "kvasir")
        (tmp_path / "loop").symlink_to(tmp_path)
        assert len(find_cases(tmp_path)) == 5

    def test_image_without_mask(self, tmp_path):
        folder_set(tmp_path)
        for index in range(7):
            picture(tmp_path / "images" / f"x{index}.png")
        with pytest.raises(DataError, match=r"found 7 images without mask \(x0, x1, x2, x3, x4 and 2 more\)"):
            find_cases(tmp_path)
        assert len(find_cases(tmp_path, labels=False)) == 10

    def test_two_images_of_one_name(self, tmp_path):
        picture(folder_set(tmp_path) / "images" / "a.png")
        with pytest.raises(DataError, match="several images of one name"):
            find_cases(tmp_path)

    def test_nothing(self, tmp_path):
        with pytest.raises(DataError, match="no such file or folder"):
            find_cases(tmp_path / "none")
        with pytest.raises(DataError, match=r"expected images/ and masks/"):
            find_cases(tmp_path)
        (tmp_path / "images").mkdir()
        (tmp_path / "masks").mkdir()
        with pytest.raises(DataError, match="found no picture"):
            find_cases(tmp_path)


class TestSplits:
    def given(self, root, splits):
        (folder_set(root) / "splits.json").write_text(splits if isinstance(splits, str) else json.dumps(splits))
        return root

    def test_given(self, tmp_path):
        self.given(tmp_path, {"train": ["c", "a"], "val": ["b"], "fold0": ["a", "b"]})
        assert names(find_cases(tmp_path, "train")) == ["a", "c"]
        assert names(find_cases(tmp_path, "val")) == ["b"]
        assert names(find_cases(tmp_path, "fold0")) == ["a", "b"]
        assert names(find_cases(tmp_path, "all")) == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("splits", "words"),
        [
            ({"val": ["a"]}, "found the splits val; expected one named 'train'"),
            ({"train": ["a", "zz"]}, r"1 names in split 'train' without image \(zz\)"),
            ({"train": ["a.jpg"]}, "Leave out the suffix"),
            ({"train": ["a", "b"], "val": ["b"]}, r"in train and in val or test \(b\)"),
            ({"train": []}, "empty split"),
            ({"train": "a"}, "splits of another form"),
            ("{", "expected a JSON file"),
        ],
    )
    def test_refused(self, tmp_path, splits, words):
        self.given(tmp_path, splits)
        with pytest.raises(DataError, match=words):
            find_cases(tmp_path, "train")

    def test_a_mask_may_be_missing_outside_the_split(self, tmp_path):
        self.given(tmp_path, {"train": ["a"], "val": ["b"]})
        (tmp_path / "masks" / "c.png").unlink()
        assert names(find_cases(tmp_path, "train")) == ["a"]

    def test_drawn(self, tmp_path):
        stems = [f"{index:02d}" for index in range(20)]
        folder_set(tmp_path / "one", stems)
        folder_set(tmp_path / "two", stems)
        train, val = (names(find_cases(tmp_path / "one", split)) for split in ("train", "val"))
        assert (len(train), len(val)) == (16, 4)
        assert sorted(train + val) == stems
        assert val == names(find_cases(tmp_path / "two", "val"))
        assert val != names(find_cases(tmp_path / "one", "val", seed=1))
        assert len(find_cases(tmp_path / "one", "val", val_fraction=0.5)) == 10
        with pytest.raises(DataError, match=r"found no splits\.json"):
            find_cases(tmp_path / "one", "test")
        with pytest.raises(ConfigError, match="val_fraction"):
            find_cases(tmp_path / "one", val_fraction=1)

    def test_identical_images_stay_on_one_side(self, tmp_path):
        for index in range(24):
            picture(tmp_path / "images" / f"{index:02d}.png", index // 3)
            picture(tmp_path / "masks" / f"{index:02d}.png")
        for seed in range(5):
            val = {int(name) // 3 for name in names(find_cases(tmp_path, "val", seed=seed))}
            train = {int(name) // 3 for name in names(find_cases(tmp_path, "train", seed=seed))}
            assert val
            assert not val & train

    def test_identical_images_of_several_folders_stay_on_one_side(self, tmp_path):
        for folder, shift in (("a", 0), ("b", 5), ("c", 0)):  # b holds half of a's images and five more, c all of a's
            for index in range(10):
                picture(tmp_path / folder / "images" / f"{folder}{index}.png", index + shift)
                picture(tmp_path / folder / "masks" / f"{folder}{index}.png")
        (tmp_path / "c" / "splits.json").write_text(json.dumps({"train": ["c0", "c1"], "val": ["c2"], "test": ["c3"]}))
        for seed in range(5):
            cases = {split: find_cases(tmp_path, split, seed=seed) for split in ("train", "val")}
            contents = {s: {Path(case["image"]).read_bytes() for case in own} for s, own in cases.items()}
            assert not contents["train"] & contents["val"]
            sides = {name: split for split, own in cases.items() for name in names(own)}
            assert {sides[name] for name in ("a/a0", "a/a1")} == {"train"}
            assert {sides[name] for name in ("a/a2", "a/a3")} == {"val"}  # what another folder tests is not trained
            assert len(sides) == 23 and any(sides[f"b/b{index}"] == "val" for index in range(5, 10))

    def test_a_small_folder_of_a_union_needs_no_validation_cases(self, tmp_path):
        folder_set(tmp_path / "large", [f"{index:02d}" for index in range(10)])
        folder_set(tmp_path / "small", ["a"])
        for path in (tmp_path / "large" / "images").iterdir():
            picture(path, int(path.stem) + 20)
        assert {name.split("/")[0] for name in names(find_cases(tmp_path, "val"))} == {"large"}
        assert "small/a" in names(find_cases(tmp_path, "train"))

    def test_one_image_cannot_be_split(self, tmp_path):
        folder_set(tmp_path, ["a"])
        assert names(find_cases(tmp_path, "train")) == ["a"]
        with pytest.raises(DataError, match="too few different ones"):
            find_cases(tmp_path, "val")


class TestDecathlon:
    def write(self, root, **content):
        for name in ("x", "y", "z"):
            picture(root / "imagesTr" / f"{name}.png", ord(name))
            picture(root / "labelsTr" / f"{name}.png")
        training = [{"image": f"./imagesTr/{n}.png", "label": f"./labelsTr/{n}.png"} for n in ("x", "y", "z")]
        (root / "dataset.json").write_text(json.dumps({"training": training, **content}))
        return root

    def test_lists(self, tmp_path):
        picture(tmp_path / "imagesTs" / "t.png")
        self.write(tmp_path, test=["./imagesTs/t.png"], splits={"train": ["x", "y"], "val": ["z"]})
        cases = find_cases(tmp_path)
        assert cases == find_cases(tmp_path / "dataset.json")
        assert names(cases) == ["x", "y", "z"]
        assert cases[0]["label"] == str(tmp_path / "labelsTr" / "x.png")
        assert names(find_cases(tmp_path, "train")) == ["x", "y"]
        assert names(find_cases(tmp_path, "val")) == ["z"]
        assert find_cases(tmp_path, "test", labels=False) == [
            {"image": str(tmp_path / "imagesTs" / "t.png"), "case": "t"}
        ]
        with pytest.raises(DataError, match="labels=False"):
            find_cases(tmp_path, "test")

    def test_validation_list_and_splits_beside(self, tmp_path):
        picture(tmp_path / "v.png")
        self.write(tmp_path, validation=[{"image": "v.png", "label": "v.png"}])
        assert names(find_cases(tmp_path, "val")) == ["v"]
        assert names(find_cases(tmp_path, "train")) == ["x", "y", "z"]
        (tmp_path / "splits.json").write_text(json.dumps({"train": ["x"], "val": ["y"]}))
        assert names(find_cases(tmp_path, "val")) == ["y"]

    def test_drawn(self, tmp_path):
        self.write(tmp_path)
        assert len(find_cases(tmp_path, "val")) == 1
        assert len(find_cases(tmp_path, "train")) == 2

    def test_volumes_are_listed_unread(self, tmp_path):
        (tmp_path / "v.nii.gz").write_bytes(b"not read")
        entry = {"image": "v.nii.gz", "label": ["v.nii.gz", "v.nii.gz"]}
        (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry]}))
        [case] = find_cases(tmp_path)
        assert case["case"] == "v"
        assert len(case["label"]) == 2

    @pytest.mark.parametrize("path", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "..\\x.png", ""])
    @pytest.mark.parametrize("key", ["image", "label"])
    def test_a_path_may_not_leave_the_folder(self, tmp_path, path, key):
        entry = {"image": "a.png", "label": "a.png", key: path}
        (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry]}))
        with pytest.raises(DataError, match="expected one inside"):
            find_cases(tmp_path)

    def test_where_nothing_is_labelled_a_missing_picture_is_left_to_the_reader(self, tmp_path):
        """So that the others are segmented and it is named."""
        (tmp_path / "dataset.json").write_text(json.dumps({"test": ["a.png", "b.png"]}))
        assert [case["case"] for case in find_cases(tmp_path, "test", labels=False)] == ["a", "b"]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([], "another form"),
            ({"training": {}}, "another form"),
            ({"training": [{"label": "a.png"}]}, "found the entry"),
            ({"training": [{"image": "a.png", "label": 3}]}, "found the label 3"),
            ({"training": [{"image": "a.png", "label": "a.png"}] * 2}, "the case a twice"),
            (
                {"training": [{"image": "a.png", "label": "a.png"}]},
                "1 listed files missing|2 listed files missing",
            ),
            ({"training": [{"image": "a.png"}]}, "no labelled case"),
            ({}, "no labelled case"),
        ],
    )
    def test_refused(self, tmp_path, content, words):
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=words):
            find_cases(tmp_path)


class TestPicturesAlone:
    def test_folder_and_file(self, tmp_path):
        for name in ("b.png", "a.tif", "a.jpg"):
            picture(tmp_path / name)
        (tmp_path / "v.nii.gz").write_bytes(b"")
        (tmp_path / "notes.txt").write_bytes(b"")
        cases = find_cases(tmp_path, labels=False)
        assert names(cases) == ["a.jpg", "a.tif", "b", "v"]
        assert all(set(case) == {"image", "case"} for case in cases)
        assert find_cases(tmp_path / "b.png", labels=False) == [{"image": str(tmp_path / "b.png"), "case": "b"}]

    def test_refused(self, tmp_path):
        with pytest.raises(DataError, match="no picture or volume"):
            find_cases(tmp_path, labels=False)
        picture(tmp_path / "a.png")
        (tmp_path / "notes.txt").write_bytes(b"")
        with pytest.raises(DataError, match="another kind of file"):
            find_cases(tmp_path / "notes.txt", labels=False)
        with pytest.raises(DataError, match="1 pictures and no images"):
            find_cases(tmp_path)
        with pytest.raises(DataError, match="no splits"):
            find_cases(tmp_path, "train", labels=False)
