"""Training and evaluation of more than one foreground class, against Dice in numpy."""

import csv
import json

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from hspsam_monai.data import find_cases, read_image, read_mask, write_phantoms
from hspsam_monai.inference import ImageInferer
from tests.bundle.conftest import configs


@pytest.fixture(scope="module")
def three_classes(bundle, tmp_path_factory):
    """A data set of background, polyps and dark tissue, and an epoch on it: the folders of both, and the workflow."""
    root = tmp_path_factory.mktemp("classes")
    data = write_phantoms(root / "data", 6, seed=4, size=(72, 88), val_fraction=0.5, empty_fraction=0.34)
    for case in find_cases(data):
        grey = read_image(case["image"]).mean(-1)
        mask = np.where(read_mask(case["label"], 2) == 1, 1, 2 * (grey < np.percentile(grey, 75))).astype(np.uint8)
        Image.fromarray(mask).save(case["label"])
    workflow = ConfigWorkflow(
        configs(bundle, "train"), workflow_type="train", dataset_dir=str(data), output_dir=str(root / "run"),
        labels={"background": 0, "polyp": 1, "dark": 2}, pretrained=None, image_size=64, batch_size=3, epochs=1,
        lr=2e-4, warmup=1, ema=0.5, precision="float32",
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    return data, root / "run", workflow


def dice_of(network, case):
    """Dice of each foreground class of one case, [0, 1], in numpy; 1 where prediction and truth are both empty."""
    image = torch.from_numpy(read_image(case["image"])).permute(2, 0, 1)[None]
    with torch.no_grad():
        found = ImageInferer(64, "float32")(image, network.eval())[0].argmax(0).numpy()
    truth = read_mask(case["label"], 3)
    pairs = [(found == k, truth == k) for k in (1, 2)]
    return [2 * (p & t).sum() / (p.sum() + t.sum()) if p.any() or t.any() else 1.0 for p, t in pairs]


def test_the_key_metric_is_the_mean_dice_of_the_foreground_classes(three_classes):
    """Of the averaged network, at the images' own size; a class that is neither there nor found counts as found."""
    data, run, workflow = three_classes
    network = workflow.parser.get_parsed_content("ema_handler").ema_model
    dice = np.array([dice_of(network, case) for case in find_cases(data, "val")])
    with (run / "learning_curve.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert dice.shape == (3, 2) and 0 < dice.mean() < 1, (
        "the network of this test must find something, and not all of it"
    )
    assert float(last["val_mean_dice"]) == pytest.approx(dice.mean(), abs=1e-5)


def test_three_classes_are_evaluated(bundle, three_classes, tmp_path):
    from hspsam_monai.networks import load_checkpoint

    data, run, _ = three_classes
    files = [*configs(bundle, "train"), str(run / "network.json"), *configs(bundle, "evaluate")]
    workflow = ConfigWorkflow(
        files, workflow_type="train", dataset_dir=str(data), model=str(run / "model.pt"), output_dir=str(tmp_path),
        flips=False,
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    network = workflow.parser.get_parsed_content("network_def")
    load_checkpoint(network, run / "model.pt")
    dice = np.array([dice_of(network, case) for case in find_cases(data, "val")])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dice"]["mean"] == pytest.approx(dice.mean(), abs=1e-6)
    found = {name: values["dice"] for name, values in summary["per_class"].items()}
    assert found == pytest.approx({"polyp": dice[:, 0].mean(), "dark": dice[:, 1].mean()}, abs=1e-6)
