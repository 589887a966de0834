"""Studies: trainings by the bundle, one after another, that can be stopped and go on.

Training is the bundle's own (``bundle/configs/train.json`` and ``task/polyp.json`` with overrides), run by
``monai.bundle.ConfigWorkflow``; there is no second training loop here.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import fingerprint, weights_file
from ignite.engine import Engine
from monai.bundle import ConfigParser, ConfigWorkflow
from scoring import known_dice, load_run, read_dice, score_cases
from torch import nn

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.errors import ConfigError
from hspsam_monai.files import atomic_write
from hspsam_monai.training.handlers import clock

logger = logging.getLogger("benchmarks")

#: Parts of the package whose code decides what a training yields and how it is scored.
_TRAINING_ROOMS = ("data", "transforms", "encoders", "networks", "training", "inference")
_TRAINING_MODULES = ("scores.py", "evaluation.py")


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Attributes:
        name: folder of the run inside the study's output; unique.
        overrides: what differs from train.json with task/polyp.json, ``dataset_dir``, ``pretrained`` and ``seed``
            among it; keys may name nested values, as in ``network_def::adapt``.
        overlay: a further configuration of the bundle, such as ``network/conv_pyramid.json``, or several in order.
        tests: name of a test set -> its cases.
    """

    name: str
    overrides: Mapping[str, Any]
    overlay: str | Sequence[str] | None = None
    tests: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def config_files(overlay: str | Sequence[str] | None = None) -> list[str]:
    """List the configurations a run is made of, in the order in which they are merged."""
    folder = bundle_root() / "configs"
    further = [overlay] if isinstance(overlay, str) else list(overlay or [])
    return [str(folder / name) for name in ("train.json", "task/polyp.json", *further)]


def merged_config(
    overlay: str | Sequence[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> ConfigParser:
    """Parse the bundle's training configuration with overrides; nothing is built yet."""
    parser = ConfigParser()
    parser.read_config(config_files(overlay))
    parser.update(dict(overrides or {}))
    return parser


def code_digest(files: Iterable[str | Path] = ()) -> str:
    """Fingerprint (12 hex digits) of the package's code that decides what a training yields, and of further files."""
    import hspsam_monai

    package = Path(hspsam_monai.__file__).parent
    found = [Path(file) for file in files] + [package / name for name in _TRAINING_MODULES]
    found += sorted(file for room in _TRAINING_ROOMS for file in (package / room).rglob("*.py"))
    return fingerprint(part for file in found for part in (file.name, file))


def run_code(overlay: str | Sequence[str] | None = None) -> str:
    """Fingerprint of what a run is made of: code and base configurations; ``+`` and its own overlays, if it has any.

    Two parts, so that runs with different overlays can be seen to come from one state of the code.
    """
    base = config_files()
    own = [Path(file) for file in config_files(overlay)[len(base) :]]
    return code_digest(base) + (f"+{fingerprint(own)}" if own else "")


class Study:
    """Trainings one after another; what is finished is kept, what was interrupted goes on.

    ``OUTPUT/NAME/`` is the output folder of a run: ``model.pt``, ``network.json``, ``config.json``,
    ``learning_curve.csv``; ``settings.json`` (written first) guards against mixing studies, ``sittings.json`` holds
    the code and the seconds of each sitting, ``run.json`` (written when training is done) marks it as finished,
    ``scores/SET.csv`` holds one line a case.

    Args:
        output: folder of the study.
        runs: what is to be trained and scored.

    Raises:
        ConfigError: two runs share a name, or a run in ``output`` had other settings.
    """

    def __init__(self, output: str | Path, runs: Sequence[Run]) -> None:
        self.output, self.runs = Path(output), list(runs)
        names = [run.name for run in self.runs]
        if len(set(names)) != len(names):
            raise ConfigError(f"Runs need different names, not {', '.join(names)}.")
        for run in self.runs:
            self._check_settings(run)

    def folder(self, run: Run) -> Path:
        """Output folder of a run."""
        return self.output / run.name

    def complete(self) -> list[dict[str, dict[str, float]]]:
        """Train and score whatever is not finished yet.

        Returns:
            For each run: test set -> case -> Dice.
        """
        for run in self.runs:  # hours of training must not end in a network that cannot be built
            merged_config(run.overlay, run.overrides).get_parsed_content("network_def")
        todo = [run for run in self.runs if not self._finished(run)]
        logger.info("%d runs, %d of them finished before.", len(self.runs), len(self.runs) - len(todo))
        begin = time.monotonic()
        for count, run in enumerate(todo, 1):
            logger.info("Run %d of %d: %s", count, len(todo), run.name)
            self._train(run)
            self._score(run)
            left = (time.monotonic() - begin) / count * (len(todo) - count)
            logger.info("%d of %d done, about %s left.", count, len(todo), clock(left))
        return [{name: read_dice(self._table(run, name)) for name in run.tests} for run in self.runs]

    def describe(self) -> str:
        """Say in one Markdown line how the runs were trained, from what was executed."""
        configs = [json.loads((self.folder(run) / "config.json").read_text()) for run in self.runs]
        records = [json.loads((self.folder(run) / "run.json").read_text()) for run in self.runs]
        keys = ("epochs", "image_size", "batch_size", "lr", "encoder_lr_scale", "weight_decay", "power", "ema")
        parts = [f"{key} {'/'.join(dict.fromkeys(str(config.get(key)) for config in configs))}" for key in keys]
        weights = dict.fromkeys(record["settings"]["pretrained"] or "random weights" for record in records)
        # A record from before sittings were kept has one code.
        codes = [record.get("codes") or [record["code"]] for record in records]
        overlays = {(str(run.overlay), code) for run, each in zip(self.runs, codes, strict=True) for code in each}
        bases = {code.partition("+")[0] for _, code in overlays}
        mixed = len(bases) > 1 or len(overlays) > len({overlay for overlay, _ in overlays})
        listed = ", ".join(dict.fromkeys(code for each in codes for code in each))
        hours = sum(record["seconds"] for record in records) / 3600
        text = f"Training: {', '.join(parts)}, start {'/'.join(weights)}; {hours:.1f} h in all; code {listed}."
        return text + (" **The runs come from different states of the code.**" if mixed else "")

    def _settings(self, run: Run) -> dict[str, Any]:
        # Places may change between two sittings, what is trained may not.
        settings = {key: value for key, value in run.overrides.items() if key != "dataset_dir"}
        settings["dataset"] = Path(str(run.overrides["dataset_dir"])).name
        settings["pretrained"] = Path(str(run.overrides.get("pretrained", ""))).name
        settings["overlay"] = run.overlay
        return json.loads(json.dumps(settings, default=str))

    def _check_settings(self, run: Run) -> None:
        file = self.folder(run) / "settings.json"
        if not file.is_file():
            return
        old, new = json.loads(file.read_text()), self._settings(run)
        other = [f"{k} {old.get(k)} (now {new.get(k)})" for k in {**old, **new} if old.get(k) != new.get(k)]
        if other:
            raise ConfigError(f"{self.folder(run)} was started with {'; '.join(other)}. Choose another --output.")

    def _table(self, run: Run, test: str) -> Path:
        return self.folder(run) / "scores" / f"{test}.csv"

    def _finished(self, run: Run) -> bool:
        return (self.folder(run) / "run.json").is_file() and all(self._scored(run, test) for test in run.tests)

    def _scored(self, run: Run, test: str) -> bool:
        return known_dice(self._table(run, test), run.tests[test]) is not None

    def _train(self, run: Run) -> None:
        folder = self.folder(run)
        if (folder / "run.json").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "settings.json", self._settings(run))
        sitting = {"code": run_code(run.overlay), "begun": time.time(), "seconds": None}
        sittings = [*_earlier_sittings(folder), sitting]
        _write_json(folder / "sittings.json", sittings)
        resume = (folder / "last.pt").is_file()
        begin = time.monotonic()
        try:
            train(config_files(run.overlay), {**run.overrides, "output_dir": str(folder), "resume": resume})
        finally:
            sitting["seconds"] = time.monotonic() - begin
            _write_json(folder / "sittings.json", sittings)
        codes = list(dict.fromkeys(each["code"] for each in sittings))
        seconds = round(sum(each["seconds"] for each in sittings))
        record = {"settings": self._settings(run), "codes": codes, "seconds": seconds, **_best(folder)}
        _write_json(folder / "run.json", record)
        (folder / "last.pt").unlink(missing_ok=True)  # eight times the size of the model, and done with

    def _score(self, run: Run) -> None:
        network: nn.Module | None = None
        for test, cases in run.tests.items():
            if self._scored(run, test):
                continue
            if network is None:
                network, image_size, num_classes = load_run(self.folder(run))
            score_cases(network, image_size, num_classes, cases, self._table(run, test))


def train(files: Sequence[str], overrides: Mapping[str, Any], watch: Callable[[Engine], None] | None = None) -> None:
    """Run one training of the bundle in this process, as ``python -m monai.bundle run`` would.

    Args:
        files: configurations, merged in order.
        overrides: what differs, ``output_dir`` among it.
        watch: is handed the trainer before it runs.
    """
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        workflow = ConfigWorkflow(config_file=list(files), workflow_type="train", logging_file=False, **overrides)
        workflow.initialize()
        if watch is not None:
            watch(workflow.parser.get_parsed_content("train::trainer"))
        workflow.run()
        workflow.finalize()
    finally:
        for handler in [h for h in root.handlers if h not in handlers]:  # the log file of this run
            root.removeHandler(handler)
            handler.close()
        gc.collect()


def _earlier_sittings(folder: Path) -> list[dict[str, Any]]:
    """Read what earlier sittings of a run wrote: code, begin (seconds since the epoch) and seconds of each.

    A sitting that was killed could not write its seconds; it counts until its last whole epoch, which is where the next
    one goes on.
    """
    file, elapsed, curve = (folder / name for name in ("sittings.json", "elapsed.json", "learning_curve.csv"))
    if not file.is_file():
        if not (elapsed.is_file() or (folder / "last.pt").is_file()):
            return []
        # Begun before sittings were kept.
        seconds = json.loads(elapsed.read_text()) if elapsed.is_file() else 0.0
        return [{"code": "unknown", "begun": None, "seconds": seconds}]
    sittings = json.loads(file.read_text())
    for sitting in sittings:
        if sitting["seconds"] is None:
            last = curve.stat().st_mtime if curve.is_file() else 0.0
            sitting["seconds"] = max(0.0, last - sitting["begun"])
    return sittings


def _best(folder: Path) -> dict[str, float]:
    """Find the epoch that was kept and its validation Dice, from the learning curve."""
    with (folder / "learning_curve.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_mean_dice")]
    best = max(rows, key=lambda row: float(row["val_mean_dice"]))
    return {"best_epoch": int(best["epoch"]), "best_dice": float(best["val_mean_dice"]), "epochs": len(rows)}


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of studies that train."""
    parser.add_argument("--epochs", type=int, help="default: the task's own")
    parser.add_argument("--image-size", type=int, help="default: the task's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings",
        help="further overrides of train.json for every run, such as batch_size=4",
    )  # fmt: skip


def iterations_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option of studies whose data sets differ in size."""
    parser.add_argument(
        "--iterations", type=int,
        help="train each data set for about so many steps instead of epochs, so that a small one is not trained less",
    )  # fmt: skip


def budget(iterations: int | None, cases: int, common: Mapping[str, Any]) -> dict[str, int]:
    """Override ``epochs`` so that a data set of so many cases is trained for about ``iterations`` steps."""
    if iterations is None:
        return {}
    batch = merged_config(overrides=common).get("batch_size")
    return {"epochs": max(1, round(iterations / max(1, cases // batch)))}


def common_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what the command line changes for every run of a study."""
    overrides: dict[str, Any] = {"pretrained": weights_file(args.weights)}
    if args.epochs is not None:
        overrides["epochs"] = args.epochs
    if args.image_size is not None:
        overrides["image_size"] = args.image_size
    for text in args.settings:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set got {text!r}; expected KEY=VALUE.")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides
