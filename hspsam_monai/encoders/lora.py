"""Low-rank adaptation (LoRA) of the query and value projections inside a fused qkv layer.

W' = W + s * B A on the rows of q and of v only. The module keeps ``weight`` and ``bias`` under their own names,
so official weights load unchanged, and :func:`merge_lora` turns it back into a plain ``nn.Linear``.
Reference: Hu et al., LoRA, arXiv 2106.09685; rank 32 and scale 1 are HSP-SAM's values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hspsam_monai.encoders.constants import Constants, KeepsConstants
from hspsam_monai.encoders.layers import linear
from hspsam_monai.errors import ConfigError


class LoRALinear(KeepsConstants, nn.Linear):
    """A linear layer with low-rank updates on chosen output rows.

    Args:
        linear: the layer to adapt; its parameters are shared, not copied.
        rank: r of every update, >= 1.
        rows: one index tensor per update, the output rows it acts on (for example q's rows, v's rows).
        scale: factor s of the updates.

    ``lora_a[i]`` (r, in) starts Kaiming-uniform with a = sqrt(5), ``lora_b[i]`` (rows_i, r) zero, so the layer
    equals the original until it is trained. Cost: rows * r * in multiplications per call, independent of tokens.
    """

    def __init__(self, linear: nn.Linear, rank: int, rows: list[Tensor], scale: float = 1.0) -> None:
        nn.Module.__init__(self)
        if rank < 1:
            raise ConfigError(f"LoRA rank is {rank}; expected at least 1 (0 means: do not apply LoRA).")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale = rank, scale
        self._constants = Constants()
        self.lora_a = nn.ParameterList(nn.Parameter(torch.empty(rank, self.in_features)) for _ in rows)
        self.lora_b = nn.ParameterList(nn.Parameter(torch.zeros(len(r), rank)) for r in rows)
        for a in self.lora_a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        for index, r in enumerate(rows):
            self.register_buffer(f"rows_{index}", r.clone(), persistent=False)

    def merged_weight(self) -> Tensor:
        """W + s * B A, shape (out, in), differentiable in A and B."""
        weight = self.weight
        for index, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            weight = weight.index_add(0, getattr(self, f"rows_{index}"), self.scale * (b @ a).to(weight.dtype))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        sources = [self.weight, *self.lora_a, *self.lora_b]
        return linear(x, self._constants.get("merged", sources, self.merged_weight), self.bias)


def apply_lora(module: nn.Module, rank: int, qv_rows: Callable[[nn.Module], list[Tensor]]) -> int:
    """Replace the ``qkv`` layer of every attention inside ``module`` by a :class:`LoRALinear`.

    Args:
        module: any module; each child with an ``nn.Linear`` called ``qkv`` is adapted.
        rank: r, >= 1.
        qv_rows: given the attention module, the rows of q and of v in its fused projection.

    Returns:
        The number of layers adapted.
    """
    count = 0
    for attention in list(module.modules()):
        qkv = getattr(attention, "qkv", None)
        if isinstance(qkv, nn.Linear) and not isinstance(qkv, LoRALinear):
            attention.qkv = LoRALinear(qkv, rank, qv_rows(attention))
            count += 1
    return count


@torch.no_grad()
def merge_lora(module: nn.Module) -> int:
    """Fold every LoRA update inside ``module`` into its weight and leave plain ``nn.Linear`` layers.

    Returns:
        The number of layers merged; afterwards nothing of LoRA remains in modules or state dict.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                # Built on the meta device: no random numbers are drawn, so a later run stays reproducible.
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                plain.weight = nn.Parameter(child.merged_weight().clone(), requires_grad=child.weight.requires_grad)
                plain.bias = child.bias
                setattr(parent, name, plain)
                count += 1
    return count
