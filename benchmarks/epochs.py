"""How long an epoch takes on stored features, against the preset that adapts the encoder by LoRA.

Both are trainings of the bundle with their overlays (``hsp_sam_frozen``, ``hsp_sam_lora``) on the same images: reading,
augmentation, network, loss, AdamW, averaging of weights; all but the validation. Memory is handled as in
``hspsam train`` (:func:`hspsam_monai.cli.keep_freed_memory`). They take turns. What storing the
features takes, once, stands beside. What the presets reach is ``stored_features.py``; steps alone are ``speed.py``.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, cases_of, start_logging
from ignite.engine import Engine, Events
from results import machine, machine_line, markdown_table, publish
from speed_training import CACHE_AIM
from stored_features import PRESETS
from studies import common_overrides, config_files, merged_config, train, training_arguments
from timing import verdict

from hspsam_monai.cli import keep_freed_memory
from hspsam_monai.errors import ConfigError

SECTION = "epochs"
LORA, STORED = PRESETS


class EpochClock:
    """Seconds of each epoch of a trainer, from its beginning to the end of its last step; and those before the first.

    Attributes:
        epochs: seconds of each.
        before: seconds between the start and the first epoch, in which features are stored.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.before = 0.0
        self._begin = self._last = 0.0

    def attach(self, trainer: Engine) -> None:
        """Follow a trainer."""
        begin = time.perf_counter()

        def started() -> None:
            self._begin = time.perf_counter()
            self.before = self.before or self._begin - begin

        def stepped() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._last = time.perf_counter()

        trainer.add_event_handler(Events.EPOCH_STARTED, started)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, stepped)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.epochs.append(self._last - self._begin))


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argument_parser("epochs", __doc__)
    training_arguments(parser)
    parser.set_defaults(epochs=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often the presets take turns")
    parser.add_argument("--images", type=int, default=256, help="so many of the training split")
    args = parser.parse_args(argv)
    start_logging()
    kept = keep_freed_memory()
    count = min(args.images, len(cases_of(args.data, "train")))
    if count < 1 or args.rounds < 1 or args.epochs < 1:
        raise ConfigError("images, rounds and epochs must be 1 or more.")
    clocks: dict[str, list[EpochClock]] = {preset: [] for preset in PRESETS}
    _remove(args.output / "features")  # those that are there already would cost nothing
    views = 0
    for turn in range(args.rounds):
        for preset, overlay in PRESETS.items():
            clock = EpochClock()
            folder = args.output / f"{preset.replace(' ', '-').lower()}-{turn}"
            _remove(folder)
            config = _overrides(args, preset, count, folder)
            train(config_files(overlay), config, clock.attach)
            clocks[preset].append(clock)
            views = views if preset == LORA else merged_config(overlay, config).get("feature_views")
    _remove(args.output / "features")
    publish(SECTION, _report(clocks, count, views, kept, args), args)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _overrides(args: Any, preset: str, count: int, output: Path) -> dict[str, Any]:
    """What differs from the bundle's training: fewer images, and a validation of one at the very end."""
    found = common_overrides(args)
    found |= {"dataset_dir": str(args.data), "labels": {"background": 0, "object": 1}, "output_dir": str(output)}
    found |= {"seed": args.seeds[0], "val_interval": args.epochs}
    cases = "$hspsam_monai.data.find_cases(@dataset_dir, @{}_split)[:{}]"
    found["train::dataset::dataset::data" if preset == STORED else "train::dataset::data"] = cases.format(
        "train", count
    )
    found["validate::dataset::data"] = cases.format("val", 1)
    if preset == STORED:
        # The stored images' data set holds the list, in the validation as well.
        found["validate::dataset::dataset::data"] = found.pop("validate::dataset::data")
        found["feature_cache"] = str(args.output / "features")
    return found


def _report(clocks: Mapping[str, list[EpochClock]], count: int, views: int, kept: bool, args: Any) -> str:
    times = {preset: [seconds for clock in each for seconds in clock.epochs] for preset, each in clocks.items()}
    lora = statistics.median(times[LORA])
    rows = []
    for preset, seconds in times.items():
        gain = lora / statistics.median(seconds)
        rows.append([
            preset, *(f"{pick(seconds):.1f}" for pick in (min, statistics.median, max)), len(seconds), f"{gain:.2f} ×",
            f"{min(times[LORA]) / min(seconds):.2f} ×", verdict(gain, CACHE_AIM if preset == STORED else None),
        ])  # fmt: skip
    head = ["preset", "min s", "median s", "max s", "epochs", "speed against LoRA", "by minima", "aim"]
    stored = statistics.median(times[STORED])
    # Later rounds find the features stored, but must look through them.
    filling = clocks[STORED][0].before
    pays = f"is won back after {filling / (lora - stored):.1f} epochs" if stored < lora else "is never won back"
    settings = ", ".join(args.settings)
    text = (
        f"An epoch of {count} images of the training split, validation left out; the presets take turns, "
        f"{args.rounds} rounds of {args.epochs} epochs"
        f"{f', {args.image_size} px' if args.image_size else ''}{f', {settings}' if settings else ''}. Storing the "
        f"features of {views} views of each image took {filling:.0f} s once, which {pays}. "
        f"Freed memory is {'kept, as in hspsam train' if kept else 'given back'}. "
        f"Load when finished {machine()['load'] or 0:.1f}."
    )
    return f"{markdown_table(head, rows)}\n{text}\n\n{machine_line()}"


if __name__ == "__main__":
    main()
