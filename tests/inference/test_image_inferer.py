"""The inferer: any size in, logits at that size out, and what it refuses to compute in."""

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional as F

from hspsam_monai.errors import ConfigError
from hspsam_monai.inference import ImageInferer, autocast_dtype
from hspsam_monai.networks import HSPSAM
from hspsam_monai.networks.stored import pack
from hspsam_monai.transforms import fit_image


class Probe(nn.Module):
    """A network that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3, padding=1)
        self.seen = []

    def forward(self, image, *extra, **options):
        logits = self.layer(image)
        self.seen.append((tuple(image.shape), type(image), logits.dtype, extra, options))
        return logits


@pytest.fixture
def probe():
    torch.manual_seed(0)
    return Probe().eval()


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 50, 81), (1, 3, 7, 300), (3, 3, 128, 96)])
@torch.no_grad()
def test_logits_come_at_the_inputs_size(probe, shape):
    image = torch.rand(shape)
    logits = ImageInferer(64, "float32")(image, probe)
    assert logits.shape == (shape[0], 2, *shape[2:]) and logits.dtype == torch.float32
    assert [seen[0] for seen in probe.seen] == [(shape[0], 3, 64, 64)]
    by_hand = F.interpolate(probe(fit_image(image, 64)), shape[2:], mode="bilinear", align_corners=False)
    assert torch.equal(logits, by_hand)


@torch.no_grad()
def test_with_the_real_network():
    network = HSPSAM("mobile_sam", 64, decoder="slim", adapt="frozen").eval()
    logits = ImageInferer(64)(torch.rand(1, 3, 45, 123), network)
    assert logits.shape == (1, 2, 45, 123) and logits.isfinite().all()


@torch.no_grad()
def test_stored_features_give_the_images_answer_at_the_pictures_size():
    network = HSPSAM("mobile_sam", 64, decoder="slim", adapt="frozen", inject=False).eval()
    image = torch.rand(1, 3, 45, 123)
    encoded = network.encode(fit_image(image, 64))
    inferer = ImageInferer(64, "float32")
    expected = inferer(image, network)
    assert torch.equal(inferer(encoded._replace(original=(45, 123)), network), expected)
    assert inferer(encoded, network).shape == (1, 2, 64, 64)
    sizes = {"size": torch.tensor([[64, 64]]), "original": torch.tensor([[45, 123]])}
    assert torch.equal(inferer({**pack(encoded.features, network.stored), **sizes}, network), expected)
    with pytest.raises(ConfigError, match="no mirror images"):
        ImageInferer(64, "float32", flips=True)(encoded, network)


@torch.no_grad()
def test_without_size_images_pass_as_they_are(probe):
    image = torch.rand(1, 3, 33, 47)
    assert torch.equal(ImageInferer(None, "float32")(image, probe), probe(image))


@torch.no_grad()
def test_meta_data_is_kept(probe):
    image = MetaTensor(torch.rand(1, 3, 40, 50), meta={"filename_or_obj": "a.png"})
    logits = ImageInferer(64)(image, probe)
    assert isinstance(logits, MetaTensor) and logits.meta["filename_or_obj"] == "a.png"
    assert logits.shape == (1, 2, 40, 50)
    assert probe.seen[0][1] is torch.Tensor  # the network itself works without MONAI's bookkeeping
    assert type(ImageInferer(64)(image.as_tensor(), probe)) is torch.Tensor


@torch.no_grad()
def test_flips_are_the_mean_probability_of_four_mirror_images(probe):
    image = torch.rand(2, 3, 64, 64)
    found = ImageInferer(64, "float32", flips=True)(image, probe)
    total = 0
    for dims in ([], [3], [2], [2, 3]):
        total = total + probe(image.flip(dims)).softmax(1).flip(dims)
    torch.testing.assert_close(found, (total / 4).log())
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 64, 64))
    assert not torch.allclose(found.softmax(1), probe(image).softmax(1))
    # A mirrored image gives the mirrored answer.
    torch.testing.assert_close(ImageInferer(64, "float32", flips=True)(image.flip(3), probe).flip(3), found)


@torch.no_grad()
def test_each_mirror_image_may_have_its_own_size(probe):
    image = torch.rand(2, 3, 50, 70)
    found = ImageInferer(64, "float32", flips=True, scales=(1, 1.4, 0.5))(image, probe)
    assert [tuple(shape[-2:]) for shape, *_ in probe.seen] == [(64, 64), (96, 96), (32, 32), (64, 64)]
    total = 0
    for dims, side in (([], 64), ([3], 96), ([2], 32), ([2, 3], 64)):
        probability = probe(fit_image(image, side).flip(dims)).softmax(1).flip(dims)
        total = total + F.interpolate(probability, (96, 96), mode="bilinear")
    expected = F.interpolate((total / 4).log(), (50, 70), mode="bilinear")
    torch.testing.assert_close(found, expected)


NO_SCALES = [(), (1, 0), (1,) * 5, (float("nan"),), (1, float("inf")), 1.2, "11", (True,), ("1",)]


@pytest.mark.parametrize(("size", "scales"), [*((64, scales) for scales in NO_SCALES), (None, (1, 1.2))])
def test_scales_that_make_no_sense_are_refused(size, scales):
    with pytest.raises(ConfigError, match="scales is"):
        ImageInferer(size, flips=True, scales=scales)


@pytest.mark.parametrize("size", [0, -32, 100, 64.0, True, (64, 96), "64"])
def test_sizes_that_no_network_takes_are_refused(size):
    with pytest.raises(ConfigError, match="image_size is"):
        ImageInferer(size)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), "torch.uint8; expected floating"),
        (torch.rand(1, 3, 64, 64) * 255, "expected \\[0, 1\\]"),
        (torch.rand(1, 3, 64, 64) - 1, "expected \\[0, 1\\]"),
    ],
)
@pytest.mark.parametrize("flips", [False, True])
def test_values_of_another_range_are_refused(probe, image, message, flips):
    with pytest.raises(ConfigError, match=message):
        ImageInferer(32, flips=flips)(image, probe)
    assert not probe.seen


@torch.no_grad()
def test_flips_of_certain_networks_stay_finite(probe):
    probe.layer.bias.copy_(torch.tensor([200.0, -200.0]))
    assert ImageInferer(64, "float32", flips=True)(torch.rand(1, 3, 64, 64), probe).isfinite().all()


@torch.no_grad()
def test_extra_arguments_reach_the_network(probe):
    ImageInferer(64)(torch.rand(1, 3, 64, 64), probe, "one", two=2)
    assert probe.seen[0][3:] == (("one",), {"two": 2})


# -- training


def test_training_passes_through_with_gradients(probe):
    image = torch.rand(1, 3, 64, 64)
    logits = ImageInferer(None, "float32", flips=True)(MetaTensor(image), probe.train())
    assert type(logits) is torch.Tensor and len(probe.seen) == 1  # no mirror images, no meta data
    logits.sum().backward()
    assert probe.layer.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_a_tuple_reaches_the_loss_but_not_the_user(training):
    class Two(Probe):
        def forward(self, image):
            return super().forward(image), "more"

    output = ImageInferer(64)(torch.rand(1, 3, 64, 64), Two().train(training))
    assert (output[1] == "more") if training else (type(output) is torch.Tensor)


# -- precision


def test_precision_rules(monkeypatch):
    cpu, cuda, other = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    for device in (cpu, cuda, other):
        assert autocast_dtype(device, "float32") is None
        assert autocast_dtype(device, "bfloat16") is torch.bfloat16
    for able, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **_: able)
        assert autocast_dtype(cpu, "auto") is expected and autocast_dtype(cuda, "auto") is expected
    assert autocast_dtype(other, "auto") is None


@pytest.mark.parametrize("name", ["float16", "half", "fp16", ""])
def test_float16_is_refused(name):
    with pytest.raises(ConfigError, match="precision is"):
        ImageInferer(64, name)
    with pytest.raises(ConfigError, match="precision is"):
        autocast_dtype(torch.device("cpu"), name)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("flips", [False, True])
@torch.no_grad()
def test_the_network_computes_in_what_was_asked_and_logits_are_float32(probe, precision, dtype, flips):
    logits = ImageInferer(64, precision, flips)(torch.rand(1, 3, 64, 64), probe)
    assert {seen[2] for seen in probe.seen} == {dtype} and logits.dtype == torch.float32
