"""TinyViT with prompts against naive attention, and its LoRA."""

import pytest
import torch

from hspsam_monai.encoders import TinyViT
from hspsam_monai.encoders.lora import LoRALinear, merge_lora
from tests.encoders.tiny_vit_reference import DIMS, make, naive, relative


@pytest.fixture(scope="module")
def encoder():
    return make()


# -- prompts


@pytest.mark.parametrize("shape", [(256, 256), (64, 224), (96, 160)])
@pytest.mark.parametrize("return_tokens", [False, True])
@torch.no_grad()
def test_prompts_equal_naive_attention(shape, return_tokens):
    encoder = make(return_tokens=return_tokens)
    image = torch.rand(2, 3, *shape)
    prompts = [None, *(torch.randn(count, dim) for count, dim in zip((1, 3, 8), DIMS, strict=True))]
    levels, embedding, tokens = naive(encoder, image, prompts)
    features = encoder(image, prompts)
    for found, expected in zip(features.levels, levels, strict=True):
        assert relative(found, expected) <= 1e-5
    assert relative(features.embedding, embedding) <= 1e-5
    if return_tokens:
        assert features.tokens[0] is None
        for found, expected in zip(features.tokens[1:], tokens[1:], strict=True):
            assert relative(found, expected) <= 1e-5
    else:
        assert features.tokens == [None] * 4


@torch.no_grad()
def test_lite_medsam_prompts_equal_naive_attention():
    encoder = make(64, variant="lite_medsam", return_tokens=True)
    image = torch.rand(1, 3, 32, 64)
    prompts = [None, *(torch.randn(2, dim) for dim in DIMS)]
    _, embedding, tokens = naive(encoder, image, prompts)
    features = encoder(image, prompts)
    assert relative(features.embedding, embedding) <= 1e-5
    assert all(relative(a, b) <= 1e-5 for a, b in zip(features.tokens[1:], tokens[1:], strict=True))


@torch.no_grad()
def test_no_prompts_is_the_official_encoder_exactly(encoder):
    image = torch.rand(1, 3, 96, 96)
    without, empty = encoder(image), encoder(image, [None] * 4)
    assert torch.equal(without.embedding, empty.embedding)
    assert all(torch.equal(a, b) for a, b in zip(without.levels, empty.levels, strict=True))
    assert without.tokens == [None] * 4


@torch.no_grad()
def test_single_levels_may_go_without_prompts():
    encoder = make(64, return_tokens=True)
    tokens = encoder(torch.rand(2, 3, 64, 64), [None, None, torch.randn(5, 160), None]).tokens
    assert [None if rows is None else tuple(rows.shape) for rows in tokens] == [None, None, (2, 5, 160), None]


@pytest.mark.parametrize("return_tokens", [False, True])
def test_prompts_change_the_output_and_receive_gradients(return_tokens):
    encoder = make(64, return_tokens=return_tokens)
    image = torch.rand(1, 3, 64, 64)
    prompts = [None, *(torch.randn(2, dim, requires_grad=True) for dim in DIMS)]
    features = encoder(image, prompts)
    assert relative(features.embedding.detach(), encoder(image).embedding.detach()) > 1e-3
    features.embedding[:, ::2].sum().backward()  # the sum over all channels is constant after the layer norm
    assert all(prompt.grad.abs().max() > 1e-4 for prompt in prompts[1:])


@torch.no_grad()
def test_attended_tokens_depend_on_the_image():
    encoder = make(64, return_tokens=True)
    prompts = [None, *(torch.randn(2, dim) for dim in DIMS)]
    tokens = encoder(torch.rand(2, 3, 64, 64), prompts).tokens
    assert all(relative(rows[0], rows[1]) > 1e-3 for rows in tokens[1:])


# -- LoRA


@pytest.fixture
def adapted(encoder):
    """An encoder with LoRA, equal to ``encoder`` otherwise."""
    torch.manual_seed(5)
    adapted = TinyViT(256, lora_rank=4).eval()
    adapted.load_state_dict(encoder.state_dict(), strict=False)
    return adapted


@torch.no_grad()
def train(module):
    for name, parameter in module.named_parameters():
        if "lora_b" in name:
            parameter.normal_(0, 0.1)


@torch.no_grad()
def test_lora_starts_as_the_identity(encoder, adapted):
    image = torch.rand(1, 3, 96, 96)
    assert torch.equal(adapted(image).embedding, encoder(image).embedding)
    assert sum(isinstance(module, LoRALinear) for module in adapted.modules()) == 10


@torch.no_grad()
def test_lora_acts_on_q_and_v_alone(adapted):
    train(adapted)
    for module in adapted.modules():
        if isinstance(getattr(module, "qkv", None), LoRALinear):
            change = (module.qkv.merged_weight() - module.qkv.weight).abs()
            change = change.view(module.num_heads, 3, module.key_dim, -1).amax(3)  # head by head: q, k, v
            assert (change[:, 0] > 0).all() and (change[:, 2] > 0).all() and not change[:, 1].any()


@torch.no_grad()
def test_merged_lora_has_official_names_and_equal_output(encoder, adapted):
    train(adapted)
    image = torch.rand(1, 3, 96, 96)
    before = adapted(image).embedding
    assert relative(before, encoder(image).embedding) > 1e-3
    assert merge_lora(adapted) == 10
    assert set(adapted.state_dict()) == set(encoder.state_dict())
    assert relative(adapted(image).embedding, before) <= 1e-6
