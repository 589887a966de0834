"""Handlers that turn results into tables and pictures; the engines behind them are tested with the bundle."""

import csv

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import AsDiscreted, Compose, LoadImaged
from PIL import Image

from hspsam_monai import evaluation
from hspsam_monai.data import MaskReader, PhotoReader, TolerantDataset
from hspsam_monai.errors import DataError
from hspsam_monai.evaluation import CaseReport, LearningCurve, confidence, raise_failures
from hspsam_monai.inference import SaveMaskd
from hspsam_monai.transforms import DropDoubtfuld

FILES = ("cases.csv", "summary.json", "gallery.html", "gallery.png")


class Red(torch.nn.Module):
    """Foreground wherever the picture is red, the more certain the redder."""

    def forward(self, image):
        logit = 8 * (image[:, :1] - 0.5)
        return torch.cat([-logit, logit], 1)


def evaluator(folder, reds, sizes=None, after=(), last=(), labelled=True, **options):
    """An evaluator over squares of so much red on black, each its own mask, with its report in ``folder/out``."""
    data = []
    for index, red in enumerate(reds):
        picture, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        picture[4:20, 4:20, 0], mask[4:20, 4:20] = round(255 * red), 255
        mask = mask if sizes is None else mask[: sizes[index]]
        for name, array in (("image", picture), ("label", mask)):
            Image.fromarray(array).save(folder / f"{name}{index}.png")
        data.append({"image": f"{folder}/image{index}.png", "case": f"c{index}"})
        data[-1] |= {"label": f"{folder}/label{index}.png"} if labelled else {}
    loads = [LoadImaged("image", reader=PhotoReader, ensure_channel_first=True)]
    loads += [LoadImaged("label", reader=MaskReader, ensure_channel_first=True)] if labelled else []
    made = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=DataLoader(Dataset(data, Compose(loads)), batch_size=1),
        network=Red(), postprocessing=Compose([*after, AsDiscreted("pred", argmax=True), *last]), decollate=True,
    )  # fmt: skip
    report = CaseReport(folder / "out", {"background": 0, "red": 1}, **options)
    report.attach(made)
    return made, report


def table(folder):
    with (folder / "out" / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_is_broken_off_leaves_no_table_of_an_earlier_one(tmp_path, monkeypatch):
    evaluator(tmp_path, [0.9, 0.8, 0.7])[0].run()
    assert all((tmp_path / "out" / name).is_file() for name in FILES)

    def stop(engine):
        raise KeyboardInterrupt

    for every, left in ((60.0, []), (-1.0, ["c0", "c1"])):
        monkeypatch.setattr(evaluation, "_EVERY", every)
        second, _ = evaluator(tmp_path, [0.9, 0.6, 0.9])
        second.add_event_handler(Events.ITERATION_STARTED(once=3), stop)
        with pytest.raises(KeyboardInterrupt):
            second.run()
        assert [name for name in FILES if (tmp_path / "out" / name).exists()] == ["cases.csv"][: len(left)]
        assert not left or [row["case"] for row in table(tmp_path)] == left


def test_confidence_is_that_of_what_stays_outlined(tmp_path):
    evaluator(tmp_path, [0.9, 0.55], after=[DropDoubtfuld("pred", 0.9)])[0].run()
    kept, dropped = table(tmp_path)
    assert float(kept["confidence"]) == pytest.approx(float(torch.tensor(16 * (230 / 255 - 0.5)).sigmoid()), abs=1e-3)
    share = (256 * torch.tensor(16 * (140 / 255 - 0.5)).sigmoid() + 768 * torch.tensor(8.0).sigmoid()) / 1024
    assert float(dropped["confidence"]) == pytest.approx(float(share), abs=1e-3)  # nothing outlined: the whole image


def test_a_mask_of_another_size_is_named(tmp_path):
    made, _ = evaluator(tmp_path, [0.9, 0.9], sizes=[32, 30])
    with pytest.raises(DataError, match=r"c1: found a mask of 32 x 30 pixels for an image of 32 x 32"):
        made.run()


def test_masks_of_a_large_cohort_do_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_SHOWN", 3)
    reds = [0.52 + 0.03 * (index * 7 % 15) for index in range(15)]
    made, report = evaluator(tmp_path, reds, labelled=False, sheet=False)
    made.run()
    assert len(report._shown) <= 6 and len(report.items) == 15
    page = (tmp_path / "out" / "gallery.html").read_text()
    surest = sorted(range(15), key=reds.__getitem__)
    assert all((f"c{index}<" in page) == (index in surest[:3]) for index in range(15))


def test_a_mask_that_was_written_is_read_from_its_file(tmp_path):
    made, report = evaluator(tmp_path, [0.9, 0.1], last=[SaveMaskd(tmp_path / "out", tmp_path)], sheet=False)
    made.run()
    assert [int(item.prediction().sum()) for item in report.items] == [256, 0]
    (tmp_path / "out" / "image0.png").unlink()
    with pytest.raises(DataError, match=r"image0\.png"):
        report.items[0].prediction()


def test_confidence_is_the_mean_probability_of_the_foreground():
    logits = torch.zeros(2, 1, 4)
    logits[1, 0] = torch.tensor([2.0, 1.0, -3.0, -3.0])
    expected = torch.tensor([2.0, 1.0]).sigmoid().mean()
    assert confidence(logits) == pytest.approx(float(expected), abs=1e-6)
    empty = torch.zeros(2, 1, 2)
    empty[0] = 3.0  # nothing found: how sure is the background
    assert confidence(empty) == pytest.approx(float(torch.tensor(3.0).sigmoid()), abs=1e-6)


def test_learning_curve_is_drawn_with_gaps(tmp_path):
    LearningCurve(tmp_path)()
    assert not (tmp_path / "learning_curve.png").exists()  # nothing to draw yet
    (tmp_path / "learning_curve.csv").write_text("epoch,loss,lr,val_mean_dice\n1,0.5,0.1,\n2,0.4,0.1,0.3\n3,0.3,0.1,\n")
    LearningCurve(tmp_path)()
    with Image.open(tmp_path / "learning_curve.png") as picture:
        assert picture.size[0] > 400


def test_failures_are_all_named_and_none_is_silent():
    def load(case):
        if case["case"] != "good":
            raise DataError(f"{case['case']}.png: truncated")
        return case

    dataset = TolerantDataset([{"case": "good"}, {"case": "a"}, {"case": "b"}], load)
    raise_failures(dataset)
    assert [item["case"] for item in dataset] == ["good"]
    with pytest.raises(DataError, match=r"2 of 3 files failed, 1 are done") as caught:
        raise_failures(dataset)
    assert "a.png: truncated" in str(caught.value) and "b.png: truncated" in str(caught.value)
