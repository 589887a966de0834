"""Proxy Prompt's selective module: which support cells speak for a target cell, and the shapes of what they say."""

import math

import torch
from torch import nn

from hspsam_monai.networks.contextual_selection import (
    ContextualSelectiveModule,
    choose_cells,
    read_values,
    selective_map,
)


def cells(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_map_over_all_cells_is_the_softmax_of_distances():
    q, k, values = cells(2, 5, 64), cells(2, 9, 64), torch.randn(2, 9, 7)
    scaled_q, scaled_k = q * 8, k * 8  # length sqrt(C)
    expected = (-torch.cdist(scaled_q, scaled_k).square() / math.sqrt(64)).softmax(-1) @ values
    for top_k in (9, 100):
        assert torch.allclose(read_values(values, *selective_map(q, k, top_k)), expected, atol=1e-5)


def test_map_keeps_the_nearest_cells():
    q, k, values = cells(2, 5, 16), cells(1, 9, 16), torch.randn(1, 9, 3)
    weights, index = selective_map(q, k, 3, sharpness=2.0)
    for b in range(2):
        for i in range(5):
            score = 2 * 2 * 4 * (k[0] @ q[b, i] - 1)
            best = score.argsort(descending=True)[:3]
            w = score[best].softmax(0)
            assert index[b, i].tolist() == best.tolist() and torch.allclose(weights[b, i], w, atol=1e-6)
            assert torch.allclose(read_values(values, weights, index)[b, i], w @ values[0, best], atol=1e-6)


def test_the_order_of_supports_does_not_matter():
    q, k, values = cells(1, 6, 32), cells(1, 40, 32), torch.randn(1, 40, 5)
    order = torch.randperm(40)
    first = read_values(values, *selective_map(q, k, 8))
    second = read_values(values[:, order], *selective_map(q, k[:, order], 8))
    assert torch.allclose(first, second, atol=1e-6)


@torch.no_grad()
def test_shapes():
    csm = ContextualSelectiveModule(32, 16, 16, depth=1, state=2, top_k=4)
    images, masks = torch.rand(3, 3, 64, 96), torch.zeros(3, 2, 64, 96)
    assert csm.encode(images, masks[:, 0]).shape == (3, 16, 4, 6)
    features = torch.randn(3, 32, 4, 6)
    masks[:, 1, :24, :8] = 1
    values = csm.aggregate(images, masks, features)
    assert values.shape == (3, 2, 33, 4, 6)
    share = torch.zeros(4, 6)
    share[0, 0], share[1, 0] = 0.5, 0.25  # 16 x 8 and 8 x 8 pixels of 16 x 16
    assert torch.equal(values[:, 1, -1], share.expand(3, -1, -1)) and not values[:, 0, -1].any()


def test_few_cells_of_a_small_object_are_all_kept():
    keys, shares = cells(1000, 16), torch.zeros(1000, 2)
    shares[:600, 0], shares[990:, 1] = 0.5, 1.0
    kept = choose_cells(keys, shares, 100)
    assert len(kept) == 100 and torch.equal(kept, kept.unique()) and torch.equal(kept, choose_cells(keys, shares, 100))
    assert (kept >= 990).sum() == 10 and (kept < 600).sum() == 40  # half show an object
    assert torch.equal(choose_cells(keys, shares, 1000), torch.arange(1000))
    # Where there is little background, objects may have more than half.
    shares[:990, 0] = 0.5
    assert len(choose_cells(keys, shares, 100)) == 100


def test_background_most_like_an_object_is_kept():
    keys, shares = cells(2000, 16), torch.zeros(2000, 1)
    shares[:20] = 1.0
    kept = choose_cells(keys, shares, 320)
    alike = (keys[20:] @ keys[:20].T).amax(1)
    nearest = set((alike.topk(200).indices + 20).tolist())  # two thirds of the 300 that are left
    assert nearest < set(kept.tolist()) and (kept < 20).sum() == 20
    # The rest is spread evenly, not taken from one end.
    rest = torch.tensor(sorted(set(kept.tolist()) - nearest - set(range(20))))
    assert len(rest) == 100 and 800 < rest.double().mean() < 1200


def test_thinning_without_any_object_draws_evenly():
    kept = choose_cells(cells(500, 16), torch.zeros(500, 1), 50)
    assert len(kept) == 50 and 150 < kept.double().mean() < 350


def test_what_looks_like_an_object_reads_the_same_from_the_kept_cells():
    keys, shares = cells(3000, 32), torch.zeros(3000, 1)
    shares[:30] = torch.rand(30, 1) + 0.01
    kept = choose_cells(keys, shares, 600)
    queries = nn.functional.normalize(keys[:30] + 0.02 * torch.randn(30, 32), dim=-1)[None]
    full = read_values(shares[None], *selective_map(queries, keys[None], 8, 4.0))
    few = read_values(shares[kept][None], *selective_map(queries, keys[kept][None], 8, 4.0))
    assert torch.allclose(full, few, atol=1e-6)
