"""Handlers MONAI's trainer lacks: seeding by epoch, finite losses and gradients, progress with ETA."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.handlers import TensorBoardHandler, TensorBoardStatsHandler, ValidationHandler
from torch import nn

from hspsam_monai.errors import TrainingError

logger = logging.getLogger(__name__)


class EpochSeeds:
    """Before each epoch, tell data set and sampler its number and seed torch from (seed, epoch).

    Attach first, so that the loader's iterator is made after it. A resumed run then continues bit for bit.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch that starts."""
        epoch = engine.state.epoch
        # Each process of a distributed run draws its own dropout.
        torch.manual_seed(self.seed * 1_000_003 + epoch + 7919 * idist.get_rank())
        loader = engine.state.dataloader
        for part in (getattr(loader, "dataset", None), getattr(loader, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


class Attach:
    """Let an object that other parts of a configuration refer to stand in the list of handlers as well.

    MONAI's property check reads every handler as a dictionary, so a bare ``@reference`` cannot stand there.

    Args:
        handler: anything with ``attach(engine)``, such as a :class:`~hspsam_monai.training.MovingAverage`.
    """

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def attach(self, engine: Engine) -> None:
        """Attach the object itself."""
        self.handler.attach(engine)


def of_this_process(handlers: list[Any], rank: int) -> list[Any]:
    """The handlers that process ``rank`` of a distributed run attaches: all on 0, elsewhere those that write nothing.

    Chosen by kind and not by position, since overlays append handlers and servers insert them at the front. A handler
    of our own that only process 0 may run says so with ``main_process_only = True``.
    """
    if rank == 0:
        return handlers
    return [h for h in handlers if not (isinstance(h, TensorBoardHandler) or getattr(h, "main_process_only", False))]


class TensorBoard(TensorBoardStatsHandler):
    """MONAI's ``TensorBoardStatsHandler`` that opens its file when it is attached, as :func:`of_this_process` decides.

    TensorBoard shows a folder's newest file, and one that another process left empty would hide the curves.

    Args:
        log_dir: folder of the event files.
        **options: see MONAI's.
    """

    def __init__(self, log_dir: str, **options: Any) -> None:
        super().__init__(summary_writer=_NotYet(), log_dir=log_dir, **options)
        self.log_dir = log_dir

    def attach(self, engine: Engine) -> None:
        """Open the file and attach to a trainer or an evaluator."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self.internal_writer = SummaryWriter(log_dir=self.log_dir), True
        super().attach(engine)


class _NotYet:
    """Stands for a writer that is not open."""

    def close(self) -> None:
        """Nothing is open."""


class Validate(ValidationHandler):
    """MONAI's ``ValidationHandler`` that also validates after the last epoch, whatever the interval.

    What a run ends with would else be neither scored nor kept.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        super().attach(engine)
        if self.epoch_level:
            last = Events.EPOCH_COMPLETED(event_filter=lambda e, n: n == e.state.max_epochs and n % self.interval != 0)
            engine.add_event_handler(last, self)


class FiniteGuard:
    """Stop before a loss or gradient that is not finite can reach the weights; clip the gradient's norm.

    Policy: the run stops with a :class:`TrainingError` that names the batch's cases; ``last.pt`` still holds the
    last good epoch.

    Args:
        network: whose gradients are clipped.
        max_norm: largest allowed 2-norm of all gradients together; 0 checks without clipping.
    """

    def __init__(self, network: nn.Module, max_norm: float = 1.0) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check_loss)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.check_gradient)

    def check_loss(self, engine: Engine) -> None:
        """Refuse a loss that is NaN or infinite."""
        loss = engine.state.output["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(self._message("loss", float(loss.detach()), engine))

    def check_gradient(self, engine: Engine) -> None:
        """Refuse gradients that are NaN or infinite, and clip them when the optimiser is about to step."""
        # Clipping a partial sum would change its direction, so accumulated gradients are clipped once, at their end.
        limit = self.max_norm if self.max_norm and _steps_now(engine) else float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        if not torch.isfinite(norm):
            raise TrainingError(self._message("gradient norm", float(norm), engine))

    @staticmethod
    def _message(what: str, value: float, engine: Engine) -> str:
        cases = engine.state.batch.get("case", "unknown") if isinstance(engine.state.batch, dict) else "unknown"
        return (
            f"The {what} became {value} at epoch {engine.state.epoch}, iteration {engine.state.iteration}; cases of "
            f"the batch: {cases}. Look at these images and masks (hspsam check), or lower the learning rate; "
            "last.pt holds the last good epoch."
        )


def _steps_now(engine: Engine) -> bool:
    """Tell whether MONAI's trainer steps its optimiser in this iteration (see its ``accumulation_steps``)."""
    every, length = getattr(engine, "accumulation_steps", 1), engine.state.epoch_length
    done = engine.state.iteration if not length else (engine.state.iteration - 1) % length + 1
    return done % every == 0 or done == length


class Progress:
    """Where a run stands and when it will be done: a bar in a terminal, lines in a log.

    Args:
        every: seconds between two lines of the log.
        what: name of the work, such as ``Training`` or ``Segmenting``.
        total: iterations an epoch, where the loader does not know its length.
    """

    main_process_only = True

    def __init__(self, every: float = 30.0, what: str = "Training", total: int | None = None) -> None:
        self.every, self.what, self.total = every, what, total
        self._bar = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, self._stop)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        self._begin = self._printed = self._paced = time.monotonic()
        self._first: int | None = None
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.what, total=None)
            self._bar.start()

    def _epoch(self, engine: Engine) -> None:
        if self._first is None:  # a resumed run counts its own iterations only, and none its preparations
            self._first, self._paced = engine.state.iteration, time.monotonic()

    def _step(self, engine: Engine) -> None:
        state, now = engine.state, time.monotonic()
        length = self.total or state.epoch_length
        total = length * state.max_epochs if length else None
        text = self.what if (state.max_epochs or 1) == 1 else f"{self.what} {state.epoch}/{state.max_epochs}"
        loss = _loss_of(state.output)
        if loss is not None:
            text += f" loss {loss:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=state.iteration, total=total)
        elif now - self._printed >= self.every:
            self._printed = now
            rate = (state.iteration - self._first) / max(now - self._paced, 1e-9)
            left = f", {clock((total - state.iteration) / rate)} left" if total and rate else ""
            logger.info("%s, iteration %s/%s, %.2f it/s%s", text, state.iteration, total or "?", rate, left)

    def _stop(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        logger.info("%s: done in %s.", self.what, clock(time.monotonic() - self._begin))

    def _fail(self, engine: Engine, error: BaseException) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        raise error


def _loss_of(output: object) -> float | None:
    first = output[0] if isinstance(output, list) and output else output
    loss = first.get("loss") if isinstance(first, dict) else None
    return None if loss is None else float(loss)


def clock(seconds: float) -> str:
    """Seconds as ``1 h 02 min``, ``3 min 20 s`` or ``12 s``."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    if seconds >= 60:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds} s"


def log_file(folder: str | Path, name: str = "log.txt") -> None:
    """Also write everything that is logged to ``folder``/``name`` (appended, so a resumed run keeps its history)."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    if not any(getattr(h, "baseFilename", None) == handler.baseFilename for h in root.handlers):
        root.addHandler(handler)
    if root.level > logging.INFO or root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
