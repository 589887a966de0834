"""ONNX: the file computes what PyTorch does, for any batch, and carries what a user needs to know."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

import hspsam_monai
from hspsam_monai.encoders.lora import LoRALinear
from hspsam_monai.errors import ConfigError, ExportError
from hspsam_monai.inference import ImageInferer, export_onnx
from hspsam_monai.inference.export import read_metadata, session
from hspsam_monai.networks import HSPSAM, ConvPyramidSAM, load_checkpoint
from hspsam_monai.transforms import fit_image


class Tiny(nn.Module):
    """A network in small: a convolution and a LoRA layer over the channels; ``lie`` changes what is exported."""

    def __init__(self, lie: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = LoRALinear(nn.Linear(4, 2), 1, [torch.arange(2)])
        nn.init.normal_(self.mix.lora_b[0])
        self.lie, self.num_classes = lie, 2

    def forward(self, image):
        x = self.mix(self.conv(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.lie if self.lie and torch.compiler.is_exporting() else x


def test_the_file_computes_the_same_and_says_what_it_is(tmp_path):
    network = Tiny().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    worst = export_onnx(network, tmp_path / "tiny.onnx", 32, labels={"background": 0, "polyp": 1}, model="a run")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"] and worst <= 1e-5
    image = torch.rand(5, 3, 32, 32)
    run = session(tmp_path / "tiny.onnx")
    assert [(i.name, i.shape) for i in run.get_inputs()] == [("image", ["batch", 3, 32, 32])]
    assert [(o.name, o.shape) for o in run.get_outputs()] == [("pred", ["batch", 2, 32, 32])]
    found = run.run(["pred"], {"image": image.numpy()})[0]
    np.testing.assert_allclose(found, network(image).detach().numpy(), atol=1e-5)
    meta = read_metadata(tmp_path / "tiny.onnx")
    assert json.loads(meta["classes"]) == {"background": 0, "polyp": 1}
    assert (meta["model"], meta["network"], meta["image_size"]) == ("a run", "Tiny", "32")
    assert meta["hspsam_monai"] == hspsam_monai.__version__
    # The network is as it was: in train mode, with LoRA, same values.
    assert network.training and isinstance(network.mix, LoRALinear)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_file_holds_no_path_of_the_machine_that_made_it(tmp_path):
    export_onnx(Tiny(), tmp_path / "tiny.onnx", 32)
    content = (tmp_path / "tiny.onnx").read_bytes()
    assert b".py" not in content and b"site-packages" not in content and str(tmp_path).encode() not in content


def test_a_file_that_computes_something_else_is_not_written(tmp_path):
    target = tmp_path / "tiny.onnx"
    target.write_text("an older file")
    with pytest.raises(ExportError, match=r"up to 1\.00e-03; accepted: 1e-04"):
        export_onnx(Tiny(lie=1e-3), target, 32)
    assert target.read_text() == "an older file" and [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"]


def test_what_cannot_be_captured_is_named(tmp_path):
    class Branches(nn.Module):
        def forward(self, image):
            return image if image.sum() > 0 else -image

    with pytest.raises(ExportError, match="Branches cannot be exported at 32 pixels"):
        export_onnx(Branches(), tmp_path / "x.onnx", 32)
    assert not list(tmp_path.iterdir())


def test_missing_packages_folder_and_size_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is not a folder"):
        export_onnx(Tiny(), tmp_path / "nowhere" / "x.onnx", 32)
    with pytest.raises(ConfigError, match="holds less than 2 GiB"):
        export_onnx(nn.Linear(2**15, 2**15, device="meta"), tmp_path / "x.onnx", 32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ConfigError, match=r"needs onnxruntime, .*hspsam_monai\[export\]"):
        export_onnx(Tiny(), tmp_path / "x.onnx", 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        lambda: HSPSAM("mobile_sam", 64, prompts_per_level=2, prompt_source="image", decoder="slim"),
        lambda: HSPSAM("sam_vit_b", 64, prompt_source="static", decoder="paper"),
        lambda: ConvPyramidSAM("mobile_sam", 64),
    ],
    ids=["slim", "paper", "pyramid"],
)
def test_every_network_exports(network, tmp_path):
    torch.manual_seed(0)
    assert export_onnx(network(), tmp_path / "model.onnx", 64) <= 1e-4  # batch 1 and 3 inside


@pytest.mark.slow
@pytest.mark.data
@torch.no_grad()
def test_the_shipped_model_gives_the_same_masks_on_real_images(bundle, shared, tmp_path, record_property):
    from monai.bundle import ConfigParser

    from hspsam_monai.data import find_cases, read_image

    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    network, size = parser.get_parsed_content("network_def"), parser.get_parsed_content("image_size")
    load_checkpoint(network, bundle / "models" / "model.pt")
    export_onnx(network.eval(), tmp_path / "model.onnx", size, labels=parser.get_parsed_content("labels"))
    run = session(tmp_path / "model.onnx")
    cases = find_cases(shared / "data" / "polyp", "val")
    inferer, worst, pixels = ImageInferer(size, precision="float32"), 0.0, 0
    chosen = [cases[i] for i in np.linspace(0, len(cases) - 1, 50).astype(int)]
    assert len({case["case"] for case in chosen}) == 50
    for case in chosen:
        image = torch.from_numpy(read_image(case["image"])).permute(2, 0, 1)[None]
        image = fit_image(image, size)
        expected = inferer(image, network)
        found = run.run(["pred"], {"image": image.numpy()})[0]
        worst = max(worst, float(np.abs(found - expected.numpy()).max()))
        pixels += int((found.argmax(1) != expected.argmax(1).numpy()).sum())
    record_property("largest difference of a logit", worst)
    print(f"50 images: largest difference of a logit {worst:.2e}, {pixels} pixels of another class")
    assert worst <= 1e-4 and pixels == 0
