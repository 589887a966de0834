"""DiceCE against a formula written out in numpy, and on the masks that break half precision."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hspsam_monai.training import DiceCE


def formula(logits, label, ce=0.2, dice=0.8):
    """0.2 CE + 0.8 Dice in float64: squared denominator, pooled over the batch, mean over classes with background."""
    x = logits.double().numpy()
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.stack([label[:, 0].numpy() == k for k in range(x.shape[1])], 1).astype(float)
    cross = -(y * np.log(np.maximum(p, 1e-300))).sum(1).mean()
    overlap, total = (p * y).sum((0, 2, 3)), (p**2).sum((0, 2, 3)) + (y**2).sum((0, 2, 3))
    return ce * cross + dice * (1 - (2 * overlap + 1e-5) / (total + 1e-5)).mean()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weights", [(0.2, 0.8), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_equals_the_formula(classes, weights):
    logits, label = torch.randn(3, classes, 17, 23) * 3, torch.randint(0, classes, (3, 1, 17, 23))
    found = DiceCE(*weights)(logits, label)
    assert found.shape == () and float(found) == pytest.approx(formula(logits, label, *weights), rel=1e-5)


def test_switching_a_term_off_changes_the_loss():
    logits, label = torch.randn(2, 2, 8, 8), torch.randint(0, 2, (2, 1, 8, 8))
    both, no_dice, no_ce = (float(DiceCE(*w)(logits, label)) for w in ((0.2, 0.8), (0.2, 0.0), (0.0, 0.8)))
    assert min(no_dice, no_ce) > 0 and both == pytest.approx(no_dice + no_ce)


def test_dice_is_pooled_over_the_batch():
    """An image without foreground beside one with it: a Dice of each image apart would be another number."""
    logits = torch.randn(2, 2, 8, 8)
    label = torch.zeros(2, 1, 8, 8)
    label[0, :, 2:5, 2:5] = 1
    loss = DiceCE(0, 1)
    apart = (loss(logits[:1], label[:1]) + loss(logits[1:], label[1:])) / 2
    assert abs(float(loss(logits, label) - apart)) > 1e-3


def test_perfect_and_opposite():
    label = torch.randint(0, 2, (1, 1, 16, 16))
    logits = torch.nn.functional.one_hot(label[:, 0], 2).permute(0, 3, 1, 2) * 40.0 - 20
    assert float(DiceCE()(logits, label)) == pytest.approx(0, abs=1e-4)
    assert float(DiceCE(0, 1)(-logits, label)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["empty", "full", "half"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 60.0])
def test_finite_on_extreme_masks_at_512(dtype, mask, strength):
    label = {"empty": torch.zeros, "full": torch.ones, "half": torch.zeros}[mask](1, 1, 512, 512)
    if mask == "half":
        label[..., 256:] = 1
    logits = torch.zeros(1, 2, 512, 512)
    logits[:, 0] = strength
    leaf = logits.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # as a trainer in mixed precision would call it
        loss = DiceCE()(leaf, label)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and leaf.grad.isfinite().all()
    assert float(loss) == pytest.approx(formula(logits, label), rel=1e-3, abs=1e-5)  # sums ran in float32


def test_takes_a_named_tuple_and_indices_of_any_type():
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))
    output = namedtuple("Output", "logits other")(logits, None)
    expected = DiceCE()(logits, label)
    for kind in (torch.uint8, torch.int64, torch.float32):
        assert torch.equal(DiceCE()(output, label.to(kind)), expected)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the loss casts to float32 on purpose
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 3, (2, 1, 3, 4))
    assert torch.autograd.gradcheck(lambda x: DiceCE()(x, label), (logits,))
