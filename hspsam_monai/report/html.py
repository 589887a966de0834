"""One HTML page for a whole run: headline, histogram, and a table of cases that sorts and filters.

The page is one file: style, script and pictures are inside, and a content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.files import NAMES, atomic_write
from hspsam_monai.inference.mask_files import PALETTE
from hspsam_monai.report.gallery import GalleryItem, colour_key, panel_names, worst_first
from hspsam_monai.report.page import FRAME, SCRIPT, STYLE

#: No picture is wider or higher, whatever is asked for: the page must open on a slow machine.
MAX_THUMBNAIL = 320

_LABELS = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "nsd": "NSD"}


def gallery_html(
    path: str | Path,
    items: Sequence[GalleryItem],
    summary: Mapping[str, Any] | None = None,
    title: str = "Cases",
    *,
    warning: str = "",
    max_items: int = 150,
    thumbnail: int = 240,
    palette: np.ndarray = PALETTE,
) -> Path:
    """Write the gallery of a run as one self-contained page, worst cases first.

    Args:
        path: the HTML file to write, whole or not at all.
        items: at least one case, with or without truth.
        summary: result of :func:`hspsam_monai.scores.summarise`, of **all** cases; ``None`` without truth.
        title: heading.
        warning: a sentence to read before all others, such as which cases not to trust.
        max_items: cases to show, the worst; the page says how many are left out. A case takes about 80 KB.
        thumbnail: longest side of a picture in pixels, at most 320.
        palette: (N, 3) uint8 RGB.

    Raises:
        DataError: no case, or image and masks of a case differ in size.
        ConfigError: ``max_items`` below 1 or ``thumbnail`` outside 32 … 320.
    """
    if not items:
        raise DataError("A gallery needs at least one case.")
    if max_items < 1 or not 32 <= thumbnail <= MAX_THUMBNAIL:
        raise ConfigError(f"max_items={max_items}, thumbnail={thumbnail}; expected 1 or more, 32 … 320.")
    shown = worst_first(items)[:max_items]
    dice = [item.dice for item in items if item.dice is not None]
    parts = [
        f'<section role="alert"><h2>Look here first</h2>{escape(warning)}</section>' if warning else "",
        _headline(summary, len(items)),
        _histogram(dice) if dice else "",
        _sources(summary),
        _table(shown, len(items), thumbnail, palette),
    ]
    page = FRAME.format(title=escape(title), body="\n".join(filter(None, parts)), style=STYLE, script=SCRIPT)
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8", errors=NAMES)
    return Path(path)


def _headline(summary: Mapping[str, Any] | None, count: int) -> str:
    """Make a card of each number to quote."""
    if not summary or "dice" not in summary:
        return f'<section class="cards">{_card("Cases", str(count), "no truth: nothing is scored")}</section>'
    cards = []
    for name, label in _LABELS.items():
        if name not in summary:
            continue
        low, high = summary[name]["ci95"]
        small = f"95 % CI {_number(name, low)} – {_number(name, high)}"
        kind = "main" if name == "dice" else ""
        cards.append(_card(f"Mean {label}", _number(name, summary[name]["mean"]), small, kind))
    spread = summary["dice"]
    quartiles = f"quartiles {spread['q1']:.3f} – {spread['q3']:.3f}"
    cards.append(_card("Median Dice", f"{spread['median']:.3f}", quartiles))
    empty = summary.get("n_empty_truth", 0)
    note = f"{empty} without any object" if empty else "each with an object"
    if empty and spread.get("mean_without_empty_truth") is not None:
        note += f"; mean Dice of the others {spread['mean_without_empty_truth']:.3f}"
    cards.append(_card("Cases", str(summary.get("n", count)), note))
    return f'<section class="cards">{"".join(cards)}</section>'


def _card(name: str, value: str, small: str, kind: str = "") -> str:
    return (
        f'<div class="card {kind}"><h2>{escape(name)}</h2><p class="value">{escape(value)}</p>'
        f"<p>{escape(small)}</p></div>"
    )


def _histogram(dice: Sequence[float], bins: int = 20) -> str:
    """Bars of the case means of Dice over 0 … 1, inline SVG."""
    counts, _ = np.histogram(dice, bins=bins, range=(0, 1))
    width, height, left, base = 640, 150, 34, 128
    step, top = (width - left - 8) / bins, 14
    tallest = max(int(counts.max()), 1)
    marks = []
    for i, count in enumerate(counts):
        bar = (base - top) * count / tallest
        x, low, high = left + i * step, i / bins, (i + 1) / bins
        marks.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{base - bar:.1f}" width="{step - 2:.1f}" '
            f'height="{bar:.1f}" rx="2">'
            f"<title>Dice {low:.2f} – {high:.2f}: {count} of {len(dice)}</title></rect>"
        )
        if count:
            marks.append(f'<text x="{x + step / 2:.1f}" y="{base - bar - 3:.1f}">{count}</text>')
    for i in range(0, bins + 1, 4):
        marks.append(f'<text x="{left + i * step:.1f}" y="{base + 15}">{i / bins:.1f}</text>')
    return (
        '<section><h2>Dice of the cases</h2><svg role="img" aria-label="Histogram of Dice" '
        f'viewBox="0 0 {width} {height}">'
        f'<line class="axis" x1="{left}" y1="{base}" x2="{width - 8}" y2="{base}"/>'
        f"{''.join(marks)}</svg></section>"
    )


def _sources(summary: Mapping[str, Any] | None) -> str:
    """Make a small table of the means of each source, where there is more than one."""
    sources = (summary or {}).get("per_source", {})
    if len(sources) < 2:
        return ""
    metrics = [name for name in _LABELS if name in next(iter(sources.values()))]
    head = "".join(f"<th>{_LABELS[name]}</th>" for name in metrics)
    rows = "".join(
        f"<tr><td>{escape(source or '(none)')}</td><td>{values['n']}</td>"
        + "".join(f"<td>{_number(name, values[name])}</td>" for name in metrics)
        + "</tr>"
        for source, values in sources.items()
    )
    return (
        '<section><h2>By source</h2><table class="plain"><thead><tr><th>Source</th><th>Cases</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _table(shown: Sequence[GalleryItem], total: int, thumbnail: int, palette: np.ndarray) -> str:
    """Make the table of cases, with the key of the colours and the controls above it."""
    with_truth = any(item.truth is not None for item in shown)
    scored = [item for item in shown if item.scores is not None]
    columns = [m for m in _LABELS if scored and all(getattr(item.scores, m) for item in scored)]
    columns += ["confidence"] if any(item.certainty is not None for item in shown) else []
    heads = [("name", "Case"), *(("number", _LABELS.get(c, c.capitalize())) for c in columns)]
    head = "".join(
        f'<th class="{kind}"><button type="button" data-column="{i}">{label}</button></th>'
        for i, (kind, label) in enumerate(heads)
    )
    order = "worst first" if scored else "least confident first" if columns else "in the order given"
    note = f"{len(shown)} of {total} cases, {order}"
    if len(shown) < total:
        note += f"; {total - len(shown)} more are left out to keep this page small"
    limit = '<input id="below" type="number" min="0" max="1" step="0.05" placeholder="1">'
    limit = f"<label>Dice below {limit}</label>" if scored else ""
    rows = "".join(_row(item, columns, thumbnail, palette) for item in shown)
    return (
        '<section><h2>Cases</h2><div class="controls"><label>Name <input id="find" type="search" '
        f'placeholder="part of a name"></label>{limit}<span id="count" aria-live="polite"></span></div>'
        f'<p class="note">{note}.</p>{_key(shown)}'
        f'<table id="cases"><thead><tr>{head}<th>{" · ".join(panel_names(with_truth))}</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></section>"
    )


def _key(shown: Sequence[GalleryItem]) -> str:
    """Say what the colours mean."""
    spans = (
        f'<span><i style="background:#{bytes(colour).hex()}"></i>{name}</span>' for name, colour in colour_key(shown)
    )
    return f'<p class="key">{"".join(spans)}</p>'


def _row(item: GalleryItem, columns: Sequence[str], thumbnail: int, palette: np.ndarray) -> str:
    """Make one line of the table; the script sorts and filters by its ``data-`` attributes."""
    name = escape(item.case)
    note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
    cells = [f'<td class="name" data-value="{name}">{name}{note}</td>']
    for column in columns:
        if column == "confidence":
            value = item.certainty
        else:
            value = None if item.scores is None else float(np.mean(getattr(item.scores, column)))
        raw, shown = ("", "–") if value is None else (f"{value:.6f}", _number(column, value))
        cells.append(f'<td class="number" data-value="{raw}">{shown}</td>')
    captions = panel_names(item.truth is not None)
    figures = "".join(
        f'<figure><img src="{_data_uri(picture)}" width="{picture.shape[1]}" height="{picture.shape[0]}" '
        f'alt="{name}: {caption.lower()}" loading="lazy"><figcaption>{caption}</figcaption></figure>'
        for caption, picture in zip(captions, item.panels(thumbnail, palette), strict=True)
    )
    dice = "" if item.dice is None else f"{item.dice:.6f}"
    return (
        f'<tr data-name="{escape(item.case.lower())}" data-dice="{dice}">{"".join(cells)}'
        f"<td><div>{figures}</div></td></tr>"
    )


def _number(metric: str, value: float) -> str:
    # Fractions of a pixel or mm mean little in a length; the others lie in 0 … 1.
    return f"{value:.1f}" if metric == "hd95" else f"{value:.3f}"


def _data_uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    # Full-resolution colour (4:4:4): subsampling would smear the thin coloured outlines.
    Image.fromarray(picture).save(buffer, format="JPEG", quality=85, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
