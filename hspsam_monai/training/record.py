"""What a run leaves beside its results, so that it can be understood and repeated."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hspsam_monai
from hspsam_monai.data import case_name
from hspsam_monai.data.layouts import SPLITS_FILE
from hspsam_monai.errors import DataError
from hspsam_monai.files import atomic_write
from hspsam_monai.network_file import NETWORK_KEYS, OVERLAY
from hspsam_monai.training.output_folder import RECORD
from hspsam_monai.workflow import running_workflow

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "monai", "numpy", "segment-anything", "kornia", "pytorch-ignite", "pillow")


def environment() -> dict[str, Any]:
    """Versions of what computes, the device and the number of threads; nothing that names a person or a host."""
    versions = {"python": platform.python_version(), "hspsam_monai": hspsam_monai.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"versions": versions, "device": device, "threads": torch.get_num_threads()}


def write_record(
    folder: str | Path, cases: Mapping[str, Sequence[Mapping[str, Any]]] | None = None, resume: bool = False
) -> None:
    """Write what was run into ``folder``; called by the configurations' ``initialize`` step.

    * ``config.json``: the merged configuration with all overrides, as executed;
    * ``network.json``: the part of it that inference needs, usable as an overlay;
    * ``environment.json``: versions, device, threads;
    * ``splits.json``: the case names of each split.

    Args:
        folder: output folder, created if missing.
        cases: split name -> list of case dictionaries.
        resume: the run goes on; its cases must still be those of ``splits.json``. The other files are then written once
            its state was restored (:func:`write_configuration`): one that is refused leaves all as it was.

    Raises:
        DataError: a run that goes on has other cases; nothing is written then.

    The configuration is taken from the MONAI workflow that runs this step, whichever way it was started
    (``python -m monai.bundle run``, the command line, or Python); outside a workflow the two files that need
    it are left out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    workflow = running_workflow()
    # A run of an earlier version carries its own call, without `resume`.
    resume = resume or (workflow is not None and workflow.parser.config.get("resume") is True)
    if cases is not None:
        splits = {name: [case_name(case) for case in items] for name, items in cases.items()}
        if resume and (folder / SPLITS_FILE).is_file():
            _check_splits(folder / SPLITS_FILE, splits)
        else:
            _write(folder / SPLITS_FILE, splits)
    if not resume:
        write_configuration(folder)


def write_configuration(folder: Path) -> None:
    """Write ``environment.json`` and, inside a workflow, ``config.json`` and ``network.json``.

    Args:
        folder: output folder, which exists; files of these names are replaced, each whole or not at all.
    """
    _write(folder / RECORD, environment())
    workflow = running_workflow()
    if workflow is not None:
        config = dict(workflow.parser.config)
        _write(folder / "config.json", config)
        _write(folder / OVERLAY, {key: config[key] for key in NETWORK_KEYS if key in config})


def _write(path: Path, content: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")


def _check_splits(file: Path, now: Mapping[str, Sequence[str]]) -> None:
    """A draw depends on the number of images: one more, and what was validated on would be trained on."""
    before = json.loads(file.read_text(encoding="utf-8"))
    moved = sum(len(set(before.get(name, ())) ^ set(cases)) for name, cases in now.items())
    if moved:
        sizes = ", ".join(f"{name} {len(before.get(name, ()))} (now {len(cases)})" for name, cases in now.items())
        raise DataError(
            f"{file}: found the run's cases, {sizes}, and {moved} places that differ; expected those it was started "
            "with. Restore the data set, or copy this file into it as its splits."
        )
