"""Every network computes where its weights are; checked without such a device, on tensors that only say they are there.

PyTorch's fake tensors carry shape, type and device, and every operation on tensors of different devices fails as it
would on a real one.
"""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks import HSPSAM, SAMSP, ConvPyramidSAM, ProxyPrompt
from hspsam_monai.networks.user_prompts import user_prompts
from hspsam_monai.transforms import RandCamerad

CUDA = torch.device("cuda", 0)


@pytest.fixture
def moved(monkeypatch):
    """Inside a fake mode, copy a network to a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # would ask the driver
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def move(network):
        with FakeCopyMode(mode):
            network = copy.deepcopy(network)
        for module in network.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(value.detach().to(CUDA), value.requires_grad)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = value.to(CUDA)
        return network

    move.mode = mode
    return move


def images(batch=2, size=64):
    return torch.rand(batch, 3, size, size, device=CUDA)


def check(moved, network, *inputs, **options):
    with moved.mode:
        network = moved(network)
        given = [make() for make in inputs]
        for training in (True, False):
            found = network.train(training)(images(), *given, **options)
            logits = getattr(found, "logits", found)
            assert logits.device == CUDA and logits.shape == (2, network.num_classes, 64, 64)


def test_shapes_can_be_estimated_on_the_cpu_too():
    mode, network = FakeTensorMode(), HSPSAM("mobile_sam", 64).eval()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(network)
    with mode, torch.no_grad():
        for _ in range(2):
            assert fake(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_the_check_finds_a_tensor_on_the_wrong_device(moved):
    class Careless(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.ones(64)

    network = Careless(64, 64)
    with moved.mode, pytest.raises(RuntimeError, match="cpu"):
        moved(network)(images())


@pytest.mark.parametrize(
    ("encoder", "decoder", "source"),
    [
        ("mobile_sam", "slim", "image"),
        pytest.param("mobile_sam", "paper", "static", marks=pytest.mark.slow),
        pytest.param("lite_medsam", "slim", "none", marks=pytest.mark.slow),
        pytest.param("sam_vit_b", "paper", "image", marks=pytest.mark.slow),
        pytest.param("sam_vit_b", "slim", "static", marks=pytest.mark.slow),
    ],
)
def test_hsp_sam(moved, encoder, decoder, source):
    check(moved, HSPSAM(encoder, 64, num_classes=3, decoder=decoder, prompt_source=source, adapt="lora"))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [["box"], ["mask", "points"]])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_sam_sp(moved, prompt, num_classes):
    check(moved, SAMSP("mobile_sam", 64, num_classes=num_classes, prompt=prompt, box_jitter=2.0))


def test_sam_sp_refined_by_marks_made_on_the_cpu(moved):
    marks = user_prompts(1, clicks=[(1, 20, 20, 1)], boxes=[(1, 4, 4, 40, 40)])
    marks = marks._replace(**{name: part.expand(2, *part.shape[1:]) for name, part in marks._asdict().items()
                              if part is not None})  # fmt: skip
    network = SAMSP("mobile_sam", 64)
    with moved.mode:
        network = moved(network).eval()
        given = type(marks)(*(None if part is None else moved.mode.from_tensor(part) for part in marks))
        assert given.boxes.device.type == "cpu" and network(images(), prompts=given).device == CUDA


@pytest.mark.slow
def test_conv_pyramid(moved):
    check(moved, ConvPyramidSAM("mobile_sam", 64))


def test_proxy_prompt(moved):
    small = {"value_width": 16, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 32}
    network = ProxyPrompt("mobile_sam", 64, num_classes=3, **small)
    supports = (lambda: torch.rand(2, 3, 3, 64, 64, device=CUDA), lambda: torch.ones(2, 3, 64, 64, device=CUDA))
    check(moved, network, *supports)


def test_inferer(moved):
    network = HSPSAM("mobile_sam", 64)
    with moved.mode:
        network = moved(network)
        logits = ImageInferer(64, flips=True, scales=[0.9, 1, 1.2, 1.4])(images(1, 50), network.eval())
        assert logits.device == CUDA and logits.shape == (1, 2, 50, 50)


def test_camera(moved):
    everything = dict.fromkeys(("colour", "blur", "noise", "vignette", "frame", "text"), 1.0)
    with moved.mode:
        for seed in range(8):
            camera = RandCamerad(prob=1.0, **everything).set_random_state(seed)
            found = camera({"image": images()[0], "label": torch.ones(1, 64, 64, device=CUDA)})
            assert found["image"].device == found["label"].device == CUDA
