"""Camera augmentation: seeded, in range, each effect its own, labels where the image is."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from hspsam_monai.data import phantom
from hspsam_monai.transforms import FitToNetworkd, RandCamera, RandCamerad, RandEmptyCropd, fit_image

GROUPS = ("colour", "blur", "noise", "vignette", "frame", "text")
EFFECTS = ("gain", "gamma", "saturation", "contrast", "blur", "noise", "vignette", "frame", "text")
OFF = dict.fromkeys(GROUPS, 0.0)


@pytest.fixture(scope="module")
def frame():
    image, mask = phantom(3, (64, 80), empty=False)
    return torch.from_numpy(image).permute(2, 0, 1) / 255, torch.from_numpy(mask)[None].float()


@pytest.mark.parametrize("shape", [(3, 64, 80), (3, 32, 32), (3, 200, 50)])
@pytest.mark.parametrize("seed", range(6))
def test_same_seed_same_image_of_same_shape_in_range(shape, seed):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    camera = RandCamera(1.0, *(1.0,) * 6)
    torch.manual_seed(1)
    first = camera.set_random_state(seed)(image)
    torch.manual_seed(2)
    assert torch.equal(camera.set_random_state(seed)(image), first)
    assert not torch.equal(camera.set_random_state(seed + 100)(image), first)
    assert first.shape == image.shape and first.dtype == image.dtype
    assert first.min() >= 0 and first.max() <= 1 and first.isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_everything_is_made_on_the_images_device(frame, seed):
    """Under another default device, whatever an effect makes without naming the image's would not mix with it."""
    camera = RandCamera(1.0, *(1.0,) * 6).set_random_state(seed)
    expected = camera(frame[0])
    with torch.device("meta"):
        assert torch.equal(camera.set_random_state(seed)(frame[0]), expected)


def test_draws_follow_one_another(frame):
    camera = RandCamera(1.0).set_random_state(0)
    assert len({camera(frame[0]).sum().item() for _ in range(8)}) > 4


def test_everything_off_changes_nothing(frame):
    dark = frame[0] * 0.05  # below the level taken for a black border
    for image in (frame[0], dark):
        assert torch.equal(RandCamera(0.0, *(1.0,) * 6).set_random_state(0)(image), image)
        assert torch.equal(RandCamera(1.0, **OFF).set_random_state(0)(image), image)


@pytest.mark.parametrize("effect", EFFECTS)
def test_each_effect_changes_the_image_on_its_own(frame, effect):
    for seed in range(4):
        camera = RandCamera(1.0, **OFF).set_random_state(seed)
        camera.randomize()
        camera._on = {name: name == effect for name in EFFECTS}
        camera._frame = ("circle", 0.85, 0.0, 0.0)  # some frames are wider than the image
        camera._text_seed = 0  # glyphs, no inset
        changed, field = camera.apply(frame[0])
        assert not torch.equal(changed, frame[0]) and changed.min() >= 0 and changed.max() <= 1
        assert (field is not None) == (effect == "frame")


@pytest.mark.parametrize("group", GROUPS)
def test_each_probability_governs_its_effects(frame, group):
    camera = RandCamera(1.0, **{**OFF, group: 1.0}).set_random_state(0)
    camera.randomize()
    belongs = {"gain", "gamma", "saturation", "contrast"} if group == "colour" else {group}
    assert {name for name, on in camera._on.items() if on} == belongs


def test_an_effect_leaves_the_draws_of_the_others_alone():
    """Ablations compare like with like: switching one effect off keeps the strengths of all others."""
    strengths = []
    for blur in (0.0, 1.0):
        camera = RandCamera(1.0, blur=blur).set_random_state(4)
        camera.randomize()
        strengths.append((camera._gain.tolist(), camera._gamma, camera._noise, camera._frame, camera._text_seed))
    assert strengths[0] == strengths[1]


def test_the_black_border_stays_black_under_colour():
    image = torch.full((3, 32, 32), 0.5)
    image[:, :, :8] = 0
    camera = RandCamera(1.0, **{**OFF, "colour": 1.0})
    for seed in range(8):
        assert not camera.set_random_state(seed)(image)[:, :, :8].any()


def test_the_label_is_cleared_under_an_inset_and_kept_under_text(frame):
    image, insets = frame[0].clamp(0.4, 0.9), 0  # no colour an inset has
    for seed in range(40):
        transform = RandCamerad(prob=1.0, **{**OFF, "text": 1.0}).set_random_state(seed)
        found = transform({"image": image, "label": torch.ones(1, 64, 80)})
        hidden = found["label"][0] == 0
        if not hidden.any():
            continue
        insets += 1
        box = found["image"][:, hidden]
        assert torch.equal(box, box[:, :1].expand_as(box)) and box.max() < 0.4
        assert torch.equal(found["image"][:, ~hidden], image[:, ~hidden])
        ys, xs = hidden.nonzero().unbind(1)
        assert len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
    assert 3 <= insets <= 20


@pytest.mark.parametrize("kind", ["circle", "octagon", "bars"])
def test_the_label_is_cleared_where_a_frame_hides_the_tissue(frame, kind):
    image = frame[0].clamp(min=0.1)
    transform = RandCamerad(prob=1.0, **{**OFF, "frame": 1.0}).set_random_state(0)
    camera, draw = transform.camera, transform.camera.randomize

    def randomize():
        draw()
        camera._frame = (kind, 0.82, 0.0, 0.0)

    camera.randomize = randomize
    found = transform({"image": image, "label": torch.ones(1, 64, 80), "case": "a"})
    hidden = (found["image"] == 0).all(0, keepdim=True)
    assert 0 < hidden.sum() < hidden.numel()
    assert torch.equal(found["label"], (~hidden).float()) and found["case"] == "a"
    assert torch.equal(found["image"][:, ~hidden[0]], image[:, ~hidden[0]])


def test_without_a_frame_or_without_a_label_key_the_label_stays(frame):
    label = torch.ones(1, 64, 80)
    for options in ({**OFF, "colour": 1.0}, {"frame": 1.0}):
        keys = {} if "colour" in options else {"label_key": None}
        found = RandCamerad(prob=1.0, **keys, **options).set_random_state(0)({"image": frame[0], "label": label})
        assert torch.equal(found["label"], label) and not torch.equal(found["image"], frame[0])


def test_the_dictionary_version_is_seeded_and_keeps_its_input(frame):
    case = {"image": MetaTensor(frame[0].clone()), "label": MetaTensor(frame[1].clone())}
    transform = RandCamerad(prob=1.0)
    first = transform.set_random_state(5)(case)
    second = transform.set_random_state(5)(case)
    assert torch.equal(torch.as_tensor(first["image"]), torch.as_tensor(second["image"]))
    assert torch.equal(case["image"].as_tensor(), frame[0]) and torch.equal(case["label"].as_tensor(), frame[1])


# -- frames without the object


def test_empty_crops_hold_no_object_and_have_an_empty_label(frame):
    image, label = torch.rand(3, 64, 64), torch.zeros(1, 64, 64)
    image[:, 4:12, 4:12] = label[:, 4:12, 4:12] = 1  # nothing else is white
    image[:, :4] = image[:, 12:] = 0.3
    transform = RandEmptyCropd(prob=1.0).set_random_state(0)
    acted = 0
    for _ in range(20):
        found = transform({"image": image, "label": label, "case": "a"})
        assert found["image"].shape == (3, 64, 64) and found["label"].shape == (1, 64, 64) and found["case"] == "a"
        if not torch.equal(found["image"], image):
            acted += 1
            assert not found["label"].any() and found["image"].max() < 1
    assert acted > 10


def test_an_image_wholly_covered_is_never_touched():
    image, label = torch.rand(3, 48, 48), torch.ones(1, 48, 48)
    transform = RandEmptyCropd(prob=1.0).set_random_state(0)
    for _ in range(20):
        found = transform({"image": image, "label": label})
        assert found["image"] is image and found["label"] is label


def test_empty_crops_are_seeded_and_as_rare_as_told(frame):
    case = {"image": frame[0], "label": torch.zeros(1, 64, 80)}
    transform = RandEmptyCropd(prob=0.25)
    outputs = []
    for _ in range(2):
        transform.set_random_state(3)
        outputs.append([transform(case)["image"] for _ in range(200)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert 25 <= sum(image is not frame[0] for image in outputs[0]) <= 75
    assert RandEmptyCropd(prob=0.0)(case)["image"] is frame[0]


# -- the network's size


def test_fit_image_resizes_and_leaves_what_fits():
    image = torch.rand(2, 3, 50, 80)
    assert fit_image(image, 64).shape == (2, 3, 64, 64)
    square = torch.rand(1, 3, 64, 64)
    assert fit_image(square, 64) is square


@pytest.mark.parametrize(("size", "target"), [((96, 150), 32), ((50, 80), 64), ((20, 25), 32)])
def test_fit_image_equals_pillows_bilinear_resize(size, target):
    """Pillow weighs all pixels under a shrunken one, too; without that, thin structures vanish between samples."""
    image = torch.rand(*size, generator=torch.Generator().manual_seed(0))
    expected = Image.fromarray(image.numpy()).resize((target, target), Image.Resampling.BILINEAR)
    found = fit_image(image[None, None], target)[0, 0].numpy()
    np.testing.assert_allclose(found, np.asarray(expected), rtol=0, atol=1e-4)


def test_fit_to_network_keeps_classes_and_meets_the_inferer(frame):
    image, label = torch.rand(3, 50, 80), torch.randint(0, 4, (1, 50, 80)).float()
    found = FitToNetworkd(64)({"image": MetaTensor(image), "label": MetaTensor(label), "case": "a"})
    assert type(found["image"]) is type(found["label"]) is torch.Tensor and found["case"] == "a"
    assert torch.equal(found["image"], fit_image(image[None], 64)[0])
    assert found["label"].shape == (1, 64, 64) and set(found["label"].unique().tolist()) <= {0, 1, 2, 3}
    assert FitToNetworkd(64, label_key=None)({"image": image})["image"].shape == (3, 64, 64)
