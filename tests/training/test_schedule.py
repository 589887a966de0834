"""Optimiser groups and the warm-up/polynomial schedule."""

from itertools import pairwise

import pytest
import torch

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks import HSPSAM, SAMSP, ConvPyramidSAM, ProxyPrompt
from hspsam_monai.training import parameter_groups, warmup_poly

NETWORKS = {
    "full": lambda: HSPSAM("mobile_sam", 64, decoder="slim", adapt="full"),
    "lora": lambda: HSPSAM("mobile_sam", 64, decoder="paper", adapt="lora"),
    "frozen": lambda: HSPSAM("mobile_sam", 64, decoder="slim", adapt="frozen"),
    "peer": lambda: ConvPyramidSAM("mobile_sam", 64),
    "sam-sp": lambda: SAMSP("mobile_sam", 64, num_classes=3),
    "proxy": lambda: ProxyPrompt("mobile_sam", 64, value_width=16, mamba_depth=1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_trained_parameter_stands_in_one_group(name):
    network = NETWORKS[name]()
    groups = parameter_groups(network, 1e-3, 0.5, 0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in network.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", NETWORKS)
def test_decay_on_matrices_only_and_the_encoder_at_its_own_rate(name):
    network = NETWORKS[name]()
    place = {id(p): group for group in parameter_groups(network, 1e-3, 0.5, 0.1) for p in group["params"]}
    for key, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        group = place[id(parameter)]
        pretrained = key.startswith("encoder.") and "lora_" not in key
        assert group["lr"] == (5e-4 if pretrained else 1e-3), key
        # SAM's tokens and points are tables.
        owner = key.split(".")[-2] if "." in key else ""
        table = owner in ("iou_token", "mask_tokens", "not_a_point_embed", "no_mask_embed") or "point_embeddings" in key
        matrix = key.endswith(".weight") and parameter.ndim > 1 and not table
        assert group["weight_decay"] == (0.1 if matrix or "lora_" in key else 0.0), key


def test_positions_and_tokens_are_not_matrices():
    network = torch.nn.Module()
    network.encoder = torch.nn.Module()
    for key in ("pos_embed", "rel_pos_h", "attention_biases"):
        network.encoder.register_parameter(key, torch.nn.Parameter(torch.zeros(2, 3)))
    network.iou_token = torch.nn.Parameter(torch.zeros(1, 3))
    network.mask_tokens = torch.nn.Parameter(torch.zeros(2, 3))
    assert all(group["weight_decay"] == 0 for group in parameter_groups(network, 1e-3))


def test_a_parallel_wrapper_is_looked_through():
    network = NETWORKS["frozen"]()
    wrapper = torch.nn.Module()
    wrapper.module = network
    assert sum(len(g["params"]) for g in parameter_groups(wrapper, 1.0)) == sum(
        p.requires_grad for p in network.parameters()
    )


def test_nothing_to_train_is_named():
    with pytest.raises(ConfigError, match="No parameter"):
        parameter_groups(NETWORKS["full"]().requires_grad_(False), 1e-3)


def rates(total, warmup, power, base=(1.0, 0.25)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base]
    optimizer = torch.optim.SGD(groups)
    schedule = warmup_poly(optimizer, total, warmup, power)
    values = []
    for _ in range(total + 3):
        values.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return values


def test_the_papers_values():
    values = [first for first, _ in rates(4000, 250, 5.0)]
    assert values[0] == pytest.approx(1 / 250) and values[124] == pytest.approx(0.5)
    assert values[249] == values[250] == 1.0
    assert values[2125] == pytest.approx(0.5**5)  # half of the way from 250 to 4000
    assert values[3999] > 0 and values[4000:] == [0.0] * 3
    assert all(a > b for a, b in pairwise(values[250:4001]))


def test_groups_keep_their_ratio():
    assert all(second == pytest.approx(first / 4) for first, second in rates(100, 5, 2.0))


@pytest.mark.parametrize("total", [5, 30, 1000])
def test_a_short_run_warms_up_over_a_tenth(total):
    values = [first for first, _ in rates(total, 250, 2.0)]
    peak = max(1, min(250, total // 10)) - 1
    assert values[peak] == 1.0 == max(values) and all(v < 1 for v in values[:peak]) and values[total] == 0.0
