"""What benchmarks score with: models, per-case Dice kept in tables, means and intervals over them."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import by_source, cases_of, logger, shared_folder
from monai.bundle import ConfigParser
from torch import nn

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.data import read_image, read_mask
from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks import load_checkpoint
from hspsam_monai.scores import CaseScore, score_masks, write_case_table
from hspsam_monai.training.handlers import clock

#: Everything is scored and timed in float32, as inference.json does.
PRECISION = "float32"
#: A case below this Dice counts as missed.
MISSED = 0.1


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


def measure_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--measure``, walked by :func:`measured`, of data sets in the whole of the shared folder's data."""
    shared = shared_folder()
    parser.set_defaults(data=shared and shared / "data")
    parser.add_argument(
        "--measure", nargs="+", default=["shipped:polyp:val"], metavar="MODEL:SET:SPLIT",
        help="shipped or the folder of a run; a data set below --data; its split, or all",
    )  # fmt: skip


class Measured(NamedTuple):
    """A model and the cases of one source that it is to be measured on."""

    model: str
    label: str
    network: nn.Module
    files: list[Path]
    size: int
    classes: int
    cases: list[Mapping[str, Any]]


def measured(args: argparse.Namespace) -> Iterator[Measured]:
    """Walk ``--measure``, source by source; each model is loaded when its turn comes."""
    for text in args.measure:
        model, name, split = parse_measure(text)
        loaded = load_model(model)
        for source, cases in by_source(cases_of(args.data / name, split)).items():
            label = name if source == "val" else f"{name}/{source}"
            yield Measured(Path(model).name, f"{label} {split}", *loaded, cases)


def parse_measure(text: str) -> tuple[str, str, str]:
    """Split ``MODEL:SET:SPLIT``; MODEL may hold colons itself.

    Raises:
        ConfigError: a part is missing.
    """
    parts = text.rsplit(":", 2)
    if len(parts) != 3 or not all(parts):
        raise ConfigError(f"--measure got {text!r}; expected MODEL:SET:SPLIT, such as shipped:polyp:val.")
    return parts[0], parts[1], parts[2]


def load_model(model: str) -> tuple[nn.Module, list[Path], int, int]:
    """Load ``shipped``, the shipped ``sam_sp`` or the folder of a run.

    Returns:
        The network in evaluation mode, the configurations that describe it, its image size, its number of classes.
    """
    root, run = bundle_root(), Path(model)
    weights, configs = run / "model.pt", [run / "network.json"]
    if model in ("shipped", "sam_sp"):
        weights, configs = root / "models" / "model.pt", [root / "configs" / "inference.json"]
    if model == "sam_sp":
        weights, configs = weights.with_name("sam_sp.safetensors"), [*configs, root / "configs" / "sam_sp.json"]
    network, size, classes = load_network(weights, configs)
    return network, configs, size, classes


def mirror_inferer(files: Sequence[str | Path], precision: str = PRECISION) -> ImageInferer:
    """Make the inferer that `evaluate` and `inference` use with these configurations: four mirror images, averaged."""
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    size, scales = parser.get_parsed_content("image_size"), parser.config.get("scales", [1])
    return ImageInferer(size, precision, flips=True, scales=scales)


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


def known_dice(table: str | Path, cases: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Read a table as :func:`read_dice`, in the order of ``cases``; ``None`` if it is absent or of other cases.

    A table from before the data changed is thus made again.
    """
    if not Path(table).is_file():
        return None
    found, names = read_dice(table), [case["case"] for case in cases]
    return {name: found[name] for name in names} if found.keys() == set(names) else None


def mean_over_seeds(runs: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Average each case over seeds; (N,) in the order of the first run.

    Raises:
        DataError: the runs were scored on different cases.
    """
    if any(run.keys() != runs[0].keys() for run in runs):
        raise DataError("Runs of one comparison must be scored on the same cases; delete their scores/ folders.")
    return np.mean([[run[case] for case in runs[0]] for run in runs], axis=0)


def dice_columns(tables: Sequence[Mapping[str, float]]) -> list[Any]:
    """Columns of one method: the mean Dice of each seed, the mean of those, the share of missed images.

    Args:
        tables: case -> Dice in [0, 1], one table a seed.
    """
    means = [float(np.mean(list(table.values()))) for table in tables]
    missed = np.mean([np.mean(np.array(list(table.values())) < MISSED) for table in tables])
    return [*means, float(np.mean(means)), f"{missed:.1%}"]
