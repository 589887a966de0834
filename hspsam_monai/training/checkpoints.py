"""Checkpoints that resume exactly, the best model, early stopping, the learning curve."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers.state_param_scheduler import StateParamScheduler
from torch import nn

from hspsam_monai.encoders.state_files import write_state
from hspsam_monai.errors import ConfigError, TrainingError, WeightsError
from hspsam_monai.files import atomic_write
from hspsam_monai.training.output_folder import BEST, CURVE, LAST
from hspsam_monai.training.record import write_configuration

logger = logging.getLogger(__name__)


class Checkpointer:
    """MONAI/ignite handler: after every epoch write ``last.pt``, after every best epoch ``model.pt``.

    Attach to the trainer after its :class:`~hspsam_monai.training.Validate`. ``last.pt`` holds everything a run needs
    to go on as if it had never stopped: network, averaged network, optimiser, schedule, epoch, best value, learning
    curve; data order and augmentation are functions of (seed, epoch, index) and need no state. ``model.pt`` holds
    ``{"model": state}`` of the network that was validated, for inference and MONAI Label.

    Args:
        folder: output folder, created if missing.
        network: the trained network (a DistributedDataParallel wrapper is looked through).
        optimizer: its optimiser.
        scheduler: its learning-rate schedule.
        evaluator: the validation engine; its key metric picks the best epoch, higher is better.
        best_network: the network that is validated and shipped, such as a moving average; default ``network``.
        resume: go on from ``last.pt`` in ``folder``; refuse if there is none.
        patience: stop after so many validations without a better value; 0 never stops.
        keep: which epoch ``model.pt`` is of: ``best``; or ``last``, where no validation set may choose (few-shot).
        half: store ``model.pt`` in float16 (half the size; loading casts back).

    In a distributed run only process 0 writes; every process resumes.

    Raises:
        TrainingError: ``folder`` holds a run and ``resume`` is false, or nothing is there to resume.
        ConfigError: ``keep`` is something else, or ``last`` together with ``patience``.
    """

    def __init__(
        self,
        folder: str | Path,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        evaluator: Engine,
        best_network: nn.Module | None = None,
        resume: bool = False,
        patience: int = 0,
        half: bool = True,
        keep: str = "best",
    ) -> None:
        if keep not in ("best", "last") or (keep == "last" and patience):
            raise ConfigError(f"keep is {keep!r} with patience {patience}; expected best, or last without patience.")
        self.folder = Path(folder)
        self.network = getattr(network, "module", network)
        self.best_network = self.network if best_network is None else getattr(best_network, "module", best_network)
        self.optimizer, self.scheduler, self.evaluator = optimizer, scheduler, evaluator
        self.resume, self.patience, self.half, self.keep = resume, patience, half, keep
        self.rank = idist.get_rank()
        self.best, self.best_epoch, self.waited = float("-inf"), 0, 0
        self.curve: list[dict[str, float]] = []
        self._loss, self._count = 0.0, 0
        last = self.folder / LAST
        if resume and not last.exists():
            raise TrainingError(f"Nothing to resume: {last} does not exist. Start without --resume.")
        if last.exists() and not resume:
            raise TrainingError(f"{last} belongs to an earlier run. Go on with --resume, or choose another folder.")

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        """Restore everything from ``last.pt`` when asked to resume; only then is the new configuration recorded."""
        if not self.resume:
            return
        path = self.folder / LAST
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise WeightsError(f"{path} cannot be read ({error}); expected the last.pt of a training run.") from error
        steps, now = state["iteration"] // max(1, state["epoch"]), engine.state.epoch_length
        if now is not None and now != steps:
            # Counted on, such a run would end early, begin inside an epoch, or be at another place of its schedule.
            raise TrainingError(
                f"{path} is of a run with {steps} iterations an epoch, and this one has {now}: go on with the same "
                "batch_size, training cases and number of processes, or start a new run with pretrained=model.pt."
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:  # other groups: of another version, or another adapt
            raise TrainingError(
                f"{path} is of an optimiser over other parameters ({error}); go on with the configuration and version "
                "it was started with, or start a new run with pretrained=model.pt."
            ) from None
        self.network.load_state_dict(state["network"])
        self.best_network.load_state_dict(state["best_network"])
        # LambdaLR insists on a key for its functions, which files do not hold: they come from the configuration.
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
        for name in ("best", "best_epoch", "waited", "curve"):
            setattr(self, name, state[name])
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["iteration"]
        _advance_counters(engine)
        logger.info("Resumed from %s after epoch %d (best %.4f).", path, state["epoch"], self.best)
        if self.rank == 0:
            write_configuration(self.folder)
        if self._finished():
            engine.terminate()

    def _add_loss(self, engine: Engine) -> None:
        output = engine.state.output
        self._loss += float((output[0] if isinstance(output, list) else output)["loss"])
        self._count += 1

    def _finished(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience

    def save(self, engine: Engine) -> None:
        """Write the epoch's checkpoints and learning curve; stop if patience is at its end."""
        epoch = engine.state.epoch
        total, count = idist.all_reduce(self._loss), idist.all_reduce(float(self._count))  # each process saw a part
        row = {
            "epoch": epoch,
            "loss": total / max(1.0, count),
            "lr": self.scheduler.get_last_lr()[0],  # of what is new; the encoder's is lower
        }
        self._loss, self._count = 0.0, 0
        # An evaluator keeps the metrics and the epoch of its last run.
        validated = self.evaluator.state.metrics and self.evaluator.state.epoch == epoch
        if validated:
            row.update({k: float(v) for k, v in self.evaluator.state.metrics.items() if _is_number(v)})
        value = row.get(getattr(self.evaluator.state, "key_metric_name", None) or "", None) if validated else None
        self.curve.append(row)
        better = value is not None and value > self.best
        if better:
            self.best, self.best_epoch, self.waited = value, epoch, 0
        elif value is not None:
            self.waited += 1
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A stored context belongs to the weights that were validated, so only those are written.
            if better or (self.keep == "last" and value is not None):
                self._write_best()
            write_state(self.folder / LAST, self._state(engine))
            self._write_curve()
        if value is not None:
            logger.info(
                "Epoch %d: loss %.4f, validation %.4f%s (best %.4f at epoch %d)",
                epoch, row["loss"], value, " *" if better else "", self.best, self.best_epoch,
            )  # fmt: skip
        if self._finished():
            logger.info("Stopped: %d validations without a better value.", self.waited)
            engine.terminate()

    def _state(self, engine: Engine) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "best_network": self.best_network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "waited": self.waited,
            "curve": self.curve,
        }

    def _write_best(self) -> None:
        state = self.best_network.state_dict()
        if self.half:
            state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        write_state(self.folder / BEST, {"model": state})

    def _write_curve(self) -> None:
        fields = list(dict.fromkeys(key for row in self.curve for key in row))
        with atomic_write(self.folder / CURVE) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self.curve)


def _advance_counters(engine: Engine) -> None:
    """Tell ignite's parameter schedules, such as the moving average's warm-up, how many iterations have passed.

    They count their own calls and would begin anew; ignite offers no public way to find them.
    """
    for handler, *_ in engine._event_handlers[Events.ITERATION_COMPLETED]:
        if isinstance(handler, StateParamScheduler):
            handler.event_index = engine.state.iteration


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
