"""Products by oneDNN against PyTorch's own, and where they are left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hspsam_monai.encoders import products
from hspsam_monai.encoders.layers import Pointwise, apply_linear, linear, pointwise
from hspsam_monai.encoders.lora import LoRALinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every product large enough, on this processor too, by oneDNN; the shapes it was given."""
    seen, real = [], products.linear

    def spy(x, *others):
        seen.append(tuple(x.shape))
        return real(x, *others)

    monkeypatch.setattr(products, "_preferred", lambda: True)
    monkeypatch.setattr(products, "_LEAST", 1000)
    monkeypatch.setattr(products, "linear", spy)
    return seen


def arguments(*shape: int, width: int = 48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    weight, bias = torch.randn(width, shape[-1], generator=generator), torch.randn(width, generator=generator)
    return x, weight, bias, torch.randn(*shape[:-1], width, generator=generator)


@pytest.mark.parametrize("shape", [(50, 32), (2, 7, 9, 32)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_are_those_of_the_plain_layer(calls, shape, with_bias):
    x, weight, bias, residual = arguments(*shape)
    bias = bias if with_bias else None
    before = residual.clone()
    plain = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for options, expected in (
        ({}, plain),
        ({"with_gelu": True}, F.gelu(plain)),
        ({"residual": residual}, plain + residual.double()),
        ({"residual": residual, "with_gelu": True}, F.gelu(plain) + residual.double()),
    ):
        torch.testing.assert_close(linear(x, weight, bias, **options).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, before)  # somebody else may still read it
    assert calls == [shape] * 4


def test_a_map_that_is_channels_last_stays_so(calls):
    x, weight, bias, residual = arguments(2, 6, 5, 32)
    x, residual = x.permute(0, 3, 1, 2), residual.permute(0, 3, 1, 2)
    weight = weight[:, :, None, None]
    torch.testing.assert_close(
        pointwise(x, weight, bias, residual=residual), F.conv2d(x, weight, bias) + residual, rtol=1e-5, atol=1e-5
    )
    with torch.no_grad():
        layer = Pointwise(32, 48)
        out = layer(x.contiguous(), with_gelu=True)  # channels first in memory
        torch.testing.assert_close(out, F.gelu(F.conv2d(x, layer.weight, layer.bias)), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 and out.is_contiguous(memory_format=torch.channels_last)


def test_modules_of_other_classes_compute_their_own_part(calls):
    x, _, _, residual = arguments(50, 32)
    plain = nn.Linear(32, 48)
    lora = LoRALinear(nn.Linear(32, 48), 4, [torch.arange(16)])
    nn.init.normal_(lora.lora_b[0])
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(32, 48)), {nn.Linear})[0]
    with torch.no_grad():
        for module, expected in ((plain, 1), (lora, 1), (quantised, 0)):
            calls.clear()
            torch.testing.assert_close(apply_linear(module, x, with_gelu=True), F.gelu(module(x)))
            torch.testing.assert_close(apply_linear(module, x, residual=residual), module(x) + residual)
            assert len(calls) >= expected
            assert bool(calls) == bool(expected)
        merged = F.linear(x, lora.merged_weight(), lora.bias)
        torch.testing.assert_close(lora(x), merged, rtol=1e-5, atol=1e-5)


def test_gradients_pass(calls):
    x, weight, bias, residual = arguments(50, 32)
    for options in ({"with_gelu": True}, {"residual": residual}):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        linear(*leaves, **options).square().sum().backward()
        assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert not calls
    with torch.no_grad():
        linear(*leaves)
    assert len(calls) == 1


def test_other_types_small_products_and_switched_off_stay_with_pytorch(calls, monkeypatch):
    x, weight, bias, _ = arguments(50, 32)
    linear(x.double(), weight.double(), bias.double())
    linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), with_gelu=True)
    linear(x[:0], weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, bias)
    monkeypatch.setattr(products, "_LEAST", 2**25)
    linear(x, weight, bias)
    monkeypatch.setattr(products, "_LEAST", 1000)
    monkeypatch.setattr(products, "_preferred", lambda: False)
    linear(x, weight, bias)
    assert not calls


def test_a_few_rows_times_a_large_weight_count_as_large(calls, monkeypatch):
    x, weight, bias, _ = arguments(3, 32)
    monkeypatch.setattr(products, "_LEAST", 2**25)
    monkeypatch.setattr(products, "_LEAST_WEIGHT", weight.numel())
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    linear(x[:0], weight, bias)
    linear(x, weight[:-1], bias[:-1])
    assert calls == [(3, 32)]


def test_what_is_traced_or_exported_holds_common_operators(calls):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 48)

        def forward(self, x):
            return apply_linear(self.inner, x, with_gelu=True)

    layer, x = Layer().eval(), torch.randn(50, 32)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert not calls
        assert "mkldnn" not in str(traced.inlined_graph) and "mkldnn" not in str(exported.graph)
        for rows in (x, torch.cat([x, x])):
            torch.testing.assert_close(exported.module()(rows), layer(rows), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize(("vendor", "expected"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_only_the_measured_processors_change_library(monkeypatch, tmp_path, vendor, expected):
    file = tmp_path / "cpuinfo"
    if vendor:
        file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: some\n")
    monkeypatch.setattr(products, "_CPUINFO", file)
    monkeypatch.delenv("PROCESSOR_IDENTIFIER", raising=False)
    assert products._preferred.__wrapped__() is expected
