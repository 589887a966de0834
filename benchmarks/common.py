"""What all benchmarks share: the command line, data, digests, logging."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import RESULTS

from hspsam_monai.data import find_cases
from hspsam_monai.encoders.catalogue import CATALOGUE, locate

logger = logging.getLogger("benchmarks")
REPO = Path(__file__).resolve().parents[1]


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


def by_source(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group cases named ``source/ID``; cases without a source are one group, ``val``."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case["case"].rpartition("/")[0].replace("/", "_") or "val", []).append(case)
    return groups


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


def start_logging() -> None:
    """Log to the terminal as the bundle does."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # MONAI remarks at every run that task/ is a folder of its own and that logging is left to us.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
