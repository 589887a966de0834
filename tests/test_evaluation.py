"""Handlers that turn results into tables and pictures; the engines behind them are tested with the bundle."""

import pytest
import torch
from PIL import Image

from hspsam_monai.data import TolerantDataset
from hspsam_monai.errors import DataError
from hspsam_monai.evaluation import LearningCurve, confidence, raise_failures


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
