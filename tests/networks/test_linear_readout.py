"""The linear readout against a ridge regression written out in NumPy, and what it must bear."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hspsam_monai.encoders import build_encoder
from hspsam_monai.networks.linear_readout import GAIN, ReadoutFit, read_out, readout_levels, readout_width

CHANNELS = ((6, 16), (5, 8))


def support(seed, objects=1, size=32):
    """Levels at two resolutions, and masks that a part of their channels shows."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(objects, size, size)
    for index in range(objects):
        row, column = torch.randint(2, size - 12, (2,), generator=generator).tolist()
        masks[index, row : row + 10, column : column + 9] = 1
    levels = []
    for channels, grid in CHANNELS:
        level = torch.randn(1, channels, grid, grid, generator=generator)
        level[0, :objects] += 3 * F.adaptive_avg_pool2d(masks[None], grid)[0]
        levels.append(level)
    return levels, masks


def fitted(supports):
    fit = ReadoutFit()
    for levels, masks in supports:
        fit.add(levels, masks)
    return fit.solve()


def cells_of(levels):
    """Unit cells (h w, D) at the finest grid, by NumPy and torch's resizing."""
    grid = levels[0].shape[-2:]
    parts = []
    for level in levels:
        x = level[0].double().numpy()
        x = torch.from_numpy(x / np.linalg.norm(x, axis=0, keepdims=True))[None]
        parts.append(F.interpolate(x, grid, mode="bilinear", align_corners=False)[0].flatten(1))
    return torch.cat(parts).T.numpy()


def ridge(cells, share, weight, spread):
    """Standardised features, weighted mean taken out, no clever sums: the textbook's way."""
    c = 0.3 * share / share.sum() + 0.7 * (1 - share) / (1 - share).sum()
    z = cells / spread
    center, level = c @ z, c @ share
    z = z - center
    w = np.linalg.solve(z.T @ (c[:, None] * z) + weight * np.eye(z.shape[1]), z.T @ (c * (share - level)))
    return w / spread, level - center @ w


@pytest.mark.parametrize("count", [1, 3, 5])
def test_rules_are_the_ridge_regression_with_the_best_threshold_of_supports_left_out(count):
    supports = [support(seed) for seed in range(count)]
    cells = [cells_of(levels) for levels, _ in supports]
    shares = [F.adaptive_avg_pool2d(masks[None], 16).flatten().double().numpy() for _, masks in supports]
    spread = np.concatenate(cells).std(axis=0)

    def solve(indices):
        return ridge(
            np.concatenate([cells[i] for i in indices]), np.concatenate([shares[i] for i in indices]), 1 / count, spread
        )

    threshold = -0.2
    if count > 1:
        levels, dice = np.arange(-8, 9) * 0.05, np.zeros(17)
        for i in range(count):
            w, b = solve([j for j in range(count) if j != i])
            said = torch.from_numpy(cells[i] @ w + b - 0.5).view(1, 1, 16, 16)
            said = F.interpolate(said, (32, 32), mode="bilinear", align_corners=False).numpy()[0, 0]
            truth = supports[i][1][0].numpy()
            for k, level in enumerate(levels):
                found = said > level
                dice[k] += 2 * (found * truth).sum() / (found.sum() + truth.sum())
        prior = -0.2 / count**0.5  # counts as four supports
        threshold = (count * levels[dice.argmax()] + 4 * prior) / (count + 4)
    w, b = solve(range(count))
    target, _ = support(99)
    expected = GAIN * (cells_of(target) @ w + b - 0.5 - threshold)
    logits = read_out(target, fitted(supports)[None])
    assert logits.shape == (1, 1, 16, 16) and logits.dtype == torch.float32
    assert np.allclose(logits.flatten().numpy(), expected, atol=2e-4)


def test_copies_of_a_support_are_left_out_together():
    one, two = support(0), support(1)
    rules = fitted([one])
    for copies in (2, 5, 40):  # one alone, whose threshold is the constant's
        assert torch.allclose(fitted([one] * copies), rules, atol=1e-3)
    # Among others the threshold is as if it had been given once; the rule itself may lean towards it.
    thresholds = []
    for supports in ((one, two), (one, two, one, two)):
        fit = ReadoutFit()
        for levels, masks in supports:
            fit.add(levels, masks)
        penalty = torch.full((12,), 0.05, dtype=torch.float64)
        thresholds.append(fit._thresholds(penalty))
    assert torch.equal(*thresholds)


def test_objects_do_not_see_each_other_and_order_is_nothing():
    supports = [support(seed, objects=2) for seed in range(4)]
    rules = fitted(supports)
    assert torch.allclose(fitted(supports[::-1]), rules, atol=1e-3)
    for index in range(2):
        alone = fitted([(levels, masks[index, None]) for levels, masks in supports])
        assert torch.allclose(alone[0], rules[index], atol=1e-4)


def test_it_finds_what_its_supports_show_and_more_supports_find_it_better():
    def dice(count):
        rules = fitted([support(seed) for seed in range(count)])
        found = []
        for seed in range(50, 58):
            levels, masks = support(seed)
            said = F.interpolate(read_out(levels, rules[None]), (32, 32), mode="bilinear", align_corners=False)[0] > 0
            found.append(2 * (said * masks).sum() / (said.sum() + masks.sum()))
        return torch.stack(found).mean().item()

    assert dice(1) < dice(8) and dice(8) > 0.8


def test_a_rule_for_each_target_of_a_batch():
    first, second = (fitted([support(seed)]) for seed in (0, 1))
    (a, _), (b, _) = support(5), support(6)
    both = read_out([torch.cat(pair) for pair in zip(a, b, strict=True)], torch.stack([first, second]))
    assert torch.allclose(both[:1], read_out(a, first[None]), atol=1e-5)
    assert torch.allclose(both[1:], read_out(b, second[None]), atol=1e-5)


def test_what_no_support_shows_is_nowhere_and_blank_supports_are_borne():
    levels, masks = support(0, objects=2)
    masks[1] = 0
    said = read_out(levels, fitted([(levels, masks), (levels, masks)])[None])
    assert (said[:, 1] < 0).all() and (said[:, 0] > 0).any()
    blank = [torch.ones_like(level) for level in levels]
    assert read_out(levels, fitted([(blank, masks)])[None]).isfinite().all()
    everything = fitted([(levels, torch.ones_like(masks))])
    assert everything.isfinite().all() and (read_out(levels, everything[None]) > 0).all()
    # Flat pictures, and all but a few pixels of a cell: what is left for the background is smaller than its rounding.
    for flat in (0.0, 1.0):
        for left in (1, 2, 4):
            dark, whole = [torch.full_like(level, flat) for level in levels], torch.ones_like(masks)
            whole[:, 0, :left] = 0
            for supports in ([(levels, masks), (dark, whole)], [(dark, whole)], [(dark, whole), (levels, whole)]):
                assert read_out(levels, fitted(supports)[None]).isfinite().all()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_rules(precision):
    supports = [support(seed) for seed in range(3)]
    target, _ = support(9)
    expected = read_out(target, fitted(supports)[None])
    with torch.autocast("cpu", precision):
        assert torch.equal(read_out(target, fitted(supports)[None]), expected)


@pytest.mark.parametrize("name", ["mobile_sam", "lite_medsam"])
@torch.no_grad()
def test_width_is_that_of_the_maps(name):
    encoder = build_encoder(name, image_size=64).eval()
    levels = readout_levels(encoder, encoder(torch.rand(1, 3, 64, 64)))
    assert readout_width(encoder) == sum(level.shape[1] for level in levels) + 1
    assert levels[0].shape[-1] == max(level.shape[-1] for level in levels)
