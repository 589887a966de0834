"""The selective scan against the recurrence it computes, in value and gradient; the blocks made of it."""

import pytest
import torch

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.selective_scan import CHUNK, PIECE, SelectiveSSM, VisionMambaBlock, _Scan, selective_scan


def naive(x, delta, a, b, c, d=None):
    """The recurrence, one token after the other."""
    h, ys = x.new_zeros(x.shape[0], *a.shape), []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        ys.append((h * c[:, t, None]).sum(-1))
    y = torch.stack(ys, 1)
    return y if d is None else y + d * x


def arguments(batch, length, width, state, dtype=torch.float64, steps=1.0):
    x, b, c = torch.randn(batch, length, width), torch.randn(batch, length, state), torch.randn(batch, length, state)
    delta = torch.nn.functional.softplus(torch.randn(batch, length, width) - 2) * steps
    a = -torch.arange(1.0, state + 1).repeat(width, 1) * (0.5 + torch.rand(width, 1))
    return [t.to(dtype) for t in (x, delta, a, b, c, torch.randn(width))]


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("length", [1, 2, PIECE - 1, PIECE, 100, CHUNK, CHUNK + 1, 2 * CHUNK + 37])
@pytest.mark.parametrize("steps", [0.01, 1.0])
def test_equals_the_recurrence(length, steps):
    parts = arguments(2, length, 5, 4, torch.float32, steps)
    expected = naive(*(p.double() for p in parts))
    assert relative(selective_scan(*parts), expected) < 1e-6
    assert relative(selective_scan(*(p.double() for p in parts)), expected) < 1e-13
    assert relative(selective_scan(*parts[:5]), naive(*(p.double() for p in parts[:5]))) < 1e-6


@pytest.mark.parametrize("steps", [1e-6, 1e4])
def test_nothing_overflows_over_long_sequences(steps):
    parts = arguments(1, 4096, 2, 2, torch.float32, steps)
    for p in parts:
        p.requires_grad_(True)
    y = selective_scan(*parts)
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in parts)
    assert relative(y.detach(), naive(*(p.detach().double() for p in parts))) < 1e-6


def test_gradients(monkeypatch):
    monkeypatch.setattr("hspsam_monai.networks.selective_scan.CHUNK", 8)
    monkeypatch.setattr("hspsam_monai.networks.selective_scan.PIECE", 4)
    parts = [p.requires_grad_(True) for p in arguments(2, 19, 2, 3)]
    assert torch.autograd.gradcheck(selective_scan, parts)


def test_gradients_of_full_chunks_equal_the_recurrences():
    parts = [p.requires_grad_(True) for p in arguments(1, CHUNK + 45, 3, 2)]
    weight = torch.randn(1, CHUNK + 45, 3, dtype=torch.float64)
    found = torch.autograd.grad((selective_scan(*parts) * weight).sum(), parts)
    expected = torch.autograd.grad((naive(*parts) * weight).sum(), parts)
    assert all(relative(f, e) < 1e-12 for f, e in zip(found, expected, strict=True))


def test_half_precision_computes_in_float32():
    parts = arguments(1, 50, 4, 4, torch.bfloat16)
    y = selective_scan(*parts)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, selective_scan(*(p.float() for p in parts)).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert selective_scan(*(p.float() for p in parts)).dtype == torch.float32


def test_what_is_kept_for_backward_is_linear_in_length():
    def kept(length):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            parts = [p.requires_grad_(True) for p in arguments(1, length, 8, 16, torch.float32)[:5]]
            _Scan.apply(*parts)
        return sum(sizes)

    small, large = kept(4 * CHUNK), kept(16 * CHUNK)
    assert large <= 4.01 * small
    assert large < 16 * CHUNK * 8 * 16  # less than the states of all tokens


def test_shapes_that_disagree_are_refused():
    x, delta, a, b, c, _ = arguments(1, 4, 3, 2)
    with pytest.raises(ConfigError, match=r"expected \(B, L, D\)"):
        selective_scan(x, delta, a, b[:, :3], c)
    with pytest.raises(ConfigError, match="L >= 1"):
        selective_scan(x[:, :0], delta[:, :0], a, b[:, :0], c[:, :0])


def test_one_direction_is_causal_and_a_block_sees_everything():
    tokens = torch.randn(1, 20, 32)
    changed = tokens.clone()
    changed[0, 10] += 1
    ssm, block = SelectiveSSM(32).double(), VisionMambaBlock(32).double()
    difference = (ssm(tokens.double()) - ssm(changed.double())).abs().amax(-1)[0]
    assert not difference[:10].any() and difference[10:].all()
    difference = (block(tokens.double()) - block(changed.double())).abs().amax(-1)[0]
    assert difference.all()


def test_every_parameter_of_a_block_learns():
    block = VisionMambaBlock(32, state=4, expand=2)
    block(torch.randn(2, 9, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.gpu
def test_gpu_equals_cpu():
    parts = arguments(2, CHUNK + 45, 5, 4, torch.float32)
    assert relative(selective_scan(*(p.cuda() for p in parts)).cpu(), naive(*(p.double() for p in parts))) < 1e-6
