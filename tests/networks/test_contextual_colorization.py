"""Proxy Prompt's colorization module: sixteen times fewer tokens, and e attends to the updated x."""

import torch

from hspsam_monai.networks.contextual_colorization import ContextualColorizationModule


@torch.no_grad()
def test_shapes():
    ccm = ContextualColorizationModule(32, heads=4, ffn_width=16)
    for h, w, tokens in ((4, 6, 2), (8, 8, 4), (6, 10, 6), (2, 2, 1)):
        features, position = torch.randn(2, 32, h, w), torch.randn(32, h, w)
        assert ccm(features, torch.randn(2, 3, 32, h, w), position).shape == (6, tokens, 32)


@torch.no_grad()
def test_e_attends_to_the_updated_x():
    block = ContextualColorizationModule(32, 4, 16).blocks[0]
    x, e = torch.randn(1, 4, 4, 32), torch.randn(1, 4, 4, 32)
    x_merged, e_merged = block.merge_x(x).flatten(1, 2), block.merge_e(e).flatten(1, 2)
    updated = block.x_to_e(x_merged, e_merged)
    found_x, found_e = block(x, e)
    assert found_x.shape == (1, 4, 2, 32) and torch.equal(found_x.flatten(1, 2), updated)
    assert torch.equal(found_e.flatten(1, 2), block.e_to_x(e_merged, updated))
