"""The bundle in others' hands: lists of their own, a server that trains, MONAI's ``load``."""

import json
from pathlib import Path

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from tests.bundle.conftest import configs


def test_a_users_own_list_of_images_needs_no_names(bundle, phantoms, tmp_path):
    images = sorted(str(path) for path in (phantoms / "images").iterdir())[:2]
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    data = [{"image": path} for path in (*images, str(tmp_path / "broken.jpg"))]
    values = {"dataset::data": data, "output_dir": str(tmp_path / "out"), "flips": False, "image_size": 64}
    workflow = ConfigWorkflow(configs(bundle, "inference"), workflow_type="infer", dataset_dir=str(tmp_path), **values)
    workflow.initialize()
    with pytest.raises(RuntimeError) as caught:
        workflow.run()
    assert "1 of 3 files failed, 2 are done:\n  broken: " in str(caught.value.__cause__)
    masks = sorted(path.stem for path in (tmp_path / "out").rglob("*.png") if path.name != "gallery.png")
    assert masks == [Path(path).stem for path in images]
    rows = (tmp_path / "out" / "cases.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == masks


def test_a_server_trains_on_its_own_list_with_the_device_as_text(bundle, phantoms, trained, tmp_path):
    """What MONAI Label hands to ``monai.bundle.run``: cases without names, ``device`` as text, a loader in front."""
    images = sorted((phantoms / "images").iterdir())
    data = [{"image": str(p), "label": str(phantoms / "masks" / f"{p.stem}.png")} for p in images]
    path = str(bundle / "configs" / "train.json")
    parser = ConfigParser()
    parser.read_config(path)
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(trained / "model.pt"),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    monai.bundle.run(
        run_id="run", init_id=None, final_id=None, config_file=path,
        meta_file=str(bundle / "configs" / "metadata.json"), bundle_root=str(bundle), device="cpu",
        pretrained="", image_size=64, batch_size=2, output_dir=str(tmp_path / "run"), precision="float32",
        **{
            "train#trainer#max_epochs": 1, "train#dataset#data": data[:4], "validate#dataset#data": data[4:],
            "train#handlers": [loader, *parser.get("train#handlers")],
        },
    )  # fmt: skip
    assert (tmp_path / "run" / "model.pt").is_file()
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert splits["train"] == [p.stem for p in images[:4]] and splits["val"] == [p.stem for p in images[4:]]


def test_monais_load_gives_the_shipped_network(bundle, tmp_path, monkeypatch):
    """As bundle/docs/README.md says it: by default MONAI builds a training and finds no weights in the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "hspsam").symlink_to(bundle)
    found = monai.bundle.load(
        "hspsam", bundle_dir=str(tmp_path / "bundles"), workflow_type="inference", key_in_ckpt="model", device="cpu"
    )
    stored = torch.load(bundle / "models" / "model.pt", weights_only=True)["model"]
    state = found.state_dict()
    assert set(state) == set(stored)
    assert all(torch.equal(state[key], value.to(state[key].dtype)) for key, value in stored.items())
