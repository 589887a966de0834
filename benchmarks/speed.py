"""Speed and memory, ours and peers side by side: encoders, peak memory, prompt-free path, latency, training, accuracy.

All contenders of a case take turns in one process, on the same weights and inputs. Each part writes its own section of
RESULTS.md as soon as it is done. The same program measures on a GPU, where compiled rows, larger batches and
segment_anything_fast (if installed) are added.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import speed_encoder
import speed_guard
import speed_memory
import speed_network
import speed_training
import torch
from common import argument_parser, device, logger, machine_line, publish, start_logging
from parts import Part, Row, Settings, failed
from timing import Progress

from hspsam_monai.training.handlers import clock

#: In the order in which they run; each has a section of RESULTS.md.
PARTS: dict[str, Part] = {
    "encoder": speed_encoder.PART,
    "memory": speed_memory.PART,
    "overhead": speed_network.OVERHEAD,
    "latency": speed_network.LATENCY,
    "training": speed_training.PART,
    "guard": speed_guard.PART,
}
#: A smoke run: every path, no figure worth keeping.
QUICK = {
    "sizes": (64,), "batches": (1,), "seconds": 0.0, "least": 1, "most": 2, "latency_rounds": 2, "cold_rounds": 1,
    "train_size": 64, "train_batch": 2, "guard_images": 2, "compile_batches": (1,),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure the parts that are asked for; 1 if a case failed."""
    parser = argument_parser("speed", __doc__, data_required=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--quick", action="store_true", help="smoke run at tiny sizes; never reaches RESULTS.md")
    parser.add_argument("--seconds-per-case", type=float, default=15.0, help="time budget of a case after its warm-up")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides in pixels; default 256 512 1024")
    parser.add_argument("--batches", type=int, nargs="+", help="images at a time; default 1 4, on a GPU 1 4 8 32")
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help="auto: on a GPU")
    parser.add_argument("--guard-images", type=int, help="only so many images of the guard, spread over the split")
    parser.add_argument("--split", default="val", help="whose images the guard segments")
    parser.add_argument("--model", type=Path, help="HSP-SAM checkpoint; default: the bundle's")
    parser.add_argument(
        "--network", type=Path, nargs="+", default=[], help="what describes it; default: inference.json"
    )
    args = parser.parse_args(argv)
    start_logging()
    logger.info("%s", machine_line())
    settings = settings_of(args)
    partial = {name: args.quick or _narrowed(name, args) for name in args.parts}
    return int(run([(name, PARTS[name]) for name in args.parts], settings, args, partial))


def settings_of(args: argparse.Namespace) -> Settings:
    """Turn the command line into settings for this device."""
    cuda = device().type == "cuda"
    found = Settings(
        batches=(1, 4, 8, 32) if cuda else (1, 4),
        seconds=args.seconds_per_case,
        compile=cuda if args.compile == "auto" else args.compile == "yes",
        model=args.model,
        network_files=tuple(args.network),
        data=args.data if args.data is not None and args.data.is_dir() else None,
        split=args.split,
        guard_images=args.guard_images,
    )
    if args.quick:
        found = replace(found, **QUICK)
    given = {key: tuple(getattr(args, key)) for key in ("sizes", "batches") if getattr(args, key)}
    return replace(found, **given)


def _narrowed(name: str, args: argparse.Namespace) -> bool:
    """Whether a part covers less than its table promises, so that it must not replace the whole."""
    if name == "guard":
        return args.guard_images is not None
    return bool(args.sizes or args.batches) and name in ("encoder", "memory", "overhead")


def run(parts: list[tuple[str, Part]], settings: Settings, args: argparse.Namespace, partial: dict[str, bool]) -> bool:
    """Measure parts one after another and publish each at its end.

    Args:
        parts: (name, part) in order.
        settings: of all of them.
        args: of :func:`common.argument_parser`.
        partial: name -> whether its figures may not reach RESULTS.md.

    Returns:
        Whether a case failed. Its part is published without it.
    """
    plan = {name: part.cases(settings) for name, part in parts}
    progress = Progress([case.cost for cases in plan.values() for case in cases])
    logger.info("About %s, guessed before the first case.", clock(progress.left()))
    begin, any_failed = time.monotonic(), False
    for name, part in parts:
        rows: list[Row] = []
        failures = []
        for case in plan[name]:
            progress.begin(case.label)
            try:
                rows += case.run()
            except Exception as error:  # one case must not cost the hours of the others; the exit code tells
                logger.exception("%s failed.", case.label)
                failures.append(f"{case.label}: {failed(error)}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        speed_encoder.models.cache_clear()
        any_failed |= bool(failures)
        if plan[name] and not rows:
            logger.error("Nothing of %s could be measured; its section stays as it is.", part.section)
            continue
        missing = "".join(f"\n\nFailed: {failure}" for failure in failures)
        publish(part.section, part.report(rows, settings) + missing, args, partial=partial[name])
    logger.info("Done in %s.", clock(time.monotonic() - begin))
    return any_failed


if __name__ == "__main__":
    raise SystemExit(main())
