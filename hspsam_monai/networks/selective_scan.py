"""Selective state-space scan (Mamba's S6) in plain PyTorch, and the Vision Mamba block made of two of them.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,    y_t = C_t h_t + D x_t

The sequence is walked chunk by chunk; only the state at each chunk's start is kept, and the backward pass computes a
chunk's states again. So time and memory grow linearly with the length, and the (L, D, S) states never exist at once.
A chunk is cut into pieces that advance side by side and are joined by the products of their decays. Nothing is ever
divided by a decay and every exponent is negative: nothing overflows, whatever the length.

References: Mamba, arXiv 2312.00752, equations 2-4 and algorithm 2; Vision Mamba, arXiv 2401.09417, algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hspsam_monai.errors import ConfigError

#: Tokens walked at once, and tokens of each piece inside: 16 pieces advance side by side. Speed only, no result.
CHUNK, PIECE = 256, 16

#: Mamba's own start: step sizes spread evenly in log scale over this range.
STEP_RANGE = (1e-3, 1e-1)


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None) -> Tensor:
    """Run the scan, differentiable (once) in every argument.

    Args:
        x: (B, L, D) input, any L >= 1.
        delta: (B, L, D) step sizes, positive (softplus has been applied).
        a: (D, S) decay rates, negative.
        b: (B, L, S) what of the input enters the state.
        c: (B, L, S) what of the state is read.
        d: (D,) weight of the input in the output; ``None`` for 0.

    Returns:
        (B, L, D) in the type of ``x``. The state is float64 where ``x`` is, else float32, also under autocast.

    Raises:
        ConfigError: shapes that disagree.

    Cost: O(B L D S) time; O(B L D) memory beyond the arguments, in training as well.
    """
    batch, length, width, states = *x.shape, a.shape[-1]
    token = (batch, length, states)
    shapes = [tuple(t.shape) for t in (delta, a, b, c)]
    if shapes != [tuple(x.shape), (width, states), token, token] or not length:
        raise ConfigError(
            f"selective_scan got x {tuple(x.shape)} with delta, A, B, C of shapes {shapes}; expected (B, L, D) with "
            "(B, L, D), (D, S), (B, L, S), (B, L, S) and L >= 1."
        )
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        y = _Scan.apply(*(t.to(dtype) for t in (x, delta, a, b, c)))
        if d is not None:
            y = y + d.to(dtype) * x.to(dtype)
    return y.to(x.dtype)


class _Scan(torch.autograd.Function):
    """The scan without D; backward runs the adjoint recurrence g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], *a.shape)
        starts, outputs = [], []
        for part in _chunks(x.shape[1]):
            starts.append(state)
            decay = torch.exp(delta[:, part, :, None] * a)
            states = _advance(decay, (delta[:, part] * x[:, part])[..., None] * b[:, part, None], state)
            outputs.append((states @ c[:, part, :, None])[..., 0])
            state = states[:, -1].clone()  # a view would keep the whole chunk
        ctx.save_for_backward(x, delta, a, b, c, torch.stack(starts))
        return torch.cat(outputs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, delta, a, b, c, starts = ctx.saved_tensors
        dx, ddelta, db, dc = (torch.empty_like(t) for t in (x, delta, b, c))
        da, later = torch.zeros_like(a), torch.zeros_like(starts[0])
        for part, start in reversed(list(zip(_chunks(x.shape[1]), starts, strict=True))):
            step, given = delta[:, part], dy[:, part, :, None]
            decay = torch.exp(step[..., None] * a)
            driven = step * x[:, part]
            states = _advance(decay.clone(), driven[..., None] * b[:, part, None], start)
            # Backwards in time, token t is reached through the decay of t + 1; later chunks enter at the last token.
            reversed_decay = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1).flip(1)
            g = _advance(reversed_decay, (given * c[:, part, None]).flip(1), later).flip(1)
            later = decay[:, 0] * g[:, 0]
            dc[:, part] = (states.transpose(2, 3) @ given)[..., 0]
            db[:, part] = (g.transpose(2, 3) @ driven[..., None])[..., 0]
            dinput = (g @ b[:, part, :, None])[..., 0]
            before = torch.cat([start[:, None], states[:, :-1]], dim=1)
            drate = g * decay * before  # gradient of the exponent delta A
            da += (drate * step[..., None]).sum((0, 1))
            ddelta[:, part] = (drate * a).sum(-1) + dinput * x[:, part]
            dx[:, part] = dinput * step
        return dx, ddelta, da, db, dc


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _advance(decay: Tensor, drive: Tensor, start: Tensor) -> Tensor:
    """States h_t = decay_t h_{t-1} + drive_t of one chunk.

    Args:
        decay: (B, T, D, S) in [0, 1]; **overwritten**.
        drive: (B, T, D, S); **overwritten**.
        start: (B, D, S) state before the first token.

    Returns:
        (B, T, D, S).
    """
    length = decay.shape[1]
    if rest := -length % PIECE:  # tokens that leave the state as it is
        decay = F.pad(decay, (0, 0, 0, 0, 0, rest), value=1.0)
        drive = F.pad(drive, (0, 0, 0, 0, 0, rest))
    decay, drive = decay.unflatten(1, (-1, PIECE)), drive.unflatten(1, (-1, PIECE))
    # Each piece from an empty state, all at once; its decays become products from its first token on.
    for t in range(1, PIECE):
        drive[:, :, t].addcmul_(decay[:, :, t], drive[:, :, t - 1])
        decay[:, :, t].mul_(decay[:, :, t - 1])
    # The true state at each piece's start, one piece after the other, then what is left of it at each token.
    starts = [start]
    for piece in range(drive.shape[1] - 1):
        starts.append(torch.addcmul(drive[:, piece, -1], decay[:, piece, -1], starts[-1]))
    drive.addcmul_(decay, torch.stack(starts, dim=1)[:, :, None])
    return drive.flatten(1, 2)[:, :length]


class SelectiveSSM(nn.Module):
    """One direction of Mamba: in-projection, causal depthwise convolution, selective scan, SiLU gate, out-projection.

    Args:
        width: C of the tokens.
        state: S, numbers remembered per channel. Mamba takes 16; 8 halves the scan's cost.
        expand: inner width D as a multiple of C.
        kernel: taps of the causal convolution.
    """

    def __init__(self, width: int, state: int = 8, expand: int = 1, kernel: int = 4) -> None:
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.split = (rank, state, state)
        self.enter = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.select = nn.Linear(inner, sum(self.split), bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_rates = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.leave = nn.Linear(inner, width, bias=False)
        with torch.no_grad():
            low, high = map(math.log, STEP_RANGE)
            steps = (torch.rand(inner) * (high - low) + low).exp()
            self.step.bias.copy_(steps + (-(-steps).expm1()).log())  # the inverse of softplus

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, C); token t sees tokens 0..t."""
        x, gate = self.enter(tokens).chunk(2, dim=-1)
        x = F.silu(self.convolution(x.transpose(1, 2))[..., : tokens.shape[1]]).transpose(1, 2)
        steps, b, c = self.select(x).split(self.split, dim=-1)
        y = selective_scan(x, F.softplus(self.step(steps)), -self.log_rates.exp(), b, c, self.skip)
        return self.leave(y * F.silu(gate))


class VisionMambaBlock(nn.Module):
    """x + forward(LN(x)) + backward(LN(x)): every token sees all others, at a cost linear in their number.

    Both directions have their own weights; what a direction is, is :class:`SelectiveSSM`, whose arguments these are.
    """

    def __init__(self, width: int, state: int = 8, expand: int = 1, kernel: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.onward = SelectiveSSM(width, state, expand, kernel)
        self.reverse = SelectiveSSM(width, state, expand, kernel)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, C)."""
        x = self.norm(tokens)
        return tokens + self.onward(x) + self.reverse(x.flip(1)).flip(1)
