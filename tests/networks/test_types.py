"""Networks in other number types: close to themselves in float32, on 16-bit weights alone (autocast is elsewhere)."""

import copy

import pytest
import torch

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks import HSPSAM, SAMSP, ConvPyramidSAM, ProxyPrompt

BUILDERS = {
    "hsp": lambda: HSPSAM("mobile_sam", 64, decoder="slim"),
    "sam-sp": lambda: SAMSP("mobile_sam", 64, num_classes=3, steps=0),
    "plain": lambda: ConvPyramidSAM("mobile_sam", 64),
    "proxy": lambda: ProxyPrompt("mobile_sam", 64, value_width=16, mamba_depth=1, top_k=4),
}


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float64, 1e-4)])
@torch.no_grad()
def test_other_types_give_nearly_the_same(name, dtype, tolerance):
    torch.manual_seed(0)
    network = BUILDERS[name]().eval()
    other = copy.deepcopy(network).to(dtype)
    image = torch.rand(1, 3, 64, 64)
    if name == "proxy":
        mask = torch.zeros(96, 80)
        mask[20:60, 30:70] = 1
        for one in (network, other):
            one.set_context([torch.rand(3, 96, 80, generator=torch.Generator().manual_seed(1))], [mask])
    expected, found = network(image), other(image.to(dtype))
    assert found.dtype is torch.float32
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_a_context_follows_its_network_into_another_type(dtype):
    torch.manual_seed(0)
    network, image, mask = BUILDERS["proxy"]().eval(), torch.rand(1, 3, 64, 64), torch.zeros(64, 64)
    mask[20:50, 20:50] = 1
    network.set_context([torch.rand(3, 64, 64)], [mask])
    expected, near = network(image), network.similarity(image)
    other = copy.deepcopy(network).to(dtype)
    tolerance = 1e-4 if dtype is torch.float64 else 0.1
    assert (other(image.to(dtype)) - expected).norm() <= tolerance * expected.norm()
    assert other.similarity(image.to(dtype)) == pytest.approx(float(near), rel=tolerance)
    next(other.csm.parameters()).add_(1)
    with pytest.raises(ConfigError, match="made by other weights"):
        other(image.to(dtype))
    other.to(torch.float32)  # no way to make a context of other weights fit
    with pytest.raises(ConfigError, match="made by other weights"):
        other(image)


@torch.no_grad()
def test_a_self_made_prompt_in_another_type():
    network = SAMSP("mobile_sam", 64, prompt=["box", "mask", "points"]).to(torch.bfloat16).eval()
    assert network(torch.rand(2, 3, 64, 64, dtype=torch.bfloat16)).isfinite().all()
