"""Scores against an independent numpy/scipy reference, the conventions, the tables, folders of masks."""

import csv
import json
import math

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.inference import write_mask_png
from hspsam_monai.score_folders import score_folders
from hspsam_monai.scores import (
    CaseScore,
    score_masks,
    summarise,
    write_case_table,
    write_summary,
)


def blobs(shape, num_classes, seed):
    """Smooth random class indices with every class present."""
    noise = np.random.default_rng(seed).normal(size=(num_classes, *shape))
    return np.argmax([gaussian_filter(n, 2.5) for n in noise], axis=0).astype(np.uint8)


def reference(pred, truth, k, spacing, tolerance):
    """Dice, IoU, HD95, NSD of one class, from point sets and a k-d tree: no distance transform, no MONAI."""
    p, t = pred == k, truth == k
    points = [np.argwhere(m & ~binary_erosion(m)) * np.asarray(spacing) for m in (p, t)]
    there, back = cKDTree(points[1]).query(points[0])[0], cKDTree(points[0]).query(points[1])[0]
    return (
        2 * (p & t).sum() / (p.sum() + t.sum()),
        (p & t).sum() / (p | t).sum(),
        max(np.percentile(there, 95), np.percentile(back, 95)),
        ((there <= tolerance).sum() + (back <= tolerance).sum()) / (len(there) + len(back)),
    )


@pytest.mark.parametrize(
    ("shape", "num_classes", "spacing"),
    [((48, 61), 2, None), ((40, 52), 4, (0.7, 1.3)), ((14, 21, 17), 3, (2.5, 0.8, 1.1))],
)
@pytest.mark.parametrize("tolerance", [1.0, 2.3])
def test_scores_equal_an_independent_reference(shape, num_classes, spacing, tolerance):
    pred, truth = blobs(shape, num_classes, 1), blobs(shape, num_classes, 2)
    result = score_masks(pred, truth, num_classes, spacing, surface=True, tolerance=tolerance)
    for k in range(1, num_classes):
        expected = reference(pred, truth, k, spacing or (1,) * len(shape), tolerance)
        found = [result[name][k - 1] for name in ("dice", "iou", "hd95", "nsd")]
        assert found == pytest.approx(expected, rel=1e-5)
    for name in ("dice", "iou", "hd95", "nsd"):
        assert result[f"mean_{name}"] == pytest.approx(np.mean(result[name]))
    assert result["truth_pixels"] == [int((truth == k).sum()) for k in range(1, num_classes)]
    assert result["pred_pixels"] == [int((pred == k).sum()) for k in range(1, num_classes)]


def test_known_small_masks():
    truth = np.zeros((10, 10), int)
    truth[2:6, 2:6] = 1
    pred = np.roll(truth, 2, axis=1)
    result = score_masks(pred, truth, 2, surface=True)
    assert result["dice"] == [0.5]
    assert result["iou"] == [pytest.approx(1 / 3)]
    assert result["hd95"] == [pytest.approx(2.0)]
    assert "hd95" not in score_masks(pred, truth, 2)


@pytest.mark.filterwarnings("error")  # MONAI must not complain of empties either
@pytest.mark.parametrize(("shape", "spacing"), [((30, 40), None), ((6, 8, 10), (3.0, 0.5, 1.0))])
def test_conventions_for_empty_masks(shape, spacing):
    empty = np.zeros(shape, np.uint8)
    one = empty.copy()
    one.flat[5] = 1
    both = score_masks(empty, empty, 2, spacing, surface=True)
    assert [both[m] for m in ("dice", "iou", "hd95", "nsd")] == [[1.0], [1.0], [0.0], [1.0]]
    diagonal = np.linalg.norm(np.multiply(shape, spacing or 1))
    for pred, truth in ((empty, one), (one, empty)):
        result = score_masks(pred, truth, 2, spacing, surface=True)
        assert [result[m] for m in ("dice", "iou", "nsd")] == [[0.0], [0.0], [0.0]]
        assert result["hd95"] == [pytest.approx(diagonal)]


def test_full_masks_and_blocks_larger_than_one_step():
    full = np.ones((2100, 2100), bool)  # more pixels than one block of the confusion count
    assert score_masks(full, full, 2)["dice"] == [1.0]
    assert score_masks(full[:9, :9], full[:9, :9], 2, surface=True)["hd95"] == [0.0]


def test_refusals_say_what_is_wrong():
    mask = np.zeros((4, 4), int)
    with pytest.raises(DataError, match="one 2-D or 3-D shape"):
        score_masks(mask, mask[:3], 2)
    with pytest.raises(DataError, match="must be integers"):
        score_masks(mask.astype(float), mask, 2)
    with pytest.raises(DataError, match="expected 0 … 1"):
        score_masks(mask + 255, mask, 2)
    with pytest.raises(ConfigError, match="at least 2"):
        score_masks(mask, mask, 1)
    with pytest.raises(ConfigError, match="2 positive lengths"):
        score_masks(mask, mask, 2, (1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="tolerance"):
        score_masks(mask, mask, 2, tolerance=math.nan)


def row(case, dice, truth_pixels=(10,), **more):
    dice = dice if isinstance(dice, tuple) else (dice,)
    return CaseScore(case, f"{case}.png", dice, tuple(d / 2 for d in dice), truth_pixels, (5,) * len(dice), **more)


def test_case_table_round_trip(tmp_path):
    rows = [
        row('a, "b"\nc', (0.25, 0.75), (3, 4), hd95=(1.5, 2.5), nsd=(0.1, 0.2)),
        row("ünï", (1.0, 0.0), (0, 0), hd95=(0.0, 9.0), nsd=(1.0, 0.0), confidence=0.875),
    ]
    path = write_case_table(tmp_path / "cases.csv", rows, ["liver", "spleen"])
    with path.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["case"] == 'a, "b"\nc'
    assert [float(first[c]) for c in ("dice_liver", "dice_spleen", "mean_dice")] == [0.25, 0.75, 0.5]
    assert [float(first[c]) for c in ("iou_spleen", "mean_iou", "hd95_spleen", "mean_hd95")] == [
        0.375,
        0.25,
        2.5,
        2,
    ]
    assert (first["truth_pixels"], first["pred_pixels"], first["confidence"]) == ("7", "10", "")
    assert (second["case"], second["confidence"]) == ("ünï", "0.875")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="class names"):
        write_case_table(path, rows, ["liver"])
    with pytest.raises(DataError, match="no scored case"):
        write_case_table(path, [])


def test_surface_columns_only_where_all_rows_have_them(tmp_path):
    path = write_case_table(tmp_path / "c.csv", [row("a", 1.0), row("b", 1.0, hd95=(1.0,), nsd=(1.0,))])
    assert "hd95" not in path.read_text()


def test_summary_numbers(tmp_path):
    values = [0.9, 0.1, 0.5, 0.7, 0.3, 1.0, 0.8]
    rows = [row(f"{'st' if i % 2 else 'kv'}/{i}", v, (0,) if v == 1.0 else (4,)) for i, v in enumerate(values)]
    summary = summarise(rows)
    dice = summary["dice"]
    assert (summary["n"], summary["n_empty_truth"]) == (7, 1)
    assert dice["mean"] == pytest.approx(np.mean(values))
    assert dice["sd"] == pytest.approx(np.std(values, ddof=1))
    assert [dice["q1"], dice["median"], dice["q3"]] == pytest.approx(np.percentile(values, (25, 50, 75)))
    assert dice["mean_without_empty_truth"] == pytest.approx(np.mean(sorted(values)[:-1]))
    assert summary["iou"]["mean"] == pytest.approx(np.mean(values) / 2)
    assert [w["dice"] for w in summary["worst"]] == sorted(values)[:5]
    assert summary["per_source"]["kv"]["n"] == 4
    assert summary["per_source"]["st"]["dice"] == pytest.approx(np.mean(values[1::2]))
    assert summary["per_class"]["1"]["dice"] == pytest.approx(np.mean(values))
    path = write_summary(tmp_path / "s.json", summary, {"model": tmp_path, "seed": 0})
    again = json.loads(path.read_text())
    assert again.pop("meta") == {"model": str(tmp_path), "seed": 0}
    assert again == summary


def test_every_class_has_its_own_mean():
    rows = [row("a", (0.2, 0.9), (3, 4)), row("b", (0.6, 0.5), (3, 4))]
    found = summarise(rows, class_names=["liver", "spleen"])["per_class"]
    assert found["liver"] == pytest.approx({"dice": 0.4, "iou": 0.2})
    assert found["spleen"] == pytest.approx({"dice": 0.7, "iou": 0.35})


def test_bootstrap_is_seeded_and_covers():
    random = np.random.default_rng(0)
    rows = [row(str(i), v) for i, v in enumerate(random.uniform(0.6, 1.0, 80))]
    low, high = summarise(rows, seed=1)["dice"]["ci95"]
    assert [low, high] == summarise(rows, seed=1)["dice"]["ci95"] != summarise(rows, seed=2)["dice"]["ci95"]
    values = [r.mean_dice for r in rows]
    error = np.std(values, ddof=1) / math.sqrt(len(values))  # the normal interval, by another road
    assert [low, high] == pytest.approx([np.mean(values) - 1.96 * error, np.mean(values) + 1.96 * error], abs=5e-3)


def test_one_case_and_all_empty_are_plain_json():
    summary = summarise([row("a", 1.0, (0,))])
    assert summary["dice"]["sd"] is None and summary["dice"]["mean_without_empty_truth"] is None
    assert "per_source" not in summary
    json.dumps(summary, allow_nan=False)
    with pytest.raises(DataError, match="no scored case"):
        summarise([])


def save(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def test_folders_of_pictures(tmp_path):
    truth = blobs((20, 30), 2, 0)
    for name in ("a", "src/b"):
        save(tmp_path / "out" / f"{name}.png", blobs((20, 30), 2, 1))  # 0, 1
    save(tmp_path / "data/masks/a.png", truth * 255)
    save(tmp_path / "data/src/masks/b.png", truth * 255)
    save(tmp_path / "data/images/a.png", truth)  # not a mask: outside masks/
    (tmp_path / "out/run.json").write_text("{}")
    rows = score_folders(tmp_path / "out", tmp_path / "data", 2, surface=True)
    assert [r.case for r in rows] == ["a", "src/b"]
    assert rows[1].source == "src"
    expected = score_masks(blobs((20, 30), 2, 1), truth, 2, surface=True)
    assert (rows[0].mean_dice, rows[0].hd95) == (expected["mean_dice"], tuple(expected["hd95"]))
    # Two single files pair whatever they are called.
    assert score_folders(tmp_path / "out/a.png", tmp_path / "data/src/masks/b.png", 2)[0].dice == rows[0].dice


def test_the_labels_of_a_data_set_pair_by_case(tmp_path):
    """Masks as ``hspsam check`` knows them: a tail in the name, several a case; a case of any name."""
    truth = blobs((20, 30), 2, 0)
    left, right = truth.copy(), truth.copy()
    left[:, 15:], right[:, :15] = 0, 0
    for folder in ("set", "union/src"):
        for name in ("one", "two"):
            save(tmp_path / folder / f"images/{name}.png", truth)
        save(tmp_path / folder / "masks/one_mask.png", truth * 255)
        save(tmp_path / folder / "masks/two_1.png", left * 255)
        save(tmp_path / folder / "masks/two_2.png", right * 255)
    for name in ("one", "two", "src/one", "src/two", "gallery"):
        save(tmp_path / "out" / name.rpartition("/")[0] / f"{name.rpartition('/')[2]}.png", truth)
    for name in ("one", "two"):
        save(tmp_path / "flat" / f"{name}.png", truth)
    rows = score_folders(tmp_path / "flat", tmp_path / "set", 2)
    assert [(row.case, row.mean_dice) for row in rows] == [("one", 1), ("two", 1)]
    rows = score_folders(tmp_path / "out", tmp_path / "union", 2, cases=["src/one", "src/two"])
    assert [(row.case, row.mean_dice) for row in rows] == [("src/one", 1), ("src/two", 1)]
    (tmp_path / "list").mkdir()
    for name in ("img/one.png", "lab/one_seg.png"):
        save(tmp_path / "list" / name, truth)
    entry = {"image": "img/one.png", "label": "lab/one_seg.png"}
    (tmp_path / "list" / "dataset.json").write_text(json.dumps({"training": [entry]}))
    (tmp_path / "flat" / "two.png").unlink()
    assert [row.case for row in score_folders(tmp_path / "flat", tmp_path / "list", 2)] == ["one"]
    # Two annotators' data sets; predictions called as the masks are; a list that names no labels.
    assert [row.case for row in score_folders(tmp_path / "union", tmp_path / "union", 2)] == ["src/one", "src/two"]
    save(tmp_path / "alike/one_mask.png", truth)
    assert [row.case for row in score_folders(tmp_path / "alike", tmp_path / "set", 2, partial=True)] == ["one"]
    save(tmp_path / "nnunet/labelsTr/c.png", truth)
    (tmp_path / "nnunet" / "dataset.json").write_text(json.dumps({"numTraining": 1}))
    save(tmp_path / "c/c.png", truth)
    assert [row.case for row in score_folders(tmp_path / "c", tmp_path / "nnunet", 2)] == ["c"]


def test_a_case_may_be_called_gallery(tmp_path):
    mask = blobs((20, 30), 2, 0)
    for folder in ("out", "true"):
        write_mask_png((tmp_path / folder).mkdir() or tmp_path / folder / "gallery.png", mask)
    (tmp_path / "out" / "gallery.html").touch()
    assert [row.case for row in score_folders(tmp_path / "out", tmp_path / "true", 2)] == ["gallery"]
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "out" / "gallery.png")  # a contact sheet
    with pytest.raises(DataError, match="no prediction of this name"):
        score_folders(tmp_path / "out", tmp_path / "true", 2)


def test_a_name_that_is_no_text_does_not_cost_the_table(tmp_path):
    row = CaseScore.from_scores("caf\udce9", "caf\udce9.jpg", score_masks(*[np.ones((4, 4), np.uint8)] * 2, 2))
    assert "caf\\udce9.jpg" in write_case_table(tmp_path / "cases.csv", [row]).read_text()


def test_folders_name_every_fault_at_once(tmp_path):
    mask = blobs((20, 30), 2, 0)
    for name in ("good", "small", "only_predicted"):
        save(tmp_path / "out" / f"{name}.png", mask)
    for name in ("good", "small", "only_true"):
        save(tmp_path / "true" / f"{name}.png", mask[:10] if name == "small" else mask)
    save(tmp_path / "out/values.png", mask * 7)
    save(tmp_path / "true/values.png", mask)
    (tmp_path / "out/broken.png").write_bytes(b"no picture")
    save(tmp_path / "true/broken.png", mask)
    with pytest.raises(DataError) as caught:
        score_folders(tmp_path / "out", tmp_path / "true", 2)
    message = str(caught.value)
    for name in ("small.png", "only_predicted.png", "only_true.png", "values.png", "broken.png"):
        assert name in message
    assert "good.png" not in message
    assert [r.case for r in score_folders(tmp_path / "out", tmp_path / "true", 2, cases=["good"])] == ["good"]
    with pytest.raises(DataError, match="nowhere: neither"):
        score_folders(tmp_path / "out", tmp_path / "true", 2, cases=["good", "nowhere"])


def test_partial_predictions_only_on_request(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "true" / f"{name}.png", blobs((8, 8), 2, 0))
    save(tmp_path / "out/a.png", blobs((8, 8), 2, 0))
    with pytest.raises(DataError, match=r"b\.png: no prediction"):
        score_folders(tmp_path / "out", tmp_path / "true", 2)
    assert len(score_folders(tmp_path / "out", tmp_path / "true", 2, partial=True)) == 1


def test_missing_empty_and_doubled_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        score_folders(tmp_path / "nothing", tmp_path, 2)
    with pytest.raises(DataError, match="no mask"):
        score_folders(tmp_path, tmp_path, 2)
    save(tmp_path / "a.png", blobs((8, 8), 2, 0))
    save(tmp_path / "a.bmp", blobs((8, 8), 2, 0))
    with pytest.raises(DataError, match="are both a"):
        score_folders(tmp_path, tmp_path, 2)


def volume(path, values, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def test_folders_of_volumes_use_the_spacing_of_the_header(tmp_path):
    spacing = (2.0, 0.5, 1.5)
    affine = np.diag([-2.0, 0.5, 1.5, 1.0])
    pred, truth = blobs((12, 14, 10), 3, 0), blobs((12, 14, 10), 3, 1)
    volume(tmp_path / "out/c1.nii.gz", pred, affine)
    volume(tmp_path / "true/labelsTr/c1.nii.gz", truth.astype(np.float32), affine)
    (result,) = score_folders(tmp_path / "out", tmp_path / "true", 3, surface=True, tolerance=2.0)
    expected = score_masks(pred, truth, 3, spacing, surface=True, tolerance=2.0)
    assert (result.case, result.dice) == ("c1", tuple(expected["dice"]))
    assert result.hd95 == pytest.approx(expected["hd95"]) and result.nsd == pytest.approx(expected["nsd"])


def test_volumes_that_do_not_match_are_refused(tmp_path):
    mask = blobs((6, 6, 6), 2, 0)
    volume(tmp_path / "out/shifted.nii.gz", mask, np.diag([1.0, 1, 2, 1]))
    volume(tmp_path / "true/shifted.nii.gz", mask, np.eye(4))
    volume(tmp_path / "out/soft.nii.gz", mask.astype(np.float32) * 0.5, np.eye(4))
    volume(tmp_path / "true/soft.nii.gz", mask, np.eye(4))
    (tmp_path / "out/broken.nii.gz").write_bytes(b"\x1f\x8bno")
    volume(tmp_path / "true/broken.nii.gz", mask, np.eye(4))
    save(tmp_path / "out/flat.png", mask[0])
    volume(tmp_path / "true/flat.nii.gz", mask, np.eye(4))
    with pytest.raises(DataError) as caught:
        score_folders(tmp_path / "out", tmp_path / "true", 2)
    for words in ("affine differs", "not whole numbers", "cannot be read as NIfTI", "one of it and"):
        assert words in str(caught.value)
