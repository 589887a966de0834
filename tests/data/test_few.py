"""A few cases drawn by seed: different, with an object, nested over their number."""

import numpy as np
import pytest
from PIL import Image

from hspsam_monai.data import draw_cases, few_cases, find_cases, mask_values
from hspsam_monai.errors import ConfigError, DataError


@pytest.fixture
def cases(tmp_path):
    """Eight cases; 1 is a copy of 0, the masks of 2 and 3 are empty."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for index in range(8):
        image = np.full((8, 8, 3), 10 * (0 if index == 1 else index), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        mask = np.zeros((8, 8), np.uint8)
        mask[2:5, 2:5] = 0 if index in (2, 3) else 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}.png")
    return find_cases(tmp_path)


def names(cases):
    return [case["case"] for case in cases]


def test_drawn_cases_differ_show_an_object_and_repeat(cases):
    for seed in range(6):
        drawn = names(draw_cases(cases, 5, seed))
        assert drawn == sorted(drawn) and not {"2", "3"} & set(drawn) and not {"0", "1"} <= set(drawn)
        assert drawn == names(draw_cases(cases, 5, seed))
        assert set(names(draw_cases(cases, 2, seed))) < set(drawn)
    assert len({tuple(names(draw_cases(cases, 2, seed))) for seed in range(6)}) > 1


def test_every_class_is_drawn(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for index in range(30):
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / "images" / f"{index:02}.png")
        mask = np.zeros((8, 8), np.uint8)
        mask[:2] = 1
        mask[4:6] = 2 * (index == 17)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index:02}.png")
    cases = find_cases(tmp_path)
    for seed in range(8):
        drawn = [set(names(draw_cases(cases, count, seed, num_classes=3))) for count in (2, 5, 12)]
        assert "17" in drawn[0] and drawn[0] < drawn[1] < drawn[2] and len(drawn[2]) == 12
    without = [case for case in cases if case["case"] != "17"]
    with pytest.raises(DataError, match="The 5 cases drawn from 29 show no class 2"):
        draw_cases(without, 5, 0, num_classes=3)


def test_an_empty_copy_hides_no_object(cases, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "masks" / "1.png")
    for seed in range(6):
        assert "0" in names(draw_cases(cases, 5, seed))


def test_a_set_without_splits_gives_all_it_has(cases, tmp_path, caplog):
    """Five different cases with an object: a drawn training split holds fewer."""
    assert len(few_cases(tmp_path, "train", 5)) == 5 and "drawn from all" in caplog.text
    broken = tmp_path / "masks" / "5.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:30])  # another fault is no reason to draw elsewhere
    with pytest.raises(DataError, match=r"5\.png"):
        few_cases(tmp_path, "train", 4, seed=1)
    broken.write_bytes(content)
    (tmp_path / "splits.json").write_text('{"train": ["0", "4", "5"], "val": ["6"]}')
    assert names(few_cases(tmp_path, "train", 3)) == ["0", "4", "5"]
    with pytest.raises(DataError, match="Found 3 different cases"):
        few_cases(tmp_path, "train", 5)


def test_too_few_cases(cases):
    with pytest.raises(DataError, match="Found 5 different cases with an object among 8; expected 6"):
        draw_cases(cases, 6)
    with pytest.raises(ConfigError, match="train_cases is 0"):
        draw_cases(cases, 0)


def test_values_of_a_mask(cases, tmp_path):
    assert mask_values(cases[0]["label"]) == {0, 1} and mask_values(cases[2]["label"]) == {0}
    Image.fromarray(np.array([[0, 3], [1, 3]], np.uint8)).save(tmp_path / "ids.png")
    assert mask_values(tmp_path / "ids.png") == {0, 1, 3}
    Image.fromarray(np.full((2, 2, 3), (9, 0, 0), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match="colour-coded"):
        mask_values(tmp_path / "colour.png")
