"""``hspsam score``: folders of masks against folders of masks, as a table for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from hspsam_monai.cli.console import out, say

if TYPE_CHECKING:
    from hspsam_monai.scores import CaseScore

_NAMES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "nsd": "NSD"}
_WORST = 10


def score(
    predictions: Path,
    labels: Path,
    *,
    classes: int = 2,
    split: str | None = None,
    surface: bool = False,
    tolerance: float = 1.0,
    partial: bool = False,
) -> tuple[list[CaseScore], dict[str, Any]]:
    """Score predictions against labels.

    Args:
        predictions: folder of masks, or one.
        labels: folder of masks, a data set, or one mask.
        classes: K, background included.
        split: only the cases of this split of the data set ``labels``.
        surface: also HD95 and NSD.
        tolerance: of NSD.
        partial: accept labels without prediction.

    Returns:
        Rows and summary.

    Raises:
        DataError: names every file that is unpaired, unreadable or does not match its partner.
    """
    from hspsam_monai.data import find_cases
    from hspsam_monai.score_folders import score_folders
    from hspsam_monai.scores import summarise

    cases = None if split is None else [case["case"] for case in find_cases(labels, split)]
    rows = score_folders(
        predictions, labels, classes, cases=cases, partial=partial, surface=surface, tolerance=tolerance
    )
    return rows, summarise(rows)


def show_scores(rows: Sequence[CaseScore], summary: dict[str, Any]) -> None:
    """Print the worst cases and, below them, mean, spread and confidence interval."""
    metrics = [name for name in _NAMES if name in summary]
    table = Table(title=f"{summary['n']} cases, worst first" if len(rows) > 1 else None)
    table.add_column("case", overflow="fold")
    for name in metrics:
        table.add_column(_NAMES[name], justify="right")
    means = {row.case: {m: sum(getattr(row, m)) / len(getattr(row, m)) for m in metrics} for row in rows}
    for case in sorted(means, key=lambda case: (means[case]["dice"], case))[:_WORST]:
        table.add_row(Text(case), *(_number(name, means[case][name]) for name in metrics))
    if len(rows) > _WORST:
        table.add_row(f"… {len(rows) - _WORST} better ones", style="dim")
    table.add_section()
    table.add_row("mean", *(_number(name, summary[name]["mean"]) for name in metrics), style="bold")
    table.add_row("sd", *(_number(name, summary[name]["sd"]) for name in metrics))
    table.add_row("median", *(_number(name, summary[name]["median"]) for name in metrics))
    for title, end in (("95 % CI from", 0), ("to", 1)):
        table.add_row(title, *(_number(name, summary[name]["ci95"][end]) for name in metrics))
    out.print(table)
    if len(summary["per_class"]) > 1:
        for name, values in summary["per_class"].items():
            say(f"class {name}: " + ", ".join(f"{_NAMES[m]} {_number(m, v)}" for m, v in values.items()))
    if summary["n_empty_truth"]:
        mean = summary["dice"]["mean_without_empty_truth"]
        without = "" if mean is None else f"; without them mean Dice {_number('dice', mean)}"
        say(f"{summary['n_empty_truth']} of {summary['n']} labels are empty{without}.")


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if metric == "hd95" else f"{value:.4f}"
