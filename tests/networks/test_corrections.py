"""Simulated corrections: where the clicks fall, what training makes of them, and who hands the truth over."""

import pytest
import torch

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks import SAMSP, Prompts
from hspsam_monai.networks import corrections as corrections_module
from hspsam_monai.networks.corrections import objects_of, one_more_mark, with_mistakes
from hspsam_monai.networks.sam_decoder import ABSENT
from hspsam_monai.training import SelfDistillation


def squares():
    """Object 1: found in full; 2: half missed; 3: empty, yet something was found; 4: empty and nothing found."""
    truth = torch.zeros(1, 4, 32, 32, dtype=torch.bool)
    truth[0, 0, 4:12, 4:12] = True
    truth[0, 1, 16:24, 8:24] = True
    seen = truth.float() * 2 - 1
    seen[0, 1, :, 16:] = -1
    seen[0, 2, 2:8, 2:8] = 1
    return truth, seen


def test_objects_of_a_label_are_its_classes_at_the_masks_size():
    label = torch.zeros(2, 1, 64, 96)
    label[0, 0, :32, :48] = 2
    label[1, 0, 32:] = 1
    found = objects_of(label, 2, (16, 24))
    assert found.shape == (2, 2, 16, 24) and found.dtype == torch.bool
    assert found[0, 1, :8, :12].all() and found[0, 1].sum() == 8 * 12 and not found[0, 0].any()
    assert found[1, 0, 8:].all() and found[1, 0].sum() == 8 * 24 and not found[1, 1].any()


@pytest.mark.parametrize("seed", range(5))
def test_a_click_falls_where_mask_and_truth_differ(monkeypatch, seed):
    monkeypatch.setattr(corrections_module, "BOX_SHARE", 0.0)
    torch.manual_seed(seed)
    truth, seen = squares()
    marks = one_more_mark(None, seen, truth, 4.0)
    assert marks.labels[0, :, 0].tolist() == [ABSENT, 1, 0, ABSENT]
    assert marks.present()[0].tolist() == [False, True, True, False]
    for index, region in ((1, ((16, 24), (16, 24))), (2, ((2, 8), (2, 8)))):
        x, y = ((marks.points[0, index, 0] + 0.5) / 4 - 0.5).tolist()
        assert x == int(x) and y == int(y)  # the middle of a pixel of the mask
        assert region[0][0] <= y < region[0][1] and region[1][0] <= x < region[1][1]
    again = one_more_mark(marks, truth.float() - 0.5, truth, 4.0)
    assert torch.equal(again.points[:, :, :1], marks.points) and again.labels.shape == (1, 4, 2)
    assert (again.labels[..., 1] == ABSENT).all()  # all is right now
    third = one_more_mark(again, seen, truth, 4.0)
    assert third.labels[0, :, 2].tolist() == [ABSENT, 1, 0, ABSENT]


def test_clicks_prefer_the_depth_of_the_difference(monkeypatch):
    monkeypatch.setattr(corrections_module, "BOX_SHARE", 0.0)
    torch.manual_seed(0)
    truth = torch.zeros(400, 1, 32, 32, dtype=torch.bool)
    truth[:, :, 8:25, 8:25] = True
    points = one_more_mark(None, torch.full(truth.shape, -1.0), truth, 1.0).points[:, 0, 0]
    off = (points - 16).abs().amax(-1)
    uniform = (torch.arange(-8, 9).abs()[:, None].maximum(torch.arange(-8, 9).abs())).float().mean()
    assert len(points.unique(dim=0)) > 50 and off.mean() < 0.75 * uniform


def test_a_box_lies_around_the_truth_and_is_only_drawn_where_something_is_wrong(monkeypatch):
    monkeypatch.setattr(corrections_module, "BOX_SHARE", 1.0)
    torch.manual_seed(0)
    truth, seen = squares()
    marks = one_more_mark(None, seen, truth, 4.0)
    assert marks.has_box[0].tolist() == [False, True, False, False]  # 3 is empty: no box, but a click
    assert marks.labels[0, :, 0].tolist() == [ABSENT, ABSENT, 0, ABSENT]
    exact = torch.tensor([32.0, 64.0, 95.0, 95.0])
    off = (marks.boxes[0, 1] - exact).abs()
    assert 0 < off.max() and (off <= 0.1 * torch.tensor([64.0, 32.0, 64.0, 32.0])).all()


def test_some_masks_are_missing_and_some_another_images():
    torch.manual_seed(0)
    masks = torch.arange(400.0)[:, None, None, None].expand(400, 2, 4, 4).clone().requires_grad_()
    seen = with_mistakes(masks)
    assert not seen.requires_grad and seen.shape == masks.shape
    missing = (seen == -10).flatten(2).all(-1)
    elsewhere = (seen == masks.roll(1, 0)).flatten(2).all(-1)
    kept = (seen == masks).flatten(2).all(-1)
    assert (missing.int() + elsewhere + kept == 1).all()
    assert 0.2 < missing.float().mean() < 0.3 and 0.1 < elsewhere.float().mean() < 0.2
    assert (missing[:, 0] != missing[:, 1]).any()  # each object for itself


@pytest.fixture
def no_mistakes(monkeypatch):
    monkeypatch.setattr("hspsam_monai.networks.sam_sp.with_mistakes", torch.Tensor.detach)


def build(**options):
    torch.manual_seed(0)
    return SAMSP("mobile_sam", image_size=64, **{"adapt": "full", "corrections": 2, **options})


@pytest.mark.parametrize("classes", [2, 4])
def test_training_adds_corrected_masks_that_the_loss_and_the_prompt_encoder_learn_from(classes):
    network = build(num_classes=classes).train()
    image, label = torch.rand(2, 3, 64, 96), torch.randint(0, classes, (2, 1, 64, 96))
    output = network(image, truth=label)
    assert len(output.passes) == 2 and len(output.corrected) == 2
    assert all(mask.shape == (2, classes, 64, 96) for mask in output.corrected)
    assert torch.equal(output.logits, output.passes[-1])  # what is reported is the automatic mask
    loss, without = SelfDistillation()(output, label), SelfDistillation()(output._replace(corrected=()), label)
    single = [SelfDistillation()(mask, label) for mask in output.corrected]
    assert torch.allclose(loss - without, sum(single) / 2)
    half = SelfDistillation(correction_weight=0.5)(output, label)
    assert torch.allclose(half - without, sum(single) / 4)
    network.zero_grad()
    (loss - without).backward()
    assert network.sam.prompt_encoder.point_embeddings[1].weight.grad.abs().sum() > 0
    assert network.encoder.patch_embed.seq[0].c.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_correction_is_what_the_same_marks_of_a_person_give(monkeypatch, no_mistakes):
    """The simulated pass and the pass in use must be one, or training would teach something else."""
    network = build(corrections=1).eval()
    network.training = True  # the top alone: dropout and batch statistics stay as in use
    image, label = torch.rand(2, 3, 64, 64), torch.randint(0, 2, (2, 1, 64, 64))
    taken = []
    original = corrections_module.one_more_mark
    monkeypatch.setattr(
        "hspsam_monai.networks.sam_sp.one_more_mark", lambda *given: taken.append(original(*given)) or taken[-1]
    )
    corrected = network(image, truth=label).corrected[0]
    network.training = False
    assert isinstance(taken[0], Prompts) and torch.equal(network(image, taken[0]), corrected)
    assert not torch.equal(network(image), corrected)


@torch.no_grad()
def test_corrections_are_trainings_alone_and_need_the_truth():
    network = build()
    image = torch.rand(1, 3, 64, 64)
    with pytest.raises(ConfigError, match=r"truth.*PrepareBatchExtraInput"):
        network.train()(image)
    assert network.eval()(image).shape == (1, 2, 64, 64)
    assert network(image, truth=torch.zeros(1, 1, 64, 64)).shape == (1, 2, 64, 64)
    assert build(corrections=0).train()(image).corrected == ()
    with pytest.raises(ConfigError, match="corrections is -1"):
        build(corrections=-1)


@torch.no_grad()
def test_what_needs_no_mark_is_left_alone(no_mistakes):
    network = build(num_classes=4).eval()
    network.training = True
    image = torch.rand(2, 3, 64, 64)
    label = torch.zeros(2, 1, 64, 64)  # whatever is found is wrong, where nothing is found there is no mark
    for head in network.sam.mask_decoder.output_hypernetworks_mlps:
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.zero_()
    output = network(image, truth=label)
    assert all(torch.equal(mask, output.logits) for mask in output.corrected)
    label[0, 0, 16:48, 16:48] = 2
    # Object 2 of the first image alone gets a mark; a bias lets its pass differ from the automatic one.
    network.sam.prompt_encoder.point_embeddings[1].weight.fill_(1.0)
    marks = Prompts(points=torch.zeros(2, 3, 1, 2), labels=torch.full((2, 3, 1), ABSENT))
    marks.labels[0, 1] = 1
    mask = torch.randn(2, 3, 16, 16)
    refined = network._refine(torch.rand(2, 256, 4, 4), mask, marks)
    touched = (refined != mask).flatten(2).any(-1)
    assert touched.tolist() == [[False, True, False], [False, False, False]]
