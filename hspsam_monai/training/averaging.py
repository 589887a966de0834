"""Moving average of the weights that are trained."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import Tensor, nn


class MovingAverage(EMAHandler):
    """ignite's ``EMAHandler`` that leaves frozen weights as they are, to the last bit.

    Averaged with themselves they would be rounded in every iteration and wander off: features stored before the
    training, contexts and hashes then belong to another encoder than the one that is shipped. It saves their time, too.
    What is trained is averaged by ignite's own operations, and buffers are the trained network's.

    Args:
        model: the network that is trained (a DistributedDataParallel wrapper is looked through).
        momentum: weight in (0, 1) of the new weights in each iteration.
        momentum_warmup: the weight of the first iteration.
        warmup_iters: iterations from there to ``momentum``.

    Attributes:
        ema_model: the averaged network.

    Raises:
        ValueError: ``momentum`` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
    ) -> None:
        super().__init__(model, momentum, momentum_warmup, warmup_iters, handle_buffers="copy")
        self._pairs: _Pairs | None = None

    def attach(self, engine: Engine, *args: Any, **options: Any) -> None:
        """Attach to the trainer; arguments are ignite's."""
        super().attach(engine, *args, **options)
        # After all that loads weights when a run starts, such as MONAI's CheckpointLoader and Checkpointer.
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)

    @torch.no_grad()
    def _begin_epoch(self) -> None:
        """What is frozen is the network's own, also where it was loaded after the copy was made."""
        for mean, new in zip(self.ema_model.parameters(), self.model.parameters(), strict=True):
            if not new.requires_grad and not torch.equal(mean, new):
                mean.copy_(new)
        self._pairs = _pairs(self.ema_model, self.model)

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        momentum = getattr(engine.state, name)
        pairs = self._pairs or _pairs(self.ema_model, self.model)
        if pairs.means:
            torch._foreach_mul_(pairs.means, 1.0 - momentum)
            torch._foreach_add_(pairs.means, pairs.news, alpha=momentum)
        for mean, new in pairs.buffers:
            mean.data = new.data


class _Pairs(NamedTuple):
    """What is averaged; found once an epoch, since going through all modules takes longer than the averaging."""

    means: list[Tensor]
    news: list[Tensor]
    buffers: list[tuple[Tensor, Tensor]]


def _pairs(averaged: nn.Module, trained: nn.Module) -> _Pairs:
    both = zip(averaged.parameters(), trained.parameters(), strict=True)
    moving = [(mean, new) for mean, new in both if new.requires_grad]
    buffers = list(zip(averaged.buffers(), trained.buffers(), strict=True))
    return _Pairs([mean for mean, _ in moving], [new for _, new in moving], buffers)
