"""SAM-SP: passes, prompts from predictions, refinement, distillation."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks import SAMSP, Prompts
from hspsam_monai.networks.sam_decoder import ABSENT
from hspsam_monai.networks.self_prompts import central_points, self_prompts, squared_distance, tight_boxes
from hspsam_monai.training import SelfDistillation


def blobs(seed, shape=(2, 3, 17, 23)):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random(shape) < 0.75)


def test_distance_is_scipys():
    mask = blobs(0)
    ours = squared_distance(mask)
    for index in np.ndindex(2, 3):
        padded = np.pad(mask[index].numpy(), 1)
        expected = distance_transform_edt(padded)[1:-1, 1:-1] ** 2
        assert np.allclose(ours[index].numpy(), expected, atol=1e-3)


def test_boxes_and_points_of_a_known_mask():
    mask = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    mask[0, 0, 4:11, 2:9] = True  # 7 x 7, centre (y 7, x 5)
    boxes, found = tight_boxes(mask, stride=4)
    assert found.tolist() == [[True, False]]
    assert boxes[0, 0].tolist() == [8, 16, 35, 43] and boxes[0, 1].tolist() == [0, 0, 0, 0]
    points, labels = central_points(mask, stride=4, count=2)
    assert points[0, 0, 0].tolist() == [(5 + 0.5) * 4 - 0.5, (7 + 0.5) * 4 - 0.5]
    assert labels[0].tolist()[0][0] == 1 and labels[0].tolist()[1] == [ABSENT, ABSENT]
    second = points[0, 0, 1]
    assert (second - points[0, 0, 0]).norm() > 8  # outside the first point's disc
    assert mask[0, 0, int(second[1] // 4), int(second[0] // 4)]


def test_prompts_carry_no_gradient_and_unknown_kinds_are_refused():
    logits = torch.randn(1, 1, 8, 8, requires_grad=True)
    prompts = self_prompts(logits, ("box", "mask", "points"), 4.0)
    assert not any(part.requires_grad for part in prompts if part is not None)
    with pytest.raises(ConfigError, match="scribble"):
        self_prompts(logits, ("scribble",), 4.0)


def build(**options):
    torch.manual_seed(0)
    return SAMSP("mobile_sam", image_size=64, **{"adapt": "full", **options})


@torch.no_grad()
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("prompt", ["box", "mask", "points", ("box", "mask", "points")])
def test_shapes_and_one_tensor_in_evaluation(classes, prompt):
    network = build(num_classes=classes, prompt=prompt, steps=2).eval()
    logits = network(torch.rand(2, 3, 64, 96))
    assert logits.shape == (2, classes, 64, 96) and logits.dtype == torch.float32
    network.train()
    output = network(torch.rand(2, 3, 64, 96))
    assert len(output.passes) == 3 and torch.equal(output.logits, output.passes[-1])


@torch.no_grad()
def test_an_empty_first_prediction_gives_no_prompt():
    network = build(steps=1, prompt=("box", "points")).eval()
    # A bias in the last hyper-network layer cannot make logits negative everywhere; a zero decoder can.
    for head in network.sam.mask_decoder.output_hypernetworks_mlps:
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.zero_()
    image = torch.rand(1, 3, 64, 64)
    with_step = network(image)
    network.steps = 0
    assert torch.equal(with_step, network(image))


def test_gradients_reach_what_is_trained():
    network = build(num_classes=3, adapt="lora", prompt=("box", "mask", "points")).train()
    output = network(torch.rand(1, 3, 64, 64))
    label = torch.randint(0, 3, (1, 1, 64, 64))
    SelfDistillation()(output, label).backward()
    untouched = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    # The embedding of background clicks and the unused multi-mask heads have no part in this pass.
    assert all("point_embeddings.0" in n or "output_hypernetworks" in n for n in untouched), untouched
    assert network.classes.grad.abs().sum() > 0
    assert all("lora_" in n or n.startswith("neck") for n, p in network.encoder.named_parameters() if p.requires_grad)


@torch.no_grad()
def test_a_person_may_add_prompts_afterwards():
    network = build(prompt="box").eval()
    image = torch.rand(1, 3, 64, 64)
    plain = network(image)
    click = Prompts(points=torch.tensor([[[[20.0, 30.0]]]]), labels=torch.tensor([[[1]]]))
    refined = network(image, click)
    assert refined.shape == plain.shape and not torch.equal(refined, plain)
    assert torch.equal(network(image, Prompts()), plain)


def test_every_term_of_the_loss_counts():
    torch.manual_seed(0)
    network = build(prompt="mask").train()
    output = network(torch.rand(2, 3, 64, 64))
    label = (torch.rand(2, 1, 64, 64) < 0.3).long()
    full = SelfDistillation()(output, label)
    assert full != SelfDistillation(weight=0)(output, label)
    assert full != SelfDistillation(pass_weights=(0.0, 1.0))(output, label)
    assert full != SelfDistillation(pass_weights=(1.0, 0.0))(output, label)
    assert full != SelfDistillation(temperature=1.0)(output, label)
    early = SelfDistillation()
    early.progress = 0.0
    assert early(output, label) == SelfDistillation(weight=0)(output, label)


def test_distillation_is_scaled_kl_and_stops_at_the_teacher():
    student = torch.randn(1, 2, 4, 4, requires_grad=True)
    teacher = torch.randn(1, 2, 4, 4, requires_grad=True)
    value = SelfDistillation(temperature=3.0).distillation(student, teacher)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    assert torch.allclose(value, 9 * (p * (p / q).log()).sum(1).mean())
    value.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.data
def test_official_weights_fit(shared):
    from hspsam_monai.networks import load_pretrained

    network = build(adapt="lora")
    report = load_pretrained(network, shared / "weights" / "mobile_sam.pt")
    assert all("lora_" in key for key in report.missing)
