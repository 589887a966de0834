"""What the benchmarks share: the machine, tables and RESULTS.md, intervals, scoring, the command line."""

from __future__ import annotations

import argparse
import csv
import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import nn

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.data import find_cases, read_image, read_mask
from hspsam_monai.encoders.catalogue import CATALOGUE, locate
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


# The machine


def machine() -> dict[str, Any]:
    """Describe what a figure was measured on; nothing that names a person or a host.

    Returns:
        CPU model, cores this process may use, threads, memory (GiB), load, device, where TF32 is allowed, versions.
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
        "tf32": {
            "matrix products": torch.backends.cuda.matmul.allow_tf32,
            "convolutions": torch.backends.cudnn.allow_tf32,
        },
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
    tf32 = ", ".join(f"{name} {'on' if on else 'off'}" for name, on in m["tf32"].items())
    gpu = "" if m["device"] == "CPU" else f" {m['device']} (TF32: {tf32});"
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


def check_section(section_name: str, path: str | Path = RESULTS) -> tuple[str, str]:
    """Find a section, as a study does before it measures for hours what it could not write.

    Returns:
        What stands before its content and after it, the marks included.

    Raises:
        ConfigError: there is no such file, or it does not hold the section exactly once.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path.name}: found no such file; expected one that holds the section {section_name}.")
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- section: {section_name} -->", f"<!-- end: {section_name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"{path.name} must hold {begin} and {end} once, in this order.")
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]


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
    before, after = check_section(section_name, path)
    if "<!-- section:" in markdown or "<!-- end:" in markdown:
        raise ConfigError("The content of a section may not hold the marks of a section.")
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


def fingerprint(parts: Iterable[Path | str]) -> str:
    """Digest (12 hex digits) of texts and of the contents of files, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()[:12]


def data_digest(cases: Iterable[Mapping[str, Any]]) -> str:
    """Fingerprint of the names, images and labels of cases, whatever their order."""
    ordered = sorted(cases, key=lambda case: case["case"])
    labels = [case["label"] if isinstance(case["label"], list) else [case["label"]] for case in ordered]
    parts = zip(ordered, labels, strict=True)
    return fingerprint(part for case, own in parts for part in (case["case"], *map(Path, [case["image"], *own])))


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


def by_source(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group cases named ``source/ID``; cases without a source are one group, ``val``."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case["case"].rpartition("/")[0].replace("/", "_") or "val", []).append(case)
    return groups


# The command line


def shared_folder() -> Path | None:
    """Development data beside the repository: ``$HSPSAM_SHARED``, or ``../shared``; ``None`` if absent.

    A folder of that name may be anyone's: it counts if it holds ``weights/mobile_sam.pt`` or ``data/polyp``.
    """
    path = Path(os.environ.get("HSPSAM_SHARED", REPO.parent / "shared"))
    return path if (path / "weights" / "mobile_sam.pt").is_file() or (path / "data" / "polyp").is_dir() else None


def argument_parser(name: str, description: str, *, data_required: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options every benchmark has.

    Args:
        name: of the script.
        description: its docstring; the first line is shown.
        data_required: without ``--data`` and development data the parser refuses; else ``data`` is ``None``.
    """
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    shared = shared_folder()
    parser.add_argument(
        "--data", type=Path, required=data_required and shared is None, default=shared and shared / "data" / "polyp",
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


def spread(cases: Sequence[Mapping[str, Any]], limit: int | None) -> list[Mapping[str, Any]]:
    """At most ``limit`` cases, evenly over the list; all without a limit."""
    if not limit:
        return list(cases)
    return [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, limit).astype(int))]


def publish(section: str, markdown: str, args: argparse.Namespace, *, partial: bool = False) -> None:
    """Print a section and write it into the results file.

    Args:
        section: its name.
        markdown: its content.
        args: of :func:`argument_parser`.
        partial: the figures cover a part of the cases only; then they never reach ``benchmarks/RESULTS.md``.
    """
    print(f"\n{markdown}")
    if not is_published(args, partial=partial):
        if args.dry:
            return
        logger.warning("Only a part was measured: %s is left as it is.", RESULTS.name)
        return
    logger.info("Section %s of %s replaced.", section, update_results(section, markdown, args.results).name)


def is_published(args: argparse.Namespace, *, partial: bool = False) -> bool:
    """Whether :func:`publish` writes: not with ``--dry``, and no part of the cases into ``benchmarks/RESULTS.md``."""
    return not args.dry and not (partial and Path(args.results).resolve() == RESULTS)


def start_logging() -> None:
    """Log to the terminal as the bundle does."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # MONAI remarks at every run that task/ is a folder of its own and that logging is left to us.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
