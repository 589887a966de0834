"""What benchmarks write: the machine, tables, RESULTS.md."""

from __future__ import annotations

import argparse
import logging
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hspsam_monai.errors import ConfigError
from hspsam_monai.files import atomic_write
from hspsam_monai.training import environment

logger = logging.getLogger("benchmarks")

RESULTS = Path(__file__).with_name("RESULTS.md")


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


def publish(section: str, markdown: str, args: argparse.Namespace, *, partial: bool = False) -> None:
    """Print a section and write it into the results file.

    Args:
        section: its name.
        markdown: its content.
        args: of :func:`common.argument_parser`.
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
