"""R3: peak memory of encoders and of training steps, each in a fresh process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fresh import ask
from parts import Case, Part, Row, Settings, failed, footer, load
from peers import FAST, OURS, packages
from results import markdown_table
from speed_training import TRAINED
from timing import verdict

#: Our peak over that of eager segment_anything on a GPU, in this batch and precision.
GPU_AIM, GPU_BATCH, GPU_PRECISION = 0.25, 8, "bfloat16"
#: Seconds a fresh process needs for its imports and for building, to guess the remaining time by.
_START = 12.0
_PEERS = {"mobile_sam": ("kornia",), "vit": ("segment_anything", "transformers, SDPA")}


def measure(kind: str, name: str, implementations: Sequence[str], shape: tuple[int, int, str]) -> list[Row]:
    """Ask one fresh process for each implementation.

    Args:
        kind: ``encoder`` or ``training``.
        name: of the encoder or the training.
        implementations: of the encoder; one empty text for a training.
        shape: side of the images in pixels, images at a time, precision.
    """
    size, batch, precision = shape
    rows: list[Row] = []
    for implementation in implementations:
        row: dict[str, Any] = {
            "kind": kind, "name": name, "implementation": implementation, "size": size, "batch": batch,
            "precision": precision, "bytes": None, "note": "", "load": load(),
        }  # fmt: skip
        try:
            answer = ask(
                what="memory", kind=kind, name=name, size=size, batch=batch, precision=precision,
                implementation=implementation,
            )  # fmt: skip
            row |= {"bytes": answer["bytes"], "note": answer.get("note", "")}
        except RuntimeError as error:
            row["note"] = failed(error)
        rows.append(row)
    return rows


def shapes(settings: Settings) -> list[tuple[int, int, str]]:
    """List what is measured: on a CPU single float32 images, on a GPU eight in bfloat16 as well."""
    kinds = [(1, "float32")] + ([(GPU_BATCH, GPU_PRECISION)] if settings.device.type == "cuda" else [])
    return [(size, batch, precision) for size in settings.sizes for batch, precision in kinds]


def cases(settings: Settings) -> list[Case]:
    """List encoders and sizes, then the trainings."""
    found = []
    for name in settings.encoders:
        implementations = [*_PEERS.get(name, _PEERS["vit"]), OURS]
        if settings.device.type == "cuda" and name not in _PEERS:
            implementations.insert(-1, FAST)
        for shape in shapes(settings):
            # The peer that is bfloat16 itself has no float32.
            those = [i for i in implementations if i != FAST or shape[2] == "bfloat16"]
            found.append(
                Case(
                    f"memory of {name}, {shape[0]} px, batch {shape[1]}, {shape[2]}",
                    _START * len(those),
                    partial(measure, "encoder", name, those, shape),
                )
            )
    shape = (settings.train_size, settings.train_batch, "float32")
    found += [
        Case(f"memory of training {name}", _START, partial(measure, "training", name, [""], shape)) for name in TRAINED
    ]
    return found


def report(rows: Sequence[Row], settings: Settings) -> str:
    """Write MiB, and ours over each implementation's."""
    lines = []
    for row in rows:
        ours = next((r["bytes"] for r in rows if _same_race(r, row) and r["implementation"] == OURS), None)
        known = bool(ours) and bool(row["bytes"])
        value = ours / row["bytes"] if known and row["implementation"] != OURS else None
        ratio = "–" if value is None else f"{value:.2f}"
        if settings.device.type == "cuda" and _has_aim(row):
            ratio = f"{ratio} ({verdict(value, GPU_AIM, at_most=True)})"
        mib = None if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}"
        lines.append([
            "pass" if row["kind"] == "encoder" else "training step", row["name"], row["implementation"] or "–",
            row["size"], row["batch"], row["precision"], mib, ratio, row["note"] or "–",
        ])  # fmt: skip
    head = ["what", "network", "implementation", "px", "batch", "precision", "peak MiB", "ours ÷ it", "note"]
    cuda = settings.device.type == "cuda"
    how = (
        f"`max_memory_allocated`, weights included; aim: at most {GPU_AIM:g} of eager segment_anything "
        f"with {GPU_BATCH} images in {GPU_PRECISION}"
        if cuda
        else "peak resident memory of the first pass above the resident memory after building, so without weights"
    )
    text = (
        f"Each row in a fresh process: {how}. Training steps: the second step of AdamW included, so gradients and "
        "moments count."
    )
    return f"{markdown_table(head, lines)}\n{footer(rows, text, packages(settings.device))}"


def _has_aim(row: Row) -> bool:
    return (row["implementation"], row["batch"], row["precision"]) == ("segment_anything", GPU_BATCH, GPU_PRECISION)


def _same_race(a: Row, b: Row) -> bool:
    return all(a[key] == b[key] for key in ("kind", "name", "size", "batch", "precision"))


PART = Part("memory", cases, report)
