"""The decoder against a naive walk from deep to shallow, written from the paper's description on SAM's modules."""

import pytest
import torch
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.encoders import Level
from hspsam_monai.networks.hierarchical_decoder import HierarchicalDecoder

VIT = tuple(Level(48, 16, 48) for _ in range(4))
TINY = (Level(64, 4, None), Level(128, 8, 128), Level(160, 16, 160), Level(320, 16, 320))


@torch.no_grad()
def make(levels, classes, style, seed=0):
    torch.manual_seed(seed)
    prompted = [level.prompt_dim is not None for level in levels]
    decoder = HierarchicalDecoder(levels, classes, prompted, style).eval()
    decoder.no_mask.normal_()
    for name, parameter in decoder.named_parameters():
        if "norm" in name or "project" in name or name.endswith("bias") or ("upscale" in name and parameter.ndim == 1):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder


def sam_norm(ours):
    norm = LayerNorm2d(len(ours.weight))
    norm.load_state_dict(ours.state_dict())
    return norm


def inputs(levels, decoder, batch=2, size=(64, 96), prompts=3, per_image=False):
    features = [
        torch.randn(batch, level.channels, size[0] // level.stride, size[1] // level.stride) for level in levels
    ]
    if decoder.paper:
        features[-1] = torch.randn(batch, 256, size[0] // 16, size[1] // 16)
    shape = (batch, prompts) if per_image else (prompts,)
    answers = [None if level.prompt_dim is None else torch.randn(*shape, decoder.width) for level in levels]
    return features, answers


@pytest.mark.parametrize("classes", [2, 4])
@torch.no_grad()
def test_paper_style_equals_a_naive_walk(classes):
    decoder = make(VIT, classes, "paper")
    (f1, f2, f3, embedding), (a1, a2, a3, a4) = inputs(VIT, decoder)
    batch, _, h, w = embedding.shape
    pe = decoder.positions((h, w)).expand(batch, -1, -1, -1)

    def neck(index, x):
        one, norm_one, three, norm_three = decoder.necks[index]
        x = sam_norm(norm_one)(F.conv2d(x, one.weight))
        return sam_norm(norm_three)(F.conv2d(x, three.weight, padding=1))

    def talk(index, src, kept, answer):
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048).eval()
        transformer.load_state_dict(decoder.transformers[index].state_dict())
        tokens, keys = transformer(src, pe, torch.cat([kept, answer.expand(batch, -1, -1)], 1))
        return tokens[:, : 1 + classes], keys.transpose(1, 2).view(batch, 256, h, w)

    tokens = torch.cat([decoder.iou_token, decoder.mask_tokens]).expand(batch, -1, -1)
    tokens, src = talk(3, embedding + decoder.no_mask.view(1, 256, 1, 1), tokens, a4)
    tokens, src = talk(2, src + neck(2, f3), tokens, a3)
    tokens, src = talk(1, src + neck(1, f2), tokens, a2)
    tokens, src = talk(0, src + neck(0, f1), tokens, a1)
    up, convs = src, [layer for layer in decoder.upscale if isinstance(layer, nn.ConvTranspose2d)]
    norms = [layer for layer in decoder.upscale if hasattr(layer, "eps")]
    assert [conv.out_channels for conv in convs] == [64, 32, 16, 8] and len(norms) == 3
    for conv, norm in zip(convs, [*norms, None], strict=True):
        up = F.conv_transpose2d(up, conv.weight, conv.bias, stride=2)
        up = F.gelu(up if norm is None else sam_norm(norm)(up))
    masks = []
    for index, hyper in enumerate(decoder.hyper):
        first, _, second, _, third = hyper
        token = third(F.relu(second(F.relu(first(tokens[:, 1 + index])))))
        masks.append((token[:, :, None, None] * up).sum(1))
    expected = torch.stack(masks, 1)
    found = decoder([f1, f2, f3, embedding], [a1, a2, a3, a4], (64, 96))
    assert expected.shape == found.shape == (2, classes, 64, 96)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_slim_style_equals_a_naive_walk():
    decoder = make(TINY, 2, "slim")
    (f1, f2, f3, f4), (_, a2, a3, a4) = inputs(TINY, decoder)

    def neck(index, x):
        one, norm = decoder.necks[index]
        return sam_norm(norm)(F.conv2d(x, one.weight))

    def mix(index, x):
        block = decoder.mixers[index]
        y = F.gelu(block.expand(sam_norm(block.norm)(block.depthwise(x))))
        return x + block.project(y)

    def talk(index, src, kept, answer):
        pe = decoder.positions(src.shape[-2:]).expand(2, -1, -1, -1)
        tokens, keys = decoder.transformers[index](src, pe, torch.cat([kept, answer.expand(2, -1, -1)], 1))
        return tokens[:, :3], keys.transpose(1, 2).view_as(src)

    def finer(src):
        return F.interpolate(src, scale_factor=2, mode="bilinear")

    tokens = torch.cat([decoder.iou_token, decoder.mask_tokens]).expand(2, -1, -1)
    tokens, src = talk(3, mix(3, neck(3, f4) + decoder.no_mask.view(1, -1, 1, 1)), tokens, a4)
    tokens, src = talk(2, mix(2, src + neck(2, f3)), tokens, a3)
    tokens, src = talk(1, mix(1, finer(src) + neck(1, f2)), tokens, a2)
    src = mix(0, finer(decoder.narrow[0](src)) + neck(0, f1))  # 64 channels at stride 4, no transformer
    up = decoder.upscale(src)
    expected = torch.stack(
        [torch.einsum("bc,bchw->bhw", h(tokens[:, 1 + k]), up) for k, h in enumerate(decoder.hyper)], 1
    )
    found = decoder([f1, f2, f3, f4], [None, a2, a3, a4], (64, 96))
    torch.testing.assert_close(found, F.interpolate(expected, (64, 96), mode="bilinear"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", ["paper", "slim"])
@pytest.mark.parametrize("levels", [VIT, TINY])
@torch.no_grad()
def test_one_prompt_set_for_all_or_one_for_each_image(levels, style):
    decoder = make(levels, 2, style)
    features, shared = inputs(levels, decoder)
    own = [None if a is None else a.expand(2, -1, -1) for a in shared]
    assert torch.equal(decoder(features, shared, (64, 96)), decoder(features, own, (64, 96)))


@pytest.mark.parametrize(("levels", "style"), [(VIT, "paper"), (TINY, "slim")])
@torch.no_grad()
def test_every_level_and_every_prompt_counts(levels, style):
    decoder = make(levels, 2, style)
    features, answers = inputs(levels, decoder)
    whole = decoder(features, answers, (64, 96))
    for index in range(len(levels)):
        without = [torch.zeros_like(f) if i == index else f for i, f in enumerate(features)]
        assert not torch.equal(decoder(without, answers, (64, 96)), whole)
        if answers[index] is not None:
            silent = [None if i == index else a for i, a in enumerate(answers)]
            assert not torch.equal(decoder(features, silent, (64, 96)), whole)


def test_gradcheck(monkeypatch):
    """In float64: the decoder's two casts to float32 (positions, logits) are lifted for the test."""
    levels = (Level(3, 8, None), Level(4, 16, 4))
    decoder = make(levels, 2, "slim").double()
    decoder.positions.float().register_forward_hook(lambda *args: args[2].double())
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    features = [torch.randn(1, 3, 2, 2).double().requires_grad_(), torch.randn(1, 4, 1, 1).double().requires_grad_()]
    answer = torch.randn(1, 128).double().requires_grad_()

    def run(shallow, deep, answer):
        return decoder([shallow, deep], [None, answer], (8, 8))[:, :, ::3, ::3]

    assert torch.autograd.gradcheck(run, (*features, answer))
