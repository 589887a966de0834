"""``hspsam demo``: the main job from data to picture, in one process, through the same functions as the commands."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

from hspsam_monai.cli import workflows
from hspsam_monai.cli.console import say, tell
from hspsam_monai.cli.data_checks import require_good_data
from hspsam_monai.cli.models import shipped_model
from hspsam_monai.errors import DataError, WeightsError
from hspsam_monai.files import atomic_write

logger = logging.getLogger(__name__)

#: Small enough for four minutes and 4 GiB on two cores. The shipped model finds most phantoms already, and so short a
#: training changes its score by about a hundredth, up or down: the demo shows the way from data to masks, not a gain.
COUNT, EPOCHS, UNSEEN = 80, 6, 24
#: What differs from train.json for so short a training: the moving average must follow within tens of steps.
SETTINGS = {
    "image_size": 320,  # the shipped model's own
    "batch_size": 8,
    "lr": 2e-4,
    "warmup": 8,
    "power": 1.0,
    "ema": 0.1,
    "augmentation::camera": 0.3,
}
#: How train.json infers, so that before and after differ in the weights alone.
ALIKE = {"min_confidence": 0.0, "scales": [1]}
MARK = "demo.json"
_RESULT = ("dice_before", "dice_after", "seconds")
_LABELS = {"background": 0, "foreground": 1}
_PARTS = ("data", "unseen", "images", "before", "run", "after", "masks")


def run_demo(
    output: Path, *, data: Path | None = None, epochs: int | None = None, count: int | None = None, seed: int = 0
) -> None:
    """Train from the shipped model, compare before and after on unseen images, segment them, show where to look.

    Args:
        output: folder for everything; an earlier demo there is replaced, anything else refused.
        data: the user's data set in place of phantoms; its split ``val`` is the unseen set.
        epochs: of the training.
        count: phantoms to train on, validation included.
        seed: of phantoms and training.

    Raises:
        DataError: ``output`` holds something else or the data set itself, or the data set has faults.
    """
    begin = time.monotonic()
    if data is not None:  # before anything of an earlier demo is removed
        if data.expanduser().resolve().is_relative_to(output.expanduser().resolve()):
            raise DataError(f"{data} lies in {output}, whose earlier demo would be removed; choose another --output.")
        require_good_data(data, _LABELS, 2)
    _clear(output)
    known, unseen, split = _phantoms(output, count or COUNT, seed) if data is None else (data, data, "val")
    if data is None:
        require_good_data(known, _LABELS, 2)
    start = _start()
    before = None
    if start == "shipped":
        tell("Scoring the shipped model on unseen images …", "bold")
        scored = workflows.evaluate(unseen, None, output / "before", split=split, overrides=ALIKE)
        before = scored["dice"]["mean"]
    tell("Training …", "bold")
    settings = {**SETTINGS, "epochs": epochs or EPOCHS, "seed": seed}
    workflows.train(known, output / "run", pretrained=start, check=False, overrides=settings)
    tell("Scoring the trained model on unseen images …", "bold")
    after = workflows.evaluate(unseen, output / "run", output / "after", split=split)["dice"]["mean"]
    tell("Segmenting a folder of unseen images …", "bold")
    workflows.segment(_pictures(output, unseen, split), output / "masks", model=output / "run")
    result = dict(zip(_RESULT, (before, after, round(time.monotonic() - begin, 1)), strict=True))
    with atomic_write(output / MARK) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"Done in {result['seconds']:.0f} s.", "green")
    first = f"{before:.4f}" if before is not None else f"not known (training started from {start})"
    say(f"Mean Dice on unseen images: before {first}, after {after:.4f}", "bold green")
    if data is not None:
        say("These images chose the best epoch, too; a test set that nothing chose tells a little less.", "yellow")
    say(f"Picture: {output / 'after' / 'gallery.png'}")
    say(f"Page:    {output / 'after' / 'gallery.html'}")
    say(f"Masks:   {output / 'masks'}    Model: {output / 'run' / 'model.pt'}")


def _clear(output: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if output.is_dir() and any(output.iterdir()):
        if not _is_demo(output / MARK):
            raise DataError(f"{output}: found something that is no earlier demo; choose another --output.")
        for name in _PARTS:
            shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / MARK) as part:
        part.write_text("{}\n", encoding="utf-8")


def _is_demo(mark: Path) -> bool:
    """Whether a file says of its folder that a demo made it: with the result, or with nothing while it runs."""
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and set(content) in (set(), set(_RESULT))


def _phantoms(output: Path, count: int, seed: int) -> tuple[Path, Path, str]:
    from hspsam_monai.data import write_phantoms

    tell(f"Drawing {count} phantoms to train on and {UNSEEN} unseen ones …", "bold")
    known = write_phantoms(output / "data", count, seed)
    # Another seed: none of these frames was ever near the training.
    return known, write_phantoms(output / "unseen", UNSEEN, seed + 1_000_003, val_fraction=0), "all"


def _start() -> str:
    """Where the training starts: the shipped model, else SAM's weights, else random values."""
    from hspsam_monai.encoders.catalogue import locate

    if shipped_model().is_file():
        return "shipped"
    try:
        locate("mobile_sam")
    except WeightsError:
        logger.warning("Neither the shipped model nor MobileSAM's weights are there: training starts from random.")
        return "none"
    logger.warning("The shipped model is not there: training starts from MobileSAM's weights.")
    return "mobile_sam"


def _pictures(output: Path, unseen: Path, split: str) -> Path:
    """A folder of the unseen images alone, side by side: a union's ``source/case`` becomes ``source__case``."""
    from hspsam_monai.data import find_cases
    from hspsam_monai.data.layouts import stem_of

    if split == "all":
        return unseen / "images"
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for case in find_cases(unseen, split):
        image = Path(case["image"])
        name = plain = case["case"].replace("/", "__")
        number = 1
        while name.casefold() in taken:  # a__b/c beside a/b__c, or names that some file systems take as one
            number += 1
            name = f"{plain}_{number}"
        taken.add(name.casefold())
        shutil.copy(image, folder / (name + image.name[len(stem_of(image)) :]))
    return folder
