"""TensorRT for the image encoder: what it would get, and what happens without it."""

import logging
import sys

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks import trt_compiler
from monai.networks.utils import add_casts_around_norms, convert_to_onnx

from hspsam_monai.data import read_mask, write_phantoms
from hspsam_monai.errors import ConfigError
from hspsam_monai.inference import compile_encoder
from hspsam_monai.inference.export import session
from hspsam_monai.inference.tensorrt import EncoderEngine
from hspsam_monai.networks import HSPSAM, ConvPyramidSAM


def build(**options):
    torch.manual_seed(0)
    return HSPSAM("mobile_sam", 64, prompts_per_level=2, decoder="slim", adapt="full", **options).eval()


@pytest.mark.parametrize("source", ["image", "static", "none"])
@torch.no_grad()
def test_the_engines_tensors_are_the_encoders_features(source):
    network = build(prompt_source=source)
    image, prompts = torch.rand(2, 3, 64, 64), network.prompter.encoder_prompts()
    engine = EncoderEngine(network.encoder, prompts)
    flat, expected = engine(image), network.encoder(image, prompts)
    assert all(isinstance(value, torch.Tensor) for value in flat)
    found = engine.features(flat)
    for a, b in zip([*found.levels, *found.tokens], [*expected.levels, *expected.tokens], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert found.embedding is None and expected.embedding is None


@torch.no_grad()
def test_monais_casts_around_norms_change_nothing():
    network = build(prompt_source="image")
    image = torch.rand(1, 3, 64, 64)
    engine = EncoderEngine(network.encoder, network.prompter.encoder_prompts())
    before = engine(image)
    assert not list(engine.children())
    add_casts_around_norms(engine)
    assert all(torch.equal(a, b) for a, b in zip(engine(image), before, strict=True))


@pytest.mark.parametrize("network", [build, lambda: ConvPyramidSAM(image_size=64).eval()])
@torch.no_grad()
def test_without_tensorrt_the_network_stays_and_the_log_says_so(network, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trt_compiler, "trt_imported", False)
    network, image = network(), torch.rand(1, 3, 64, 64)
    names, before = set(network.state_dict()), network(image)
    with caplog.at_level(logging.INFO):
        assert compile_encoder(network, tmp_path / "model.pt") is False
    assert "TensorRT is not available here: the plain PyTorch model runs" in caplog.text
    assert torch.equal(network(image), before) and set(network.state_dict()) == names


@torch.no_grad()
def test_a_compiled_engine_is_what_the_network_calls(tmp_path, caplog, monkeypatch):
    """trt_compile replaced by a stand-in that counts and, like the real one, answers in buffers of its own."""
    calls, buffers = [], {}

    def stand_in(model, base_path, args, submodule):
        engine = model.encoder.engine
        original = engine.forward

        def forward(image):
            calls.append(tuple(image.shape))
            return [buffers.setdefault(i, torch.empty_like(x)).copy_(x) for i, x in enumerate(original(image))]

        engine.forward = forward
        engine._trt_compiler = (base_path, args, submodule)
        return model

    monkeypatch.setattr("hspsam_monai.inference.tensorrt.trt_compile", stand_in)
    network, image = build(prompt_source="image"), torch.rand(2, 3, 64, 64)
    names, before = set(network.state_dict()), network(image)
    (tmp_path / "model.pt").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        assert compile_encoder(network, tmp_path / "model.pt", "bf16", (1, 2, 4)) is True
    assert torch.equal(network(image), before) and calls == [(2, 3, 64, 64)]
    encoded = network.encode(image)
    network.encode(torch.rand(2, 3, 64, 64))
    assert torch.equal(network.decode(encoded), before)  # not what the buffers hold now
    assert "TensorRT runs the image encoder (bf16, batch 1 to 4)" in caplog.text
    base, args, submodule = network.encoder.engine._trt_compiler
    assert "model.pt.bf16-64-1-2-4-" in base and submodule == ["encoder.engine"]
    assert args["dynamic_batchsize"] == [1, 2, 4] and args["timestamp"] > 0
    assert set(network.state_dict()) == names  # the engine owns nothing


@torch.no_grad()
def test_an_engine_is_that_of_its_weights_size_and_batch(tmp_path, monkeypatch):
    bases = []
    monkeypatch.setattr(
        "hspsam_monai.inference.tensorrt.trt_compile", lambda model, base, args, submodule: bases.append(base)
    )
    network = build(prompt_source="image")
    settings = [{}, {}, {"image_size": 96}, {"batch": (1, 1, 4)}]
    for options in settings:
        compile_encoder(network, tmp_path / "model.pt", **options)
    network.prompter.queries[0].add_(1)
    compile_encoder(network, tmp_path / "model.pt")
    next(network.encoder.parameters()).add_(1)
    compile_encoder(network, tmp_path / "model.pt")
    assert bases[0] == bases[1] and len(set(bases)) == 5


def test_float16_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fp16"):
        compile_encoder(build(), tmp_path / "model.pt", "fp16")


@pytest.mark.slow
@torch.no_grad()
def test_monais_exporter_takes_the_engine_with_a_free_batch(tmp_path):
    """What trt_compile does before TensorRT's own part: the same call, arguments by name, one dynamic axis."""
    network = build(prompt_source="image")
    engine = EncoderEngine(network.encoder.requires_grad_(False), network.prompter.encoder_prompts())
    file = tmp_path / "model.onnx"
    image = torch.rand(2, 3, 64, 64)
    axes = {"image": [0]}
    convert_to_onnx(engine, {"image": image}, filename=str(file), input_names=["image"], output_names=[],
                    dynamic_axes=axes)  # fmt: skip
    more = torch.rand(3, 3, 64, 64)
    found = session(file).run(None, {"image": more.numpy()})
    for a, b in zip(found, engine(more), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-4)


def test_the_overlay_runs_and_gives_the_plain_models_masks(bundle, tmp_path, caplog):
    if "tensorrt" in sys.modules and torch.cuda.is_available():
        pytest.skip("this is about machines without TensorRT")
    images = write_phantoms(tmp_path / "phantoms", 2, size=(64, 64)) / "images"
    outcome = {}
    for name in ("inference", "inference_trt"):
        files = [str(bundle / "configs" / f"{one}.json") for one in dict.fromkeys(("inference", name))]
        workflow = ConfigWorkflow(
            files, workflow_type="infer", dataset_dir=str(images), output_dir=str(tmp_path / name), image_size=64,
            scales=[1], device="$torch.device('cpu')",
        )  # fmt: skip
        workflow.initialize()
        assert workflow.check_properties() == []
        with caplog.at_level(logging.INFO):
            workflow.run()
        workflow.finalize()
        outcome[name] = [read_mask(path, 2).tolist() for path in sorted((tmp_path / name).glob("*.png"))]
    assert len(outcome["inference"]) == 2 and outcome["inference"] == outcome["inference_trt"]
    assert "plain PyTorch model runs" in (tmp_path / "inference_trt" / "log.txt").read_text()
    assert "plain PyTorch model runs" not in (tmp_path / "inference" / "log.txt").read_text()


@pytest.mark.gpu
@torch.no_grad()
def test_tensorrt_gives_nearly_the_same(tmp_path):
    pytest.importorskip("tensorrt")
    pytest.importorskip("polygraphy")
    network, image = build(prompt_source="image").cuda(), torch.rand(2, 3, 64, 64, device="cuda")
    before = network(image)
    assert compile_encoder(network, tmp_path / "model.pt", "fp32", (1, 2, 4)) is True
    torch.testing.assert_close(network(image), before, rtol=1e-3, atol=1e-3)
    assert list(tmp_path.glob("*.plan"))
