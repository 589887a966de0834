"""Cells and maps, and activations that reuse their input's memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hspsam_monai.networks.layers import LayerNorm2d, NormGELU, OwnGELU, to_cells, to_map


@pytest.mark.parametrize("batch", [1, 3])
def test_cells_and_map_are_each_other_s_inverse_and_a_view(batch):
    x = torch.randn(batch, 5, 4, 6)
    cells = to_cells(x)
    assert torch.equal(cells[:, 6 * 2 + 3], x[:, :, 2, 3])  # row by row
    assert torch.equal(to_map(cells, (4, 6)), x)
    assert to_map(cells, (4, 6)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_map_of_cells_stays_channels_last_when_it_is_resized(batch):
    x = to_map(torch.randn(batch, 24, 8), (4, 6))
    larger = F.interpolate(x, scale_factor=2, mode="bilinear")
    assert larger.stride()[1] == 1


def test_activations_equal_the_plain_ones_and_keep_what_a_gradient_needs():
    x = torch.randn(2, 8, 3, 3)
    norm = LayerNorm2d(8)
    fused = NormGELU(8)
    torch.testing.assert_close(fused(x), nn.GELU()(norm(x)))
    torch.testing.assert_close(OwnGELU()(x.clone()), F.gelu(x))
    own = x.clone().requires_grad_()
    OwnGELU()(own * 1).sum().backward()
    plain = x.clone().requires_grad_()
    F.gelu(plain).sum().backward()
    torch.testing.assert_close(own.grad, plain.grad)
