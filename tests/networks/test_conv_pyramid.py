"""The plain peer: a feature pyramid under the same encoder."""

import pytest
import torch
from torch.nn import functional as F

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks import ConvPyramidSAM


@pytest.mark.parametrize("encoder", ["mobile_sam", "lite_medsam", "sam_small"])
@pytest.mark.parametrize("classes", [2, 5])
@torch.no_grad()
def test_logits_have_the_inputs_size(encoder, classes):
    logits = ConvPyramidSAM(encoder, 32, classes).eval()(torch.rand(2, 3, 32, 64))
    assert type(logits) is torch.Tensor and logits.shape == (2, classes, 32, 64) and logits.dtype == torch.float32


@torch.no_grad()
def test_equals_a_pyramid_written_out():
    network = ConvPyramidSAM(image_size=64, width=16).eval()
    image = torch.rand(1, 3, 64, 96)
    levels = network.encoder(image).levels
    lateral = [F.conv2d(x, c.weight, c.bias) for x, c in zip(levels, network.lateral, strict=True)]
    x = network.smooth[3](lateral[3])
    x = network.smooth[2](lateral[2] + x)
    x = network.smooth[1](lateral[1] + F.interpolate(x, scale_factor=2, mode="bilinear"))
    x = network.smooth[0](lateral[0] + F.interpolate(x, scale_factor=2, mode="bilinear"))
    expected = F.interpolate(F.conv2d(x, network.head.weight, network.head.bias), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["mobile_sam", "sam_small"])
@pytest.mark.parametrize("adapt", ["full", "lora", "frozen"])
def test_every_trained_parameter_receives_a_gradient(encoder, adapt):
    network = ConvPyramidSAM(encoder, 64, adapt=adapt)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0, 0.05)
    network(torch.rand(1, 3, 64, 64)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad is (adapt == "full" or "lora_" in name or not name.startswith("encoder.")), name
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), name


@torch.no_grad()
def test_dropout_is_the_only_difference_between_the_modes():
    network = ConvPyramidSAM(image_size=64)
    image = torch.rand(1, 3, 64, 64)
    quiet = network.eval()(image)
    assert torch.equal(network.train()(image), quiet)
    network.dropout = 0.5
    assert torch.equal(network.eval()(image), quiet) and not torch.equal(network.train()(image), quiet)


@torch.no_grad()
def test_saved_and_loaded_logits_are_bit_equal(tmp_path):
    first, second = ConvPyramidSAM(image_size=64).eval(), ConvPyramidSAM(image_size=64).eval()
    image = torch.rand(1, 3, 64, 64)
    assert not torch.equal(first(image), second(image))
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(first(image), second(image))


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="adapt is"):
        ConvPyramidSAM(image_size=64, adapt="half")
    with pytest.raises(ConfigError, match="unknown"):
        ConvPyramidSAM("resnet")


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["mobile_sam", "sam_small"])
@torch.no_grad()
def test_one_graph_and_an_export_with_a_free_batch(encoder):
    network = ConvPyramidSAM(encoder, 64).eval()
    image = torch.rand(3, 3, 64, 96)
    expected = network(image)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")(image)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    free = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(network, (image[:2],), dynamic_shapes=free).module()
    torch.testing.assert_close(exported(image), expected, rtol=1e-4, atol=1e-5)
