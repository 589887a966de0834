"""The folded two-way transformer against segment_anything's own, value by value and gradient by gradient."""

import pytest
import torch
from segment_anything.modeling.transformer import TwoWayTransformer

from hspsam_monai.networks.two_way import two_way


def make(width=64, heads=4, seed=0):
    torch.manual_seed(seed)
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, num_heads=heads, mlp_dim=96).double().eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # biases start at zero, norms at one
    return transformer


def inputs(batch=2, tokens=5, h=6, w=7, width=64):
    image = torch.randn(batch, width, h, w, dtype=torch.float64)
    position = torch.randn(1, width, h, w, dtype=torch.float64)
    return image, position, torch.randn(batch, tokens, width, dtype=torch.float64)


def cells(x):
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 5, 16, 40])  # 16 tokens of 4 heads are the width: the last that folds
def test_equals_the_original(tokens):
    transformer = make()
    image, position, points = inputs(tokens=tokens)
    expected = transformer(image, position.expand(2, -1, -1, -1), points)
    result = two_way(transformer, cells(image), cells(position), points)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_equal_the_originals():
    image, position, points = inputs()
    gradients = []
    for folded in (True, False):
        transformer = make()
        x, t = image.clone().requires_grad_(), points.clone().requires_grad_()
        if folded:
            queries, keys = two_way(transformer, cells(x), cells(position), t)
        else:
            queries, keys = transformer(x, position.expand(2, -1, -1, -1), t)
        (queries.sin().sum() + keys.cos().sum()).backward()
        gradients.append([x.grad, t.grad, *(p.grad for p in transformer.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tokens", [4, 30])
def test_an_absent_token_changes_nothing(tokens):
    transformer = make()
    image, position, points = inputs(tokens=tokens)
    few = two_way(transformer, cells(image), cells(position), points[:, :-1])
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[:, -1] = False
    many = two_way(transformer, cells(image), cells(position), points, valid)
    torch.testing.assert_close(many[0][:, :-1], few[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(many[1], few[1], rtol=1e-9, atol=1e-9)


def test_inputs_are_left_as_they_were():
    transformer = make()
    image, position, points = (x.clone() for x in inputs())
    before = [x.clone() for x in (image, position, points)]
    with torch.inference_mode():
        two_way(transformer, cells(image), cells(position), points)
    assert all(torch.equal(a, b) for a, b in zip((image, position, points), before, strict=True))


def test_half_precision_stays_close():
    transformer = make().float()
    image, position, points = (x.float() for x in inputs())
    expected = transformer(image, position.expand(2, -1, -1, -1), points)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        result = two_way(transformer, cells(image), cells(position), points)
    for ours, theirs in zip(result, expected, strict=True):
        cosine = torch.nn.functional.cosine_similarity(ours.float().flatten(), theirs.flatten(), dim=0)
        assert cosine > 0.999
