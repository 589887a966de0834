"""Clicks, boxes and scribbles as prompts, and what SAM-SP makes of them."""

import numpy as np
import pytest
import torch

from hspsam_monai.errors import ConfigError
from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks import SAMSP, Prompts
from hspsam_monai.networks.sam_decoder import ABSENT
from hspsam_monai.networks.user_prompts import scribble_points, user_prompts
from hspsam_monai.transforms import fit_image


def test_a_polyline_is_sampled_at_equal_steps():
    corner = [[0, 0], [30, 0], [30, 10]]  # 40 pixels long
    expected = [[0, 0], [10, 0], [20, 0], [30, 0], [30, 10]]
    assert scribble_points(corner, 5).tolist() == expected
    assert scribble_points(torch.tensor(corner), 1).tolist() == [[20, 0]]
    assert scribble_points([[4, 5]], 3).tolist() == [[4, 5]] * 3


def test_a_drawn_mask_is_sampled_far_apart_on_its_pixels():
    mask = np.zeros((20, 40), bool)
    mask[7, 5:36] = True
    points = scribble_points(mask, 3)
    assert points.tolist() == [[20, 7], [5, 7], [35, 7]]
    assert scribble_points(torch.from_numpy(mask[:, 5:7]), 9).shape == (2, 2)


def test_marks_of_several_objects_share_one_batch():
    marks = user_prompts(
        3, [(1, 4, 5, 1), (1, 9, 9, 0)], [(3, 1, 2, 30, 40)], [(2, [[0, 0], [8, 0]], 1)], points=2
    )  # fmt: skip
    assert marks.shape() == (1, 3)
    assert marks.labels.tolist() == [[[1, 0], [1, 1], [ABSENT, ABSENT]]]
    assert marks.points[0, 0].tolist() == [[4, 5], [9, 9]] and marks.points[0, 1].tolist() == [[0, 0], [8, 0]]
    assert marks.has_box.tolist() == [[False, False, True]] and marks.boxes[0, 2].tolist() == [1, 2, 30, 40]
    assert marks.present().tolist() == [[True, True, True]]
    assert user_prompts(2).shape() is None
    assert user_prompts(2, clicks=[(2, 1, 1, 1)]).present().tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"clicks": [(3, 1, 1, 1)]}, "object 3; expected a whole number from 1 to 2"),
        ({"clicks": [(1.5, 1, 1, 1)]}, "object 1.5; expected a whole number from 1 to 2"),
        ({"clicks": [(1, 1, 1, 2)]}, "label 2"),
        ({"boxes": [(1, 0, 0, 1, 1), (1, 0, 0, 2, 2)]}, "two boxes"),
        ({"scribbles": [(1, np.zeros((4, 4), bool), 1)]}, "empty"),
        ({"scribbles": [(1, [[1, 2, 3]], 1)]}, r"shape \(1, 3\)"),
        ({"clicks": [(1, float("nan"), 1, 1)]}, "at nan, 1.0; expected finite"),
        ({"boxes": [(1, 0, 0, float("inf"), 1)]}, "at 0.0, 0.0, inf, 1.0"),
        ({"scribbles": [(1, [[0, 0], [float("nan"), 1]], 1)]}, "not finite"),
    ],
)
def test_impossible_marks(marks, message):
    with pytest.raises(ConfigError, match=message):
        user_prompts(2, **marks)


@pytest.mark.parametrize("drawn", [(30, 40, 1, 2), (1, 40, 30, 2), (30, 2, 1, 40)])
def test_a_box_may_be_drawn_from_any_corner(drawn):
    assert user_prompts(1, boxes=[(1, *drawn)]).boxes.tolist() == [[[1, 2, 30, 40]]]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SAMSP("mobile_sam", image_size=64, num_classes=4, prompt=("box", "points"), adapt="frozen").eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "marks",
    [
        {"clicks": [(2, 20, 30, 1)]},
        {"boxes": [(2, 8, 8, 40, 50)]},
        {"scribbles": [(2, [[10, 10], [40, 30]], 1)]},
    ],
    ids=["click", "box", "scribble"],
)
def test_only_the_marked_object_is_refined(network, marks):
    image = torch.rand(1, 3, 64, 64)
    plain, refined = network(image), network(image, user_prompts(3, **marks))
    changed = [not torch.equal(plain[:, k], refined[:, k]) for k in range(4)]
    assert changed == [False, False, True, False]


@torch.no_grad()
def test_all_classes_of_a_pass_go_through_the_decoder_at_once(network):
    batches = []
    hook = network.sam.mask_decoder.output_upscaling.register_forward_hook(lambda m, x, y: batches.append(len(x[0])))
    network(torch.rand(2, 3, 64, 64))
    hook.remove()
    assert batches == [2 * 3, 2 * 3]  # two passes of two images with three classes each


@torch.no_grad()
def test_classes_in_one_batch_equal_each_class_alone(network):
    """One prompt set a class: the same as SAM's decoder called class by class."""
    embedding = network.encoder(torch.rand(1, 3, 64, 64)).embedding
    marks = user_prompts(3, clicks=[(1, 20, 30, 1)], boxes=[(3, 5, 6, 40, 50)])
    together = network._decode(embedding, marks)
    for k in range(3):
        alone = Prompts(*(None if part is None else part[:, k : k + 1] for part in marks))
        sparse, valid, dense = network.sam.embed(alone, (4, 4))
        sparse = torch.cat([network.classes[k][None, None], sparse], 1)
        valid = torch.cat([torch.ones(1, 1, dtype=torch.bool), valid], 1)
        mask = network.sam.decode(embedding, sparse[:, valid[0]], None, dense, 1)[0][:, 0, 0]
        assert torch.allclose(together[:, k], mask, atol=1e-4, rtol=1e-4)


def test_a_frozen_encoder_learns_nothing_at_all(network):
    assert not any(p.requires_grad for p in network.encoder.parameters())
    assert any(p.requires_grad for p in network.sam.parameters())


@torch.no_grad()
def test_marks_are_scaled_with_the_image_and_not_mirrored():
    torch.manual_seed(0)
    network = SAMSP("mobile_sam", image_size=64, steps=0).eval()
    large = torch.rand(1, 3, 96, 192)
    marks = user_prompts(1, clicks=[(1, 149.5, 29.5, 1)], boxes=[(1, 59.5, 11.5, 179.5, 80.5)])
    small = user_prompts(1, clicks=[(1, 49.5, 19.5, 1)], boxes=[(1, 19.5, 7.5, 59.5, 53.5)])
    found = ImageInferer(64, "float32")(large, network, prompts=marks)
    expected = network(fit_image(large, 64), small)
    assert torch.allclose(found, torch.nn.functional.interpolate(expected, (96, 192), mode="bilinear"), atol=1e-5)
    whole = Prompts(points=torch.tensor([[[[150, 30]]]]), labels=torch.ones(1, 1, 1)).scaled(1 / 3, 2 / 3)
    assert torch.allclose(whole.points, torch.tensor([[[[150.5 / 3 - 0.5, 30.5 / 1.5 - 0.5]]]]))
    assert ImageInferer(64, "float32", flips=True)(large, network, prompts=user_prompts(1)).shape == (1, 2, 96, 192)
    with pytest.raises(ConfigError, match="no mirror images"):
        ImageInferer(64, "float32", flips=True)(large, network, prompts=marks)
    for flips in (False, True):  # by position they would be neither scaled nor refused
        with pytest.raises(ConfigError, match="name them"):
            ImageInferer(64, "float32", flips=flips)(large, network, marks)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"clicks": [(1, 20, 20, 1), (1, 60, 150, 1)]}, "x, y = 60, 150, outside an image 192 wide and 96 high"),
        ({"clicks": [(2, -2, 20, 0)]}, "x, y = -2, 20"),
        ({"scribbles": [(1, [[0, 0], [500, 0]], 1)]}, "x, y = 250, 0"),
        ({"boxes": [(1, 10, 10, 20, 20), (2, 10, 120, 20, 150)]}, "box is 10, 120, 20, 150, outside an image 192"),
    ],
)
@torch.no_grad()
def test_marks_outside_the_image_are_refused(marks, message):
    network = SAMSP("mobile_sam", image_size=64, num_classes=3, steps=0).eval()
    with pytest.raises(ConfigError, match=message):
        ImageInferer(64, "float32")(torch.rand(1, 3, 96, 192), network, prompts=user_prompts(2, **marks))


@pytest.mark.parametrize("label", [2, -3])
def test_points_of_unknown_labels_are_refused(label):
    marks = Prompts(points=torch.ones(1, 1, 1, 2), labels=torch.full((1, 1, 1), label))
    network = SAMSP("mobile_sam", image_size=64, steps=0).eval()
    with pytest.raises(ConfigError, match=f"label {label}; expected 1"):
        ImageInferer(64, "float32")(torch.rand(1, 3, 64, 64), network, prompts=marks)


@torch.no_grad()
def test_marks_on_the_border_and_boxes_across_it_are_taken():
    network = SAMSP("mobile_sam", image_size=64, num_classes=3, steps=0).eval()
    marks = user_prompts(2, clicks=[(1, 0, 0, 1), (1, 191, 95, 0)], boxes=[(1, -5, -5, 300, 40)])
    assert ImageInferer(64, "float32")(torch.rand(1, 3, 96, 192), network, prompts=marks).isfinite().all()


@pytest.mark.parametrize(("classes", "given"), [(2, (1, 2)), (3, (1, 1)), (2, (2, 1))])
def test_marks_for_other_objects_or_images_are_refused(classes, given):
    network = SAMSP("mobile_sam", image_size=64, num_classes=classes, steps=0).eval()
    expected = rf"The prompts are for \({given[0]}, {given[1]}\) \(images, objects\); expected \(1, {classes - 1}\)"
    for prompts in (Prompts(masks=torch.rand(*given, 16, 16)), Prompts(boxes=torch.ones(*given, 4))):
        with pytest.raises(ConfigError, match=expected):
            network(torch.rand(1, 3, 64, 64), prompts)


def test_a_scribble_may_need_a_gradient():
    line = torch.tensor([[1.0, 2.0], [5.0, 2.0]], requires_grad=True)
    assert torch.equal(scribble_points(line, 2), line.detach())
