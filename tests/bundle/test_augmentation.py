"""The augmentation that train.json describes."""

import monai
import pytest
import torch
from monai.bundle import ConfigParser

from tests.bundle.conftest import configs


def augmentation(bundle, device):
    parser = ConfigParser()
    parser.read_config(configs(bundle, "train"))
    parser["image_size"] = 64
    parser["device"] = f"$torch.device('{device}')"
    parser.parse()
    return monai.transforms.Compose(parser.get_parsed_content("train::augmentation_transforms"))


def augmented(transform, seed):
    generator = torch.Generator().manual_seed(seed)
    case = {"image": torch.rand(3, 64, 64, generator=generator), "label": torch.zeros(1, 64, 64)}
    case["label"][:, 10:40, 20:50] = 1
    return transform.set_random_state(seed=seed)(case)


def test_augmented_labels_stay_classes(bundle):
    """A label mixed of its neighbours is a fraction, which a loss would silently take for a lower class."""
    transform = augmentation(bundle, "cpu")
    label = torch.zeros(1, 64, 64)
    label[:, 8:40, 12:50], label[:, 20:60, 30:64] = 1, 2
    seen = set()
    for seed in range(20):
        found = transform.set_random_state(seed=seed)({"image": label.repeat(3, 1, 1) / 2, "label": label.clone()})
        seen |= set(found["label"].unique().tolist())
    assert seen == {0, 1, 2}


def test_moving_to_the_device_changes_nothing_on_a_cpu(bundle):
    first = augmentation(bundle, "cpu")
    without = monai.transforms.Compose(first.transforms[1:])
    assert isinstance(first.transforms[0], monai.transforms.ToDeviced)
    for seed in range(6):
        a, b = augmented(first, seed), augmented(without, seed)
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


def test_augmentation_moves_image_and_label_alike(bundle):
    """Interpolating a label at pixel corners and its image at centres would set them half a pixel apart."""
    full = augmentation(bundle, "cpu")
    # Without what hides, crops or recolours on purpose.
    named = ("RandEmptyCropd", "RandCamerad")
    transform = monai.transforms.Compose([one for one in full.transforms if type(one).__name__ not in named])
    assert len(transform.transforms) == len(full.transforms) - 2
    ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = ((ys - 31.5) ** 2 + (xs - 31.5) ** 2 < 12**2).float()[None]
    apart = []
    for seed in range(60):
        found = transform.set_random_state(seed=seed)({"image": disc.repeat(3, 1, 1), "label": disc})
        centres = [
            torch.stack([(mass * ys).sum(), (mass * xs).sum()]) / mass.sum()
            for mass in (found["image"][0], found["label"][0])
        ]
        apart.append(centres[1] - centres[0])
    apart = torch.stack(apart)
    assert apart.mean(0).abs().max() < 0.05 and apart.norm(dim=1).mean() < 0.15


@pytest.mark.gpu
def test_augmentation_runs_on_the_gpu_with_the_same_draws(bundle):
    """Interpolation rounds otherwise there: a few pixels at edges may differ, not the picture."""
    there, here = augmentation(bundle, "cuda"), augmentation(bundle, "cpu")
    for seed in range(12):
        a, b = augmented(there, seed), augmented(here, seed)
        assert a["image"].device.type == a["label"].device.type == "cuda"
        assert (a["image"].cpu() - b["image"]).abs().mean() < 1e-3
        assert (a["label"].cpu() != b["label"]).float().mean() < 0.01


def test_loader_workers_augment_on_the_cpu(bundle):
    parser = ConfigParser()
    parser.read_config(configs(bundle, "train"))
    parser["device"] = "$torch.device('cuda')"
    for workers, device in ((0, "cuda"), (2, "cpu")):
        parser["num_workers"] = workers
        parser.parse()
        assert parser.get_parsed_content("augmentation_device").type == device
