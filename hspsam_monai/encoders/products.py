"""Which library multiplies matrices on a CPU, chosen by measurement.

PyTorch gives float32 products to MKL. On AMD's processors oneDNN, which PyTorch brings along for convolutions, is
faster (EPYC with AVX-512, PyTorch 2.13, rows x C x D, times as fast as MKL, two threads):

    1024 x 768 x 2304   1.36        16384 x  64 x 128   1.19
    4096 x 768 x 2304   1.14        16384 x 256 x  64   1.34
     256 x 768 x 2304   1.58         1024 x 160 x 640   1.04
      64 x 768 x  768   1.38          256 x 160 x 480   0.91
       5 x 256 x 2048   1.3             5 x 256 x 256   0.5

and it adds bias, GELU or a residual on the way, which saves passes over memory. Intel's processors were not measured:
there MKL stays. ``torch.backends.mkldnn.flags(enabled=False)`` turns oneDNN off.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hspsam_monai.encoders.constants import is_fake

#: Multiplications from which a product is worth the other library's call, or else numbers of its weight: with few rows,
#: what counts is reading it.
_LEAST, _LEAST_WEIGHT = 2**25, 2**19
_CPUINFO = Path("/proc/cpuinfo")


@cache
def _preferred() -> bool:
    """Whether oneDNN is there and this is one of AMD's x86 processors; unknown counts as no."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    told = os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows
    try:
        with _CPUINFO.open(encoding="utf-8") as file:
            told += next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        pass
    return "AuthenticAMD" in told


def suits(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Tell whether :func:`linear` can compute this product and is the faster one."""
    # What is traced or compiled must hold operators that every runtime knows, for any size.
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if is_fake(x):  # whoever only asks for shapes cannot run it
        return False
    large = x.numel() * weight.shape[0] >= _LEAST or weight.numel() >= _LEAST_WEIGHT
    if not large or not x.numel() or not _preferred():
        return False
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    if any(t.dtype is not torch.float32 or t.device.type != "cpu" for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, with_gelu: bool, residual: Tensor | None) -> Tensor:
    """See :func:`hspsam_monai.encoders.layers.linear`; by the operators TorchInductor emits for fused layers."""
    operator = torch.ops.mkldnn._linear_pointwise
    if residual is not None and not with_gelu:
        return operator.binary(x, residual, weight, bias, "add")
    y = operator(x, weight, bias, *(("gelu", [], "none") if with_gelu else ("none", [], "")))
    return y if residual is None else y.add_(residual)
