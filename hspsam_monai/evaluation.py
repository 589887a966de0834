"""From an engine's results to tables and pictures: the handlers behind evaluate.json and inference.json."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from hspsam_monai.data import TolerantDataset, case_name, read_image, read_mask
from hspsam_monai.errors import DataError
from hspsam_monai.inference import Closeness, SaveMaskd
from hspsam_monai.networks.proxy_prompt import FAR
from hspsam_monai.report import GalleryItem, gallery_html, gallery_png, learning_curve_png, worst_first
from hspsam_monai.scores import CaseScore, score_masks, summarise, write_case_table, write_summary

logger = logging.getLogger(__name__)

#: Cases the page shows, the worst; of further ones no mask is kept, so that a large cohort fits in memory.
MOST_SHOWN = 150

_NAMED = 8  # cases a warning lists by name
_EVERY = 30.0  # seconds between two states of the table on disk


def confidence(logits: Tensor, outlined: np.ndarray | None = None) -> float:
    """How sure the network is of one case: mean probability of the winning class over what is outlined.

    Args:
        logits: (K, H, W).
        outlined: (H, W) bool, what post-processing left of the foreground; ``None``: wherever a foreground class wins.
            Where nothing is outlined, the mean is over the whole image.

    Returns:
        A value in (1/K, 1].
    """
    best, winner = logits.float().softmax(0).max(0)
    foreground = winner > 0 if outlined is None else torch.from_numpy(outlined).to(best.device)
    return float(best[foreground].mean() if bool(foreground.any()) else best.mean())


class CaseReport:
    """Collect every case of an evaluator; at the end write table, summary, contact sheet and page.

    What an earlier run left of these is removed at the start, and the table is brought up to date every half minute, so
    that a run that is broken off has its own table or none.

    Attach to a MONAI evaluator whose post-processing leaves ``pred`` as class indices (1, H, W) and keeps
    ``image`` with its meta data; with ``label`` (1, H, W) the cases are scored.

    Args:
        folder: where ``cases.csv``, ``summary.json``, ``gallery.png`` and ``gallery.html`` go.
        labels: class name -> index, background included.
        title: headline of the page.
        meta: anything worth keeping in ``summary.json`` (model, data, split).
        surface: also HD95 and NSD, in pixels.
        sheet: also draw ``gallery.png``; off where masks lie in the same folder and one could have that name.
        network: the evaluator's network. One that is prompted by supports (Proxy Prompt) then tells how close each
            image is to them: a column of the table, and a warning for images that are far from all.

    Raises:
        DataError: when a case comes whose label is of another size than its image.
    """

    def __init__(
        self,
        folder: str | Path,
        labels: dict[str, int],
        title: str = "Segmentation",
        meta: dict[str, Any] | None = None,
        surface: bool = False,
        sheet: bool = True,
        network: nn.Module | None = None,
    ) -> None:
        self.folder, self.title, self.meta, self.surface = Path(folder), title, dict(meta or {}), surface
        self.sheet = sheet
        self.labels = dict(sorted(labels.items(), key=lambda item: item[1]))
        self.rows: list[CaseScore] = []
        self._shown: list[GalleryItem] = []  # may come to be drawn
        self._rest: list[GalleryItem] = []  # only counts
        self._logits: Sequence[Tensor] = ()
        self._saved = 0.0
        self._closeness = Closeness(network)

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        # Before post-processing turns logits into classes.
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._read)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)
        self._closeness.attach(engine)

    @property
    def items(self) -> list[GalleryItem]:
        """The gallery's cases; those that are too good to be drawn without their masks."""
        return self._shown + self._rest

    def _start(self, engine: Engine) -> None:
        self.rows, self._shown, self._rest = [], [], []
        self._saved = time.monotonic()
        for name in ("cases.csv", "summary.json", "gallery.html", *["gallery.png"] * self.sheet):
            (self.folder / name).unlink(missing_ok=True)  # an earlier run's, which this one does not confirm

    def _read(self, engine: Engine) -> None:
        self._logits = engine.state.output["pred"]
        label = engine.state.output.get("label")
        if label is not None and label.shape[-2:] != self._logits.shape[-2:]:
            (height, width), (h, w) = self._logits.shape[-2:], label.shape[-2:]
            raise DataError(
                f"{', '.join(_names(engine))}: found a mask of {w} x {h} pixels for an image of {width} x {height}; "
                "expected equal sizes. Correct the mask, or leave the case out; `hspsam check` finds all such cases."
            )

    def _collect(self, engine: Engine) -> None:
        names = _names(engine)
        near = self._closeness.values or [None] * len(names)
        for output, name, logits, close in zip(engine.state.output, names, self._logits, near, strict=True):
            prediction = _indices(output["pred"])
            sure = confidence(logits, prediction > 0)
            source = str(output["image"].meta["filename_or_obj"])
            truth = _indices(output["label"]) if output.get("label") is not None else None
            if truth is None:
                foreground = range(1, len(self.labels))
                row = CaseScore(
                    case=name,
                    image=Path(source).name,
                    dice=(),
                    iou=(),
                    truth_pixels=(),
                    pred_pixels=tuple(int((prediction == k).sum()) for k in foreground),
                    confidence=sure,
                    similarity=close,
                )
            else:
                scores = score_masks(prediction, truth, len(self.labels), surface=self.surface)
                row = CaseScore.from_scores(name, Path(source).name, scores, confidence=sure, similarity=close)
            self.rows.append(row)
            # Images are read again when the page is made, so are masks that were written; others wait as bits.
            written = output.get("saved_to")
            self._shown.append(
                GalleryItem(
                    case=name,
                    image=partial(read_image, source),
                    truth=None if truth is None else self._pack(truth),
                    prediction=partial(read_mask, written, len(self.labels)) if written else self._pack(prediction),
                    scores=row if truth is not None else None,
                    confidence=sure,
                    note="" if close is None else f"similarity to the supports {close:.2f}",
                )
            )
        self._logits = ()
        if len(self._shown) > 2 * MOST_SHOWN:
            self._shown = worst_first(self._shown)
            self._rest += [replace(item, truth=None, prediction=_gone) for item in self._shown[MOST_SHOWN:]]
            del self._shown[MOST_SHOWN:]
        if time.monotonic() - self._saved > _EVERY:
            self._save_table()

    def _save_table(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_case_table(self.folder / "cases.csv", self.rows, list(self.labels)[1:])
        self._saved = time.monotonic()

    def _pack(self, mask: np.ndarray) -> partial[np.ndarray]:
        """A mask (H, W) that waits in as few bytes as its classes need; calling it unpacks."""
        return partial(_unpack, np.packbits(mask) if len(self.labels) == 2 else mask, mask.shape)

    def _write(self, engine: Engine) -> None:
        if not self.rows:
            return
        self._save_table()
        names = list(self.labels)[1:]
        warning = far_from_supports(self.rows)
        if warning:
            logger.warning("%s", warning)
        scored = all(row.dice for row in self.rows)
        summary = summarise(self.rows, class_names=names) if scored else None
        if summary is not None:
            write_summary(self.folder / "summary.json", summary, self.meta)
            dice = summary["dice"]
            logger.info(
                "%d cases: mean Dice %.4f (95 %% CI %.4f to %.4f), median %.4f, mean IoU %.4f.",
                summary["n"], dice["mean"], *dice["ci95"], dice["median"], summary["iou"]["mean"],
            )  # fmt: skip
            for source, values in summary.get("per_source", {}).items():
                logger.info("  %s: %s", source, _short(values))
        if self.sheet:
            gallery_png(self.folder / "gallery.png", self.items, title=self.title)
        page = self.folder / "gallery.html"
        gallery_html(page, self.items, summary, self.title, warning=warning, max_items=MOST_SHOWN)
        logger.info("Tables and pictures are in %s; open gallery.html.", self.folder)


def far_from_supports(rows: Sequence[CaseScore]) -> str:
    """One sentence that names the images no support is close to; empty where there is none."""
    far = sorted((row for row in rows if row.similarity is not None and row.similarity < FAR), key=_similarity)
    if not far:
        return ""
    named = ", ".join(f"{row.case} ({row.similarity:.2f})" for row in far[:_NAMED])
    more = f" and {len(far) - _NAMED} more" if len(far) > _NAMED else ""
    return (
        f"{len(far)} of {len(rows)} images are unlike every support (similarity below {FAR:g}): {named}{more}. Do not "
        "trust their masks; add supports that look like them."
    )


def _similarity(row: CaseScore) -> float:
    return row.similarity or 0.0


class LearningCurve:
    """Draw ``learning_curve.png`` from ``learning_curve.csv`` after every epoch; attach after the Checkpointer.

    Args:
        folder: the run's folder.
        metric: column of the validation's key metric.
    """

    main_process_only = True

    def __init__(self, folder: str | Path, metric: str = "val_mean_dice") -> None:
        self.folder, self.metric = Path(folder), metric

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        """Draw what the table holds so far."""
        path = self.folder / "learning_curve.csv"
        if not path.is_file():
            return
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        series = {"training loss": [float(row["loss"]) for row in rows]}
        # Epochs without a validation are gaps.
        scores = [float(row[self.metric]) if row.get(self.metric) else math.nan for row in rows]
        if not all(math.isnan(score) for score in scores):
            series["validation Dice"] = scores
        learning_curve_png(self.folder / "learning_curve.png", [int(row["epoch"]) for row in rows], series)


def raise_failures(dataset: TolerantDataset, saver: SaveMaskd | None = None) -> None:
    """End a run over a tolerant data set: if cases were left out, name them all.

    Args:
        dataset: with its failures.
        saver: what wrote the masks: its failures count, too, and it knows which failed cases still have a mask of an
            earlier run.

    Raises:
        DataError: at least one case failed; everything else has been done.
    """
    failures = dataset.failures + ([] if saver is None else saver.failures)
    if not failures:
        return
    images = {} if saver is None else {case_name(case): case["image"] for case in dataset.data}
    listing = ""
    for case, reason in failures:
        listing += f"\n  {case}: {reason}"
        mask = saver.of_before(images[case], case) if (case, reason) in dataset.failures and case in images else None
        listing += f" ({mask} is an earlier run's.)" if mask else ""
    done = len(dataset.data) - len(failures)
    raise DataError(f"{len(failures)} of {len(dataset.data)} files failed, {done} are done:{listing}")


def _short(values: Any) -> str:
    if isinstance(values, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in values.items())
    return f"{values:.4f}" if isinstance(values, float) else str(values)


def _indices(mask: Tensor) -> np.ndarray:
    """(1, H, W) class indices -> (H, W) uint8."""
    return np.asarray(mask.detach().cpu())[0].astype(np.uint8)


def _names(engine: Engine) -> list[str]:
    """The cases of the batch that an evaluator is at."""
    batch = engine.state.batch
    if not isinstance(batch, dict):
        return [case_name(item) for item in batch]
    if "case" in batch:
        return list(batch["case"])
    return [case_name({"image": path}) for path in batch["image"].meta["filename_or_obj"]]


def _gone() -> np.ndarray:
    raise AssertionError("A case that is not among the worst was to be drawn.")


def _unpack(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if packed.ndim == 2:
        return packed
    return np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape)
