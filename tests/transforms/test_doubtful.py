"""Doubtful components: which stay, what becomes of the rest, on planes and volumes, whatever the type of tensor."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.special import softmax

from hspsam_monai.errors import ConfigError
from hspsam_monai.transforms import DropDoubtfuld, drop_doubtful


def logits_of(winner, confidence):
    """Logits (K, ...) of three classes: ``winner`` has probability ``confidence``, the others share the rest."""
    winner, confidence = torch.as_tensor(winner), torch.as_tensor(confidence, dtype=torch.float32)
    probability = ((1 - confidence) / 2).expand(3, *winner.shape).clone()
    return probability.scatter_(0, winner[None], confidence[None]).log()


def two_components():
    winner = torch.zeros(8, 10, dtype=torch.long)
    confidence = torch.full((8, 10), 0.9)
    winner[1:4, 1:4], confidence[1:4, 1:4] = 1, 0.55
    winner[5:7, 5:9], confidence[5:7, 5:9] = 1, 0.8
    return winner, confidence


def test_only_the_component_below_the_bar_goes_and_its_probabilities_change_places():
    winner, confidence = two_components()
    logits = logits_of(winner, confidence)
    kept = logits.clone()
    result = drop_doubtful(logits, 0.6)
    assert torch.equal(logits, kept), "the input is left as it is"
    mask = result.argmax(0)
    assert (mask[1:4, 1:4] == 0).all() and torch.equal(mask[5:7, 5:9], winner[5:7, 5:9])
    outside = torch.ones(8, 10, dtype=torch.bool)
    outside[1:4, 1:4] = False
    assert torch.equal(result[:, outside], logits[:, outside])
    assert torch.equal(result[[1, 0, 2]][:, 1:4, 1:4], logits[:, 1:4, 1:4])
    np.testing.assert_allclose(softmax(result.numpy(), 0).sum(0), 1, rtol=1e-6)


@pytest.mark.parametrize(("bar", "left"), [(0.0, 17), (0.5, 17), (0.54, 17), (0.56, 8), (0.79, 8), (0.81, 0)])
def test_the_bar_is_the_mean_probability_of_a_component(bar, left):
    assert (drop_doubtful(logits_of(*two_components()), bar).argmax(0) > 0).sum() == left


def test_the_mean_counts_not_the_single_pixel():
    winner = torch.zeros(4, 4, dtype=torch.long)
    confidence = torch.full((4, 4), 0.9)
    winner[0, :3], confidence[0, :3] = 2, torch.tensor([0.5, 0.5, 0.95])  # mean 0.65
    assert (drop_doubtful(logits_of(winner, confidence), 0.64).argmax(0) == 2).sum() == 3
    assert (drop_doubtful(logits_of(winner, confidence), 0.66).argmax(0) == 2).sum() == 0


def test_classes_are_judged_apart_and_corners_connect():
    winner = torch.zeros(6, 6, dtype=torch.long)
    confidence = torch.full((6, 6), 0.9)
    winner[0:2, 0:2], confidence[0:2, 0:2] = 1, 0.9
    winner[0:2, 2:4], confidence[0:2, 2:4] = 2, 0.5  # touches class 1
    winner[2, 4], confidence[2, 4] = 2, 0.9  # touches class 2 by a corner: mean 0.58
    mask = drop_doubtful(logits_of(winner, confidence), 0.6).argmax(0)
    assert (mask[0:2, 0:2] == 1).all() and (mask == 2).sum() == 0


def test_volumes_and_meta_data():
    winner = torch.zeros(4, 5, 6, dtype=torch.long)
    confidence = torch.full((4, 5, 6), 0.9)
    winner[1:3, 1:3, 1:3], confidence[1:3, 1:3, 1:3] = 1, 0.55
    winner[3, 3, 3], confidence[3, 3, 3] = 1, 0.55  # touches by a corner
    winner[0, 4, 5], confidence[0, 4, 5] = 1, 0.7
    logits = MetaTensor(logits_of(winner, confidence), meta={"filename_or_obj": "a.nii"})
    data = {"pred": logits, "other": 1}
    result = DropDoubtfuld("pred", 0.6)(data)
    assert isinstance(result["pred"], MetaTensor) and result["pred"].meta["filename_or_obj"] == "a.nii"
    assert result["other"] == 1 and data["pred"] is logits
    assert torch.nonzero(result["pred"].as_tensor().argmax(0)).tolist() == [[0, 4, 5]]


def test_nothing_found_or_nothing_doubtful_is_the_same_object():
    empty = torch.stack([torch.ones(3, 3), torch.zeros(3, 3)])
    sure = torch.stack([torch.zeros(3, 3), torch.full((3, 3), 9.0)])
    assert drop_doubtful(empty, 0.9) is empty
    assert drop_doubtful(sure, 0.9) is sure


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_type_is_kept(dtype):
    result = drop_doubtful(logits_of(*two_components()).to(dtype), 0.6)
    assert result.dtype == dtype and (result.argmax(0) > 0).sum() == 8


@pytest.mark.parametrize("value", [-0.1, 1.0, 60])
def test_a_bar_outside_its_range_is_refused(value):
    with pytest.raises(ConfigError, match="min_confidence is"):
        DropDoubtfuld("pred", value)
    with pytest.raises(ConfigError, match="expected a number from 0"):
        drop_doubtful(torch.zeros(2, 3, 3), value)
