"""How good is a mask: scores of one case, tables of many cases.

Conventions, the same everywhere in this project (K classes, background is class 0 and never scored):

=====================  ====  ===  =============================  ===
truth / prediction     Dice  IoU  HD95                           NSD
=====================  ====  ===  =============================  ===
both empty             1     1    0                              1
exactly one is empty   0     0    diagonal of the image          0
=====================  ====  ===  =============================  ===

The diagonal is ``|shape * spacing|``, the length no distance inside the image can exceed: a missed object
costs more than any misplaced one, and every mean stays finite. Lengths are in the unit of ``spacing``: mm
for volumes, pixels for pictures, which carry no spacing. The mean over classes counts absent classes by the
same table; ``n_empty_truth`` and the mean without empty truths say how much that lifts a result.
"""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.files import NAMES, atomic_write

#: Metrics in the order of the columns of a table.
METRICS = ("dice", "iou", "hd95", "nsd")


def score_masks(
    pred: np.ndarray,
    truth: np.ndarray,
    num_classes: int,
    spacing: Sequence[float] | None = None,
    *,
    surface: bool = False,
    tolerance: float = 1.0,
) -> dict[str, Any]:
    """Score one predicted mask against its truth.

    Args:
        pred: class indices (H, W) or (X, Y, Z), integers in ``0 .. num_classes - 1``.
        truth: the same shape and range.
        num_classes: K, background included.
        spacing: length of a pixel along each axis, in mm; ``None`` is 1, lengths then are in pixels.
        surface: also HD95 and NSD (MONAI's functions; seconds on large volumes).
        tolerance: distance at which a border point still counts as right for NSD, in the unit of ``spacing``.

    Returns:
        ``dice``, ``iou`` (and ``hd95``, ``nsd``): lists of K - 1 floats, foreground classes in order;
        ``mean_dice`` … : their means; ``truth_pixels``, ``pred_pixels``: lists of K - 1 counts.

    Raises:
        DataError: shapes differ, values are not integers or not below ``num_classes``.
        ConfigError: fewer than two classes, a spacing or a tolerance that is no length.
    """
    pred, truth = np.asarray(pred), np.asarray(truth)
    lengths = _check(pred, truth, num_classes, spacing, tolerance)
    confusion = _confusion(pred, truth, num_classes)
    in_both, in_truth, in_pred = confusion.diagonal()[1:], confusion.sum(1)[1:], confusion.sum(0)[1:]
    total, union = in_truth + in_pred, in_truth + in_pred - in_both
    per_class = {
        "dice": np.where(total == 0, 1.0, 2 * in_both / np.maximum(total, 1)),
        "iou": np.where(union == 0, 1.0, in_both / np.maximum(union, 1)),
    }
    if surface:
        distances = [_surface(pred == k, truth == k, lengths, tolerance) for k in range(1, num_classes)]
        per_class["hd95"], per_class["nsd"] = np.array(distances).T
    result: dict[str, Any] = {name: values.tolist() for name, values in per_class.items()}
    result |= {f"mean_{name}": float(values.mean()) for name, values in per_class.items()}
    result["truth_pixels"], result["pred_pixels"] = in_truth.tolist(), in_pred.tolist()
    return result


def _check(
    pred: np.ndarray, truth: np.ndarray, num_classes: int, spacing: Sequence[float] | None, tolerance: float
) -> list[float]:
    """Refuse what cannot be scored; return the spacing of each axis."""
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; at least 2 are needed: background and one object.")
    if pred.shape != truth.shape or pred.ndim not in (2, 3):
        raise DataError(f"Prediction {pred.shape} and truth {truth.shape} must be of one 2-D or 3-D shape.")
    for name, mask in (("Prediction", pred), ("Truth", truth)):
        if mask.dtype.kind not in "bui":
            raise DataError(f"{name} holds {mask.dtype} values; class indices must be integers.")
        if mask.size and (int(mask.min()) < 0 or int(mask.max()) >= num_classes):
            raise DataError(f"{name} holds {mask.min()} … {mask.max()}; expected 0 … {num_classes - 1}.")
    lengths = [1.0] * pred.ndim if spacing is None else [float(s) for s in spacing]
    if len(lengths) != pred.ndim or not all(0 < s < math.inf for s in lengths):
        raise ConfigError(f"spacing is {spacing}; expected {pred.ndim} positive lengths, one for each axis.")
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance is {tolerance}; expected a length of at least 0.")
    return lengths


def _confusion(pred: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels by (truth, prediction), (K, K); in blocks, since 64-bit indices of a whole CT fill GBs."""
    counts = np.zeros(num_classes**2, dtype=np.int64)
    pred, truth = pred.ravel(), truth.ravel()
    for start in range(0, truth.size, 1 << 22):
        block = slice(start, start + (1 << 22))
        pairs = truth[block].astype(np.int64) * num_classes + pred[block].astype(np.int64)
        counts += np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _surface(pred: np.ndarray, truth: np.ndarray, spacing: list[float], tolerance: float) -> tuple[float, float]:
    """HD95 and NSD of one class; the empty cases never reach MONAI, which answers them with nan or inf."""
    if not pred.any() and not truth.any():
        return 0.0, 1.0
    if not pred.any() or not truth.any():
        return math.hypot(*(n * s for n, s in zip(truth.shape, spacing, strict=True))), 0.0
    p, t = (torch.from_numpy(mask)[None, None] for mask in (pred, truth))
    with warnings.catch_warnings():
        # MONAI 1.6 warns at every call of an argument that it passes itself.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        hd95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=spacing)
        nsd = compute_surface_dice(p, t, [tolerance], include_background=True, spacing=spacing)
    return float(hd95), float(nsd)


@dataclass(frozen=True)
class CaseScore:
    """One row of a table: a case, its file and its scores.

    ``dice``, ``iou``, ``hd95``, ``nsd``, ``truth_pixels`` and ``pred_pixels`` hold one value for each of the
    K - 1 foreground classes; ``hd95`` and ``nsd`` are empty where they were not asked for. ``confidence`` is
    the model's own, in [0, 1], where it gives one; ``similarity`` that of the image to the supports of a network
    prompted by examples, in (0, 1]. A case named ``source/ID`` belongs to ``source``.
    """

    case: str
    image: str
    dice: tuple[float, ...]
    iou: tuple[float, ...]
    truth_pixels: tuple[int, ...]
    pred_pixels: tuple[int, ...]
    hd95: tuple[float, ...] = ()
    nsd: tuple[float, ...] = ()
    confidence: float | None = None
    similarity: float | None = None

    @classmethod
    def from_scores(
        cls,
        case: str,
        image: str | Path,
        scores: Mapping[str, Any],
        confidence: float | None = None,
        similarity: float | None = None,
    ) -> CaseScore:
        """Make a row of the result of :func:`score_masks`."""
        values = {name: tuple(scores.get(name, ())) for name in (*METRICS, "truth_pixels", "pred_pixels")}
        return cls(case=case, image=str(image), confidence=confidence, similarity=similarity, **values)

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the foreground classes, [0, 1]."""
        return float(np.mean(self.dice))

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the foreground classes, [0, 1]."""
        return float(np.mean(self.iou))

    @property
    def source(self) -> str:
        """The part of the name before the last ``/``; empty without one."""
        return self.case.rpartition("/")[0]

    @property
    def empty_truth(self) -> bool:
        """Whether the truth holds background only."""
        return not any(self.truth_pixels)


def write_case_table(path: str | Path, rows: Sequence[CaseScore], class_names: Sequence[str] | None = None) -> Path:
    """Write one CSV line for each case, in the order given; whole or not at all.

    Columns: ``case``, ``image``; ``dice_NAME``, ``iou_NAME`` (``hd95_NAME``, ``nsd_NAME``) for each
    class; their means; ``truth_pixels`` and ``pred_pixels``, foreground of all classes; ``confidence``; where
    a row has one, ``similarity``. Rows without scores (no truth) give a table without the columns of the metrics.

    Args:
        path: the file to write.
        rows: at least one row.
        class_names: names of the K - 1 foreground classes; ``None`` numbers them from 1.

    Raises:
        DataError: there is no row.
        ConfigError: the number of names is not the number of foreground classes.
    """
    names, metrics = _columns(rows, class_names)
    head = [f"{m}_{name}" for m in metrics for name in names] + [f"mean_{m}" for m in metrics]
    supported = any(row.similarity is not None for row in rows)
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8", errors=NAMES) as file:
        table = csv.writer(file)
        table.writerow(
            ["case", "image", *head, "truth_pixels", "pred_pixels", "confidence", *["similarity"] * supported]
        )
        for row in rows:
            values = [v for m in metrics for v in getattr(row, m)]
            values += [float(np.mean(getattr(row, m))) for m in metrics]
            # None becomes an empty field: a case without truth has neither scores nor true pixels.
            last = [sum(row.truth_pixels) if row.truth_pixels else None, sum(row.pred_pixels), row.confidence]
            last += [row.similarity] if supported else []
            table.writerow([row.case, row.image, *(f"{v:.6f}" for v in values), *last])
    return Path(path)


def summarise(
    rows: Sequence[CaseScore],
    *,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Sum up a table in numbers that can be quoted.

    Args:
        rows: at least one case.
        class_names: names of the K - 1 foreground classes; ``None`` numbers them from 1.
        seed: of the bootstrap, so that the same table gives the same interval.
        resamples: bootstrap draws; cases are drawn with replacement, the interval holds the middle 95 %.

    Returns:
        ``n``, ``n_empty_truth``; for each metric ``mean``, ``sd`` (of the sample; ``None`` for one case),
        ``median``, ``q1``, ``q3``, ``ci95`` and ``mean_without_empty_truth`` (``None`` if all are empty),
        over the case means; ``per_class``: mean of each metric; ``worst``: the five lowest cases by Dice;
        ``per_source`` where names carry a source. Everything is plain JSON.

    Raises:
        DataError: there is no row.
        ConfigError: the number of names is not the number of foreground classes.
    """
    names, metrics = _columns(rows, class_names)
    values = np.array([[np.mean(getattr(row, m)) for m in metrics] for row in rows])  # (n, metrics)
    filled = np.array([not row.empty_truth for row in rows])
    random = np.random.default_rng(seed)
    means = np.array([values[random.integers(0, len(rows), len(rows))].mean(0) for _ in range(resamples)])

    summary: dict[str, Any] = {"n": len(rows), "n_empty_truth": int((~filled).sum())}
    for i, metric in enumerate(metrics):
        q1, median, q3 = np.percentile(values[:, i], (25, 50, 75))
        summary[metric] = {
            "mean": float(values[:, i].mean()),
            "sd": float(values[:, i].std(ddof=1)) if len(rows) > 1 else None,
            "median": float(median),
            "q1": float(q1),
            "q3": float(q3),
            "ci95": [float(v) for v in np.percentile(means[:, i], (2.5, 97.5))],
            "mean_without_empty_truth": float(values[filled, i].mean()) if filled.any() else None,
        }
    summary["per_class"] = {
        name: {m: float(np.mean([getattr(row, m)[k] for row in rows])) for m in metrics} for k, name in enumerate(names)
    }
    worst = sorted(rows, key=lambda row: (row.mean_dice, row.case))[:5]
    summary["worst"] = [{"case": row.case, "dice": row.mean_dice, "iou": row.mean_iou} for row in worst]
    sources = np.array([row.source for row in rows])
    if sources.astype(bool).any():
        summary["per_source"] = {
            str(source): {"n": int((sources == source).sum())}
            | {m: float(values[sources == source, i].mean()) for i, m in enumerate(metrics)}
            for source in np.unique(sources)
        }
    return summary


def write_summary(path: str | Path, summary: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> Path:
    """Write a summary and, under ``meta``, what it was made of (model, data, versions, seed) as JSON."""
    text = json.dumps({**summary, "meta": dict(meta or {})}, indent=2, default=str, allow_nan=False)
    with atomic_write(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _columns(rows: Sequence[CaseScore], class_names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Names of the foreground classes and the metrics every row has."""
    if not rows:
        raise DataError("There is no scored case; give at least one prediction with its truth.")
    classes = len(rows[0].pred_pixels)
    names = [str(k) for k in range(1, classes + 1)] if class_names is None else list(class_names)
    if len(names) != classes:
        raise ConfigError(f"{len(names)} class names {names} for {classes} foreground classes.")
    return names, [m for m in METRICS if all(getattr(row, m) for row in rows)]
