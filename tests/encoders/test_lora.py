"""LoRA: equals the base at first, trains, merges back into official names."""

import pytest
import torch
from torch import nn

from hspsam_monai.encoders import sam_vit
from hspsam_monai.encoders.lora import LoRALinear, apply_lora, merge_lora
from hspsam_monai.encoders.sam_vit import SamViT, Variant
from hspsam_monai.encoders.state_files import write_state
from hspsam_monai.encoders.weights import load_network
from hspsam_monai.errors import ConfigError, WeightsError


@pytest.fixture
def pair(monkeypatch):
    """A small encoder without and one with LoRA, otherwise equal."""
    monkeypatch.setitem(sam_vit.VARIANTS, "small", Variant(48, 5, 3, (1, 2, 3, 4)))
    torch.manual_seed(0)
    plain, adapted = SamViT("small", 64), SamViT("small", 64, lora_rank=4)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    return plain, adapted


def loss(features):
    """Not a mean or a square: those are constant after the neck's LayerNorm."""
    return features.embedding[:, ::2].mean() + features.levels[0][:, ::2].mean()


def train(encoder, steps=5):
    """A few steps on the LoRA parameters alone."""
    lora = [p for name, p in encoder.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(lora, lr=1.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(encoder(torch.rand(1, 3, 64, 64, generator=generator))).backward()
        optimizer.step()


def test_starts_as_the_base_exactly(pair):
    plain, adapted = pair
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(adapted(image).embedding, plain(image).embedding)
    assert sum(isinstance(m, LoRALinear) for m in adapted.modules()) == 5


def test_merged_equals_unmerged_with_official_names(pair):
    plain, adapted = pair
    train(adapted)
    image = torch.rand(1, 3, 64, 64)
    unmerged = adapted(image).embedding
    assert (unmerged - plain(image).embedding).abs().max() > 1e-3
    assert merge_lora(adapted) == 5
    merged = adapted(image).embedding
    assert (merged - unmerged).abs().max() <= 1e-6 * unmerged.abs().max()
    assert set(adapted.state_dict()) == set(plain.state_dict())
    assert not any(isinstance(m, LoRALinear) for m in adapted.modules())


def test_weights_without_updates_undo_the_trained_ones(pair, tmp_path):
    """An official file behind a trained network is that file's encoder, not it plus what was trained on another."""
    plain, adapted = pair
    train(adapted)
    image = torch.rand(1, 3, 64, 64)
    write_state(tmp_path / "plain.pt", plain.state_dict())
    report = load_network(adapted, tmp_path / "plain.pt")
    assert torch.equal(adapted(image).embedding, plain(image).embedding) and len(report.missing) == 5 * 4
    part = {key: value for key, value in adapted.state_dict().items() if "lora_a" not in key}
    write_state(tmp_path / "part.pt", part)
    with pytest.raises(WeightsError, match="lacks 10 keys"):
        load_network(adapted, tmp_path / "part.pt")


def test_only_q_and_v_change(pair):
    _, adapted = pair
    train(adapted)
    layer = adapted.blocks[0].attn.qkv
    change = (layer.merged_weight() - layer.weight).abs().amax(1)
    assert change[:48].max() > 0 and change[96:].max() > 0
    assert change[48:96].max() == 0


def test_every_lora_parameter_gets_a_gradient(pair):
    _, adapted = pair
    train(adapted, steps=1)  # the first step moves B away from zero, so that A gets gradients too
    loss(adapted(torch.rand(1, 3, 64, 64))).backward()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradcheck():
    layer = LoRALinear(nn.Linear(4, 6), 2, [torch.arange(2), torch.arange(4, 6)], scale=0.5).double()
    torch.nn.init.normal_(layer.lora_b[0])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.lora_a, *layer.lora_b))


def test_bad_rank_is_named():
    with pytest.raises(ConfigError, match="rank is 0"):
        LoRALinear(nn.Linear(4, 4), 0, [torch.arange(4)])


def test_applying_twice_adapts_once():
    module = nn.Module()
    module.qkv = nn.Linear(4, 12)
    assert apply_lora(module, 2, lambda m: [torch.arange(4)]) == 1
    assert apply_lora(module, 2, lambda m: [torch.arange(4)]) == 0
