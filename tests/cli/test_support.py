"""``hspsam segment --support`` and ``hspsam context``: examples instead of training."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hspsam_monai.cli.app import app
from hspsam_monai.cli.models import find_model
from hspsam_monai.data import read_mask, write_phantoms
from hspsam_monai.encoders.state_files import read_state, write_state
from hspsam_monai.networks import HSPSAM, ProxyPrompt

SMALL = {"value_width": 16, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 32}


def hspsam(*arguments: object, code: int = 0):
    """Run a command in this process and demand its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + "".join(map(str, [result.exception]))
    return result


def write_model(folder: Path, network: torch.nn.Module, options: dict) -> Path:
    folder.mkdir()
    write_state(folder / "model.pt", {"model": network.state_dict()})
    overlay = {
        "labels": {"background": 0, "polyp": 1},
        "num_classes": "$len(@labels)",
        "image_size": 64,
        "network_def": {
            "_target_": f"hspsam_monai.networks.{type(network).__name__}", "encoder": "mobile_sam",
            "image_size": "@image_size", "num_classes": "@num_classes", **options,
        },
    }  # fmt: skip
    (folder / "network.json").write_text(json.dumps(overlay))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Proxy Prompt of random weights with a context of one object, as a training leaves it."""
    torch.manual_seed(0)
    network = ProxyPrompt("mobile_sam", image_size=64, **SMALL)
    network.set_context(torch.rand(1, 3, 64, 64), torch.ones(1, 64, 64))
    return write_model(tmp_path_factory.mktemp("support") / "proxy", network, SMALL)


@pytest.fixture(scope="module")
def supports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("support") / "few", 3, size=(64, 80), empty_fraction=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("support") / "all", 2, seed=5, size=(72, 64)) / "images"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def test_supports_given_or_stored_give_the_same_masks(model, supports, images, tmp_path):
    hspsam("segment", images, tmp_path / "given", "--model", model, "--support", supports, "--no-flips")
    rows = table(tmp_path / "given")
    assert len(rows) == 2 and all(0 < float(row["similarity"]) <= 1 for row in rows)
    assert "similarity to the supports" in (tmp_path / "given" / "gallery.html").read_text()
    record = json.loads((tmp_path / "given" / "splits.json").read_text())
    assert record == {"supports": ["phantom_0000", "phantom_0001", "phantom_0002"]}
    assert json.loads((tmp_path / "given" / "network.json").read_text())["labels"] == {"background": 0, "polyp": 1}

    hspsam("context", supports, tmp_path / "known", "--model", model, "--device", "cpu")
    hspsam("segment", images, tmp_path / "stored", "--model", tmp_path / "known", "--no-flips")
    again = table(tmp_path / "stored")
    for one, other in zip(rows, again, strict=True):
        masks = [read_mask(tmp_path / run / f"{one['case']}.png", 2) for run in ("given", "stored")]
        assert np.array_equal(*masks)
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_a_context_takes_overrides_and_names_no_organ(supports, tmp_path, bundle):
    assert find_model(None, supports=True).labels == {"background": 0, "object": 1}
    hspsam("context", supports, tmp_path / "few", "network_def::top_k=16", "image_size=64", "--device", "cpu")
    written = find_model(tmp_path / "few").network
    assert written["network_def"]["top_k"] == 16 and written["image_size"] == 64
    assert written["labels"] == {"background": 0, "object": 1}


def test_class_ids_are_as_many_objects(model, supports, images, tmp_path):
    folder = tmp_path / "two"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for path in sorted((supports / "images").iterdir())[:2]:
        (folder / "images" / path.name).write_bytes(path.read_bytes())
        mask = np.zeros((64, 80), np.uint8)
        mask[5:20, 5:30], mask[40:50, 5:30] = 1, 2
        Image.fromarray(mask).save(folder / "masks" / f"{path.stem}.png")
    hspsam("segment", images, tmp_path / "masks", "--model", model, "--support", folder, "--no-flips")
    written = json.loads((tmp_path / "masks" / "network.json").read_text())
    assert written["labels"] == {"background": 0, "object_1": 1, "object_2": 2} and written["num_classes"] == 3
    words = ["--model", model, "--support", folder, "labels={'background': 0, 'polyp': 1}"]
    result = hspsam("segment", images, tmp_path / "refused", *words, code=1)
    assert "show 2 objects; expected the network's 1" in result.stderr


def test_far_images_are_warned_of(model, supports, images, tmp_path, caplog):
    hspsam("context", supports, tmp_path / "known", "--model", model)
    state = read_state(tmp_path / "known" / "model.pt")
    state["context_reference"].fill_(1e-7)  # supports that are copies of each other: all else is far
    write_state(tmp_path / "known" / "model.pt", {"model": state})
    hspsam("segment", images, tmp_path / "masks", "--model", tmp_path / "known", "--no-flips")
    assert "2 of 2 images are unlike every support" in caplog.text
    assert "Look here first" in (tmp_path / "masks" / "gallery.html").read_text()


def test_a_support_without_foreground_is_named(model, supports, images, tmp_path):
    folder = write_phantoms(tmp_path / "few", 2, size=(64, 64), empty_fraction=0)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "masks" / "phantom_0001.png")
    result = hspsam("segment", images, tmp_path / "masks", "--model", model, "--support", folder, code=1)
    assert "phantom_0001.png: found no foreground" in result.stderr
    assert not list((tmp_path / "masks").glob("*.png"))


def test_a_context_of_other_weights_is_refused(model, supports, images, tmp_path):
    hspsam("context", supports, tmp_path / "known", "--model", model)
    state = read_state(tmp_path / "known" / "model.pt")
    state["csm.patch.weight"] *= 1.5
    write_state(tmp_path / "known" / "model.pt", {"model": state})
    result = hspsam("segment", images, tmp_path / "masks", "--model", tmp_path / "known", code=2)
    assert "stored context was made by other weights" in result.stderr


def test_no_supports_no_context_and_networks_without(model, supports, images, tmp_path):
    result = hspsam("segment", images, tmp_path / "a", "--model", model, "--support", tmp_path / "nowhere", code=1)
    assert "no such file or folder" in result.stderr
    bare = write_model(tmp_path / "bare", ProxyPrompt("mobile_sam", image_size=64, **SMALL), SMALL)
    assert "--support DIR" in hspsam("segment", images, tmp_path / "b", "--model", bare, code=2).stderr
    other = write_model(tmp_path / "hsp", HSPSAM("mobile_sam", image_size=64, decoder="slim", adapt="full"), {})
    words = ["--model", other, "--support", supports]
    assert "takes no supports" in hspsam("segment", images, tmp_path / "c", *words, code=2).stderr
    assert "expected another folder" in hspsam("context", supports, model, "--model", model, code=2).stderr
    before = (bare / "model.pt").read_bytes()  # someone's, though no training's
    assert "holds model.pt" in hspsam("context", supports, bare, "--model", model, code=2).stderr
    assert (bare / "model.pt").read_bytes() == before


def test_without_a_shipped_proxy_prompt_the_way_to_one_is_told(supports, images, tmp_path, monkeypatch):
    monkeypatch.setattr("hspsam_monai.cli.models.shipped_model", lambda _="": tmp_path / "proxy_prompt.safetensors")
    for words in (["segment", images, tmp_path / "masks", "--support", supports], ["context", supports, tmp_path]):
        result = hspsam(*words, code=1)
        assert "ships no trained Proxy Prompt" in result.stderr and "--network proxy_prompt" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("network", ["proxy_prompt", "sam_sp"])
def test_training_with_three_masks(images, tmp_path, network):
    data = write_phantoms(tmp_path / "data", 8, seed=2, size=(64, 64), empty_fraction=0)
    small = [f"network_def::{key}={value}" for key, value in SMALL.items()] if network == "proxy_prompt" else []
    words = ["--task", "few_shot", "--network", network, "--pretrained", "none", "train_cases=3", "draws=4"]
    words += ["image_size=64", "batch_size=2", "epochs=2", "draw_seed=1", *small]
    hspsam("train", "--data", data, "--output", tmp_path / "run", *words)
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert len(splits["train"]) == 3 and splits["val"] == splits["train"]
    train = set(json.loads((data / "splits.json").read_text())["train"])
    assert set(splits["train"]) <= train
    with (tmp_path / "run" / "learning_curve.csv").open() as file:
        assert [bool(row["val_mean_dice"]) for row in csv.DictReader(file)] == [True, True]
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    stored = read_state(tmp_path / "run" / "model.pt")
    key = next(k for k in stored if k.startswith(("ccm.", "sam.mask_decoder.")) and stored[k].ndim > 1)
    assert torch.equal(stored[key], last["best_network"][key].half())  # the last weights, whatever their score
    if network == "proxy_prompt":
        assert len(stored["context_keys"]) == 3 * 16
    hspsam("segment", images, tmp_path / "masks", "--model", tmp_path / "run", "--no-flips")
    assert len(list((tmp_path / "masks").glob("phantom_*.png"))) == 2


@pytest.mark.slow
def test_a_proxy_prompt_starts_from_the_shipped_one(tmp_path, bundle):
    data = write_phantoms(tmp_path / "data", 8, seed=2, size=(64, 64), empty_fraction=0)
    words = ["--task", "few_shot", "--network", "proxy_prompt", "--pretrained", "shipped", "train_cases=3", "draws=4"]
    words += ["image_size=64", "batch_size=2", "epochs=1", "lr=1e-9", "warmup=1"]
    hspsam("train", "--data", data, "--output", tmp_path / "run", *words)
    shipped = read_state(bundle / "models" / "proxy_prompt.safetensors")
    stored = read_state(tmp_path / "run" / "model.pt")
    key = next(k for k in shipped if k.startswith("ccm.") and shipped[k].ndim > 1)
    torch.testing.assert_close(stored[key].float(), shipped[key].float(), rtol=1e-3, atol=1e-4)
