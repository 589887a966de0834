"""Real runs of the bundle's training configuration, small enough for a test."""

import logging
from pathlib import Path

import pytest
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from hspsam_monai.data import write_phantoms


class Stop(Exception):
    """Stands for a crash in the middle of a run."""


class Run:
    """One run of ``train.json``: resolved but not started, so that tests can look inside and interfere."""

    def __init__(self, config: list[Path], data: Path, folder: Path, **overrides: object) -> None:
        options = {
            "dataset_dir": str(data),
            "output_dir": str(folder),
            "pretrained": "",
            "image_size": 64,
            "batch_size": 2,
            "epochs": 2,
            "warmup": 50,  # longer than the run: the moving average's momentum changes in every iteration
            "lr": 1e-3,
            "precision": "float32",
            "device": "$torch.device('cpu')",
        }
        self.folder = folder
        self.workflow = ConfigWorkflow(
            [str(c) for c in config], workflow_type="train", logging_file=False, **{**options, **overrides}
        )
        self.losses: list[float] = []

    def get(self, name: str):
        """A resolved part of the configuration."""
        return self.workflow.parser.get_parsed_content(name)

    def start(self, stop_at: int | None = None, at_iteration=None, before=None) -> "Run":
        """Run to the end, or until a crash after iteration ``stop_at``; ``before`` sees the run ready to start."""
        self.workflow.initialize()
        if before is not None:
            before(self)
        trainer = self.get("train::trainer")
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: self.losses.append(float(engine.state.output[0]["loss"]))
        )
        if at_iteration is not None:
            trainer.add_event_handler(Events.ITERATION_STARTED, at_iteration)
        if stop_at is None:
            self.workflow.run()
            return self

        def crash(engine):
            raise Stop

        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), crash)
        with pytest.raises(RuntimeError) as caught:  # MONAI wraps what an expression raises
            self.workflow.run()
        assert isinstance(root(caught.value), Stop)
        return self


def root(error: BaseException) -> BaseException:
    """The first cause behind MONAI's wrapping errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Eight phantom frames: six to train on, two to validate."""
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", 8, size=(64, 80), val_fraction=0.25)


@pytest.fixture
def train(bundle, phantoms, tmp_path):
    """``train(folder_name, **overrides)`` prepares a run; logging and seeds are put back afterwards.

    ``overlay`` names one of ``configs/network``, ``task`` one of ``configs/task``.
    """
    logger = logging.getLogger()
    level, handlers = logger.level, list(logger.handlers)

    def prepare(name: str = "run", overlay: str | None = None, task: str | None = None, **overrides: object) -> Run:
        config = [bundle / "configs" / "train.json"]
        config += [bundle / "configs" / "network" / f"{overlay}.json"] if overlay else []
        config += [bundle / "configs" / "task" / f"{task}.json"] if task else []
        return Run(config, overrides.pop("data", phantoms), tmp_path / name, **overrides)

    yield prepare
    logger.setLevel(level)
    for handler in set(logger.handlers) - set(handlers):
        logger.removeHandler(handler)
        handler.close()
    set_determinism(None)
