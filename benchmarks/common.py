"""What the benchmarks share: the machine, tables and RESULTS.md, intervals, trainings by the bundle, scoring.

Training is the bundle's own (``bundle/configs/train.json`` and ``task/polyp.json`` with overrides), run by
``monai.bundle.ConfigWorkflow``; there is no second training loop here.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from torch import nn

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.data import find_cases, read_image, read_mask
from hspsam_monai.encoders.weights import CATALOGUE, locate
from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.files import atomic_write
from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks import load_checkpoint
from hspsam_monai.scores import CaseScore, score_masks, write_case_table
from hspsam_monai.training import environment
from hspsam_monai.training.handlers import clock

logger = logging.getLogger("benchmarks")

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("RESULTS.md")
#: Everything is scored and timed in float32, as inference.json does.
PRECISION = "float32"
#: A case below this Dice counts as missed.
MISSED = 0.1
#: Rooms of the package whose code decides what a training yields.
_TRAINING_ROOMS = ("data", "transforms", "encoders", "networks", "training", "inference")


# The machine


def machine() -> dict[str, Any]:
    """Describe what a figure was measured on; nothing that names a person or a host.

    Returns:
        CPU model, cores this process may use, threads, memory (GiB), load, device, versions.
    """
    found = environment()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not POSIX
        memory = None
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": found["threads"],
        "memory": memory,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "device": found["device"] if torch.cuda.is_available() else "CPU",
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "versions": found["versions"],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else platform.machine()


def machine_line() -> str:
    """Tell :func:`machine` in one line of Markdown."""
    m = machine()
    versions = ", ".join(f"{name} {value}" for name, value in m["versions"].items() if value != "not installed")
    gpu = "" if m["device"] == "CPU" else f" {m['device']} (TF32 {'on' if m['tf32'] else 'off'});"
    return (
        f"Machine:{gpu} {m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory']} GiB, "
        f"load {m['load']} when written; {versions}."
    )


# Tables and RESULTS.md


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a Markdown table; floats get four digits, ``None`` is ``not measured``.

    Args:
        head: names of the columns.
        rows: each as long as ``head``.

    Raises:
        ConfigError: a row of another length.
    """
    lines = [list(head), ["---"] * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ConfigError(f"A row of {len(row)} cells {row} under {len(head)} columns.")
        lines.append([_cell(value) for value in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def update_results(section_name: str, markdown: str, path: str | Path = RESULTS) -> Path:
    """Replace what stands between ``<!-- section: NAME -->`` and ``<!-- end: NAME -->``, whole or not at all.

    Args:
        section_name: NAME.
        markdown: the new content.
        path: the file; everything else in it stays.

    Raises:
        ConfigError: the file does not hold the section exactly once, or the content holds such a mark.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- section: {section_name} -->", f"<!-- end: {section_name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"{path.name} must hold {begin} and {end} once, in this order.")
    if "<!-- section:" in markdown or "<!-- end:" in markdown:
        raise ConfigError("The content of a section may not hold the marks of a section.")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    with atomic_write(path) as part:
        part.write_text(f"{before}\n{markdown.strip()}\n{after}", encoding="utf-8")
    return path


# Intervals


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    def unsigned(self) -> str:
        """Write it without the sign of a difference."""
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float] | float = 0.0, *, resamples: int = 10_000, seed: int = 0, block: int = 1
) -> Interval:
    """Mean of a - b over paired cases with a percentile bootstrap interval.

    Args:
        a: one value for each case.
        b: the other method on the same cases in the same order, or a constant.
        resamples: number of draws.
        seed: of the draws; the same input gives the same interval.
        block: draw runs of so many consecutive cases (circular moving blocks). Neighbouring frames of a video are
            alike, and drawing them one by one makes an interval too narrow.

    Raises:
        DataError: no case, lengths that differ, values that are not finite.
        ConfigError: ``resamples`` or ``block`` below 1.
    """
    first = np.asarray(a, dtype=np.float64)
    second = np.broadcast_to(np.asarray(b, dtype=np.float64), first.shape) if np.ndim(b) == 0 else np.asarray(b)
    if first.ndim != 1 or not len(first) or first.shape != second.shape:
        raise DataError(f"Paired values of shapes {first.shape} and {second.shape}; expected one length above 0.")
    if resamples < 1 or block < 1:
        raise ConfigError(f"resamples is {resamples} and block {block}; expected at least 1.")
    difference = first - second
    if not np.isfinite(difference).all():
        raise DataError("Paired values must be finite; score the missing cases first.")
    n = len(difference)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        starts = random.integers(0, n, -(-n // block))
        drawn = (starts[:, None] + np.arange(block)).ravel()[:n] % n
        means[i] = difference[drawn].mean()
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(difference.mean()), float(low), float(high))


# Trainings


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Attributes:
        name: folder of the run inside the study's output; unique.
        overrides: what differs from train.json with task/polyp.json, ``dataset_dir``, ``pretrained`` and ``seed``
            among it; keys may name nested values, as in ``network_def::adapt``.
        overlay: a further configuration of the bundle, such as ``network/conv_pyramid.json``.
        tests: name of a test set -> its cases.
    """

    name: str
    overrides: Mapping[str, Any]
    overlay: str | None = None
    tests: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def config_files(overlay: str | None = None) -> list[str]:
    """List the configurations a run is made of, in the order in which they are merged."""
    folder = bundle_root() / "configs"
    return [str(folder / name) for name in ("train.json", "task/polyp.json", *([overlay] if overlay else []))]


def merged_config(overlay: str | None = None, overrides: Mapping[str, Any] | None = None) -> ConfigParser:
    """Parse the bundle's training configuration with overrides; nothing is built yet."""
    parser = ConfigParser()
    parser.read_config(config_files(overlay))
    parser.update(dict(overrides or {}))
    return parser


def code_digest() -> str:
    """Fingerprint (12 hex digits) of everything in the repository that decides what a training yields."""
    import hspsam_monai

    package = Path(hspsam_monai.__file__).parent
    files = [Path(name) for name in config_files()]
    files += sorted(file for room in _TRAINING_ROOMS for file in (package / room).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class Study:
    """Trainings one after another; what is finished is kept, what was interrupted goes on.

    ``OUTPUT/NAME/`` is the output folder of a run: ``model.pt``, ``network.json``, ``config.json``,
    ``learning_curve.csv``; ``settings.json`` (written first) guards against mixing studies, ``run.json`` (written
    when training is done) marks it as finished, ``scores/SET.csv`` holds one line a case.

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
        codes = list(dict.fromkeys(record["code"] for record in records))
        hours = sum(record["seconds"] for record in records) / 3600
        text = f"Training: {', '.join(parts)}, start {'/'.join(weights)}; {hours:.1f} h in all; code {', '.join(codes)}."
        return text + (" **The runs come from different states of the code.**" if len(codes) > 1 else "")

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
        return (self.folder(run) / "run.json").is_file() and all(self._table(run, t).is_file() for t in run.tests)

    def _train(self, run: Run) -> None:
        folder = self.folder(run)
        if (folder / "run.json").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "settings.json", self._settings(run))
        earlier = folder / "elapsed.json"
        before = json.loads(earlier.read_text()) if earlier.is_file() else 0.0
        resume = (folder / "last.pt").is_file()
        begin, code = time.monotonic(), code_digest()
        try:
            train(config_files(run.overlay), {**run.overrides, "output_dir": str(folder), "resume": resume})
        finally:
            seconds = before + time.monotonic() - begin
            _write_json(earlier, seconds)
        record = {"settings": self._settings(run), "code": code, "seconds": round(seconds), **_best(folder)}
        _write_json(folder / "run.json", record)
        (folder / "last.pt").unlink(missing_ok=True)  # eight times the size of the model, and done with

    def _score(self, run: Run) -> None:
        network: nn.Module | None = None
        for test, cases in run.tests.items():
            table = self._table(run, test)
            if table.is_file():
                continue
            if network is None:
                network, image_size, num_classes = load_run(self.folder(run))
            score_cases(network, image_size, num_classes, cases, table)


def train(files: Sequence[str], overrides: Mapping[str, Any]) -> None:
    """Run one training of the bundle in this process, as ``python -m monai.bundle run`` would.

    Args:
        files: configurations, merged in order.
        overrides: what differs, ``output_dir`` among it.
    """
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        workflow = ConfigWorkflow(config_file=list(files), workflow_type="train", logging_file=False, **overrides)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    finally:
        for handler in [h for h in root.handlers if h not in handlers]:  # the log file of this run
            root.removeHandler(handler)
            handler.close()
        gc.collect()


def _best(folder: Path) -> dict[str, float]:
    """Find the epoch that was kept and its validation Dice, from the learning curve."""
    with (folder / "learning_curve.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_mean_dice")]
    best = max(rows, key=lambda row: float(row["val_mean_dice"]))
    return {"best_epoch": int(best["epoch"]), "best_dice": float(best["val_mean_dice"]), "epochs": len(rows)}


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# Scoring


def device() -> torch.device:
    """Choose the GPU where there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def load_network(model: str | Path, files: Sequence[str | Path]) -> tuple[nn.Module, int, int]:
    """Build the network that configurations describe and load a checkpoint.

    Args:
        model: a ``model.pt``.
        files: configurations with ``network_def``, ``image_size`` and ``num_classes``, merged in order.

    Returns:
        The network in evaluation mode on :func:`device`, its image size, its number of classes.
    """
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    network = parser.get_parsed_content("network_def")
    load_checkpoint(network, model)
    size, classes = parser.get_parsed_content("image_size"), parser.get_parsed_content("num_classes")
    return network.to(device()).eval(), size, classes


def load_run(folder: str | Path) -> tuple[nn.Module, int, int]:
    """Load what a training left in ``folder``; see :func:`load_network`."""
    return load_network(Path(folder) / "model.pt", [Path(folder) / "network.json"])


def image_tensor(path: str | Path) -> torch.Tensor:
    """Read a picture as (1, 3, H, W) float32 in [0, 1] on :func:`device`, at its stored size."""
    return torch.from_numpy(read_image(path)).permute(2, 0, 1)[None].contiguous().to(device())


@torch.inference_mode()
def score_cases(
    network: nn.Module, image_size: int, num_classes: int, cases: Sequence[Mapping[str, Any]], table: str | Path
) -> Path:
    """Segment cases and write their scores at stored resolution, one CSV line a case.

    Args:
        network: in evaluation mode on :func:`device`.
        image_size: the network's size.
        num_classes: K, background included.
        cases: from :func:`hspsam_monai.data.find_cases`.
        table: the CSV to write, whole or not at all.
    """
    inferer = ImageInferer(image_size, precision=PRECISION)
    rows = []
    begin = printed = time.monotonic()
    for count, case in enumerate(cases, 1):
        pred = inferer(image_tensor(case["image"]), network).argmax(1)[0].to(torch.uint8).cpu().numpy()
        scores = score_masks(pred, read_mask(case["label"], num_classes), num_classes)
        rows.append(CaseScore.from_scores(case["case"], Path(case["image"]).name, scores))
        now = time.monotonic()
        if now - printed > 30:
            printed = now
            left = clock((now - begin) / count * (len(cases) - count))
            logger.info("Scoring %s: %d of %d, %s left", Path(table).stem, count, len(cases), left)
    Path(table).parent.mkdir(parents=True, exist_ok=True)
    return write_case_table(table, rows)


def read_dice(table: str | Path) -> dict[str, float]:
    """Case -> mean Dice over the foreground classes, from a table of :func:`score_cases`, in its order."""
    with Path(table).open(newline="", encoding="utf-8") as file:
        return {row["case"]: float(row["mean_dice"]) for row in csv.DictReader(file)}


def mean_over_seeds(runs: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Average each case over seeds; (N,) in the order of the first run.

    Raises:
        DataError: the runs were scored on different cases.
    """
    if any(run.keys() != runs[0].keys() for run in runs):
        raise DataError("Runs of one comparison must be scored on the same cases; delete their scores/ folders.")
    return np.mean([[run[case] for case in runs[0]] for run in runs], axis=0)


def by_source(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group cases named ``source/ID``; cases without a source are one group, ``val``."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case["case"].rpartition("/")[0].replace("/", "_") or "val", []).append(case)
    return groups


# The command line


def shared_folder() -> Path | None:
    """Development data beside the repository: ``$HSPSAM_SHARED``, or ``../shared``; ``None`` if absent."""
    path = Path(os.environ.get("HSPSAM_SHARED", REPO.parent / "shared"))
    return path if path.is_dir() else None


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Make a parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    shared = shared_folder()
    parser.add_argument(
        "--data", type=Path, required=shared is None, default=shared and shared / "data" / "polyp",
        help="folder of data sets, each with images/, masks/ and splits.json",
    )  # fmt: skip
    parser.add_argument(
        "--weights", default=str(shared / "weights") if shared else "catalogue",
        help="folder of mobile_sam.pt; 'catalogue': where `hspsam weights fetch` puts it; 'none': random",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=REPO / "runs" / "benchmarks" / name, help="what is kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file whose section is replaced")
    parser.add_argument("--dry", action="store_true", help="print the table, leave the results file alone")
    return parser


def training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of studies that train."""
    parser.add_argument("--epochs", type=int, help="default: the task's own")
    parser.add_argument("--image-size", type=int, help="default: the task's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings",
        help="further overrides of train.json for every run, such as batch_size=4",
    )  # fmt: skip


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


def weights_file(weights: str, name: str = "mobile_sam") -> str:
    """Find the official file; an empty text for random weights.

    Raises:
        WeightsError: it is not there.
    """
    if weights == "none":
        return ""
    return str(locate(name if weights == "catalogue" else Path(weights) / CATALOGUE[name].file_name))


def cases_of(root: Path, split: str) -> list[Mapping[str, Any]]:
    """Cases of one split with labels; refuses an empty one by :func:`hspsam_monai.data.find_cases`."""
    return find_cases(root, split)


def publish(section: str, markdown: str, args: argparse.Namespace, *, partial: bool = False) -> None:
    """Print a section and write it into the results file.

    Args:
        section: its name.
        markdown: its content.
        args: of :func:`argument_parser`.
        partial: the figures cover a part of the cases only; then they never reach ``benchmarks/RESULTS.md``.
    """
    print(f"\n{markdown}")
    if args.dry:
        return
    if partial and Path(args.results).resolve() == RESULTS:
        logger.warning("Only a part was measured: %s is left as it is.", RESULTS.name)
        return
    logger.info("Section %s of %s replaced.", section, update_results(section, markdown, args.results).name)


def start_logging() -> None:
    """Log to the terminal as the bundle does."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("ignite.engine.engine").setLevel(logging.WARNING)
