"""HSP-SAM's abstract prompts Q_l and the Q -> A generator (arXiv 2506.02854, the prompt branch of its figure)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hspsam_monai.encoders import Level
from hspsam_monai.encoders.constants import Constants, KeepsConstants
from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.layers import mlp

#: Standard deviation of the abstract prompts at the start (paper's development code).
PROMPT_STD = 0.02

SOURCES = ("static", "image", "none")


class QueryToAnswer(nn.Module):
    """The Q -> A generator of one level: a shared MLP, then one separate MLP per prompt token.

    Shared: D -> D/4 -> D/4 -> C with LeakyReLU; separate: C -> C/4 -> C/4 -> C with ReLU (C = 256 in the paper).
    """

    def __init__(self, prompt_dim: int, width: int, prompts: int) -> None:
        super().__init__()
        hidden = prompt_dim // 4
        self.shared = mlp([prompt_dim, hidden, hidden, width], nn.LeakyReLU)
        self.separate = nn.ModuleList(mlp([width, width // 4, width // 4, width]) for _ in range(prompts))

    def forward(self, q: Tensor) -> Tensor:
        """Map tokens (..., P, D) to decoder prompts (..., P, C)."""
        shared = self.shared(q)
        return torch.stack([head(shared[..., i, :]) for i, head in enumerate(self.separate)], dim=-2)


class HierarchicalPrompter(KeepsConstants):
    """Learned prompts at every level of the encoder that has attention to join.

    Args:
        levels: what the encoder says of its levels.
        width: decoder width C.
        prompts: P, prompts per level, >= 1.
        source: ``static`` (the paper: A_l comes from the raw parameters Q_l and is a constant of the task),
            ``image`` (A_l comes from the prompts after they attended the image) or ``none`` (no prompts at all:
            the ablation).
        inject: let the prompts join the encoder's attention (paper); without, they only feed the decoder.

    Raises:
        ConfigError: an argument is out of range, or ``image`` without injection.
    """

    def __init__(
        self, levels: tuple[Level, ...], width: int, prompts: int, source: str = "static", inject: bool = True
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise ConfigError(f"prompt source is {source!r}; expected one of {', '.join(SOURCES)}.")
        if prompts < 1:
            raise ConfigError(f"prompts per level is {prompts}; expected at least 1 (source='none' turns them off).")
        if source == "image" and not inject:
            raise ConfigError(
                "prompt source 'image' reads prompts that attended the image, and inject is false, so none do. Set "
                "prompt_source to 'static', or inject to true."
            )
        self.source, self.inject = source, inject
        self.queries = nn.ParameterList()
        self.answers = nn.ModuleList()
        self._slots: list[int | None] = []
        self._constants = Constants()
        for level in levels:
            if level.prompt_dim is None or source == "none":
                self._slots.append(None)
                continue
            self._slots.append(len(self.queries))
            self.queries.append(nn.Parameter(torch.randn(prompts, level.prompt_dim) * PROMPT_STD))
            self.answers.append(QueryToAnswer(level.prompt_dim, width, prompts))

    def encoder_prompts(self) -> list[Tensor | None]:
        """Q_l of each level, (P, D_l), or ``None`` where no prompt joins."""
        return [None if slot is None or not self.inject else self.queries[slot] for slot in self._slots]

    def forward(self, tokens: list[Tensor | None]) -> list[Tensor | None]:
        """Decoder prompts A_l of each level.

        Args:
            tokens: the encoder's attended prompt tokens, each (B, P, D_l); used by source ``image`` only.

        Returns:
            One entry per level: (P, C) for ``static``, (B, P, C) for ``image``, or ``None``.
        """
        answers: list[Tensor | None] = []
        for slot, attended in zip(self._slots, tokens, strict=True):
            if slot is None:
                answers.append(None)
            elif self.source == "static":
                answers.append(self._static_answer(slot))
            else:
                answers.append(self.answers[slot](attended))
        return answers

    def _static_answer(self, slot: int) -> Tensor:
        """A_l (P, C) of the raw parameters: a constant of the task."""
        query, generator = self.queries[slot], self.answers[slot]
        return self._constants.get(slot, [query, *generator.parameters()], lambda: generator(query))
