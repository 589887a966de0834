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
from common import argument_parser, logger, start_logging
from fresh import exact_float32
from parts import Case, Part, Row, Settings, failed, shipped
from results import check_section, is_published, machine_line, publish
from scoring import device
from timing import Progress

from hspsam_monai.errors import ConfigError
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
    check_given(args, parser.get_default("data"))
    start_logging()
    exact_float32()
    logger.info("%s", machine_line())
    settings = settings_of(args)
    partial = {name: args.quick or _narrowed(name, args, settings) for name in args.parts}
    return int(run([(name, PARTS[name]) for name in args.parts], settings, args, partial))


def check_given(args: argparse.Namespace, default: Path | None) -> None:
    """Refuse what was named and is not there; it would cost sections that were measured with it.

    Args:
        args: of :func:`main`.
        default: of ``--data``, which may be absent.

    Raises:
        ConfigError: ``--data``, ``--model`` or a ``--network`` does not exist.
    """
    files = {"--model": [args.model] if args.model is not None else [], "--network": args.network}
    for option, paths in files.items():
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"{option} {path}: found no such file; expected one, or leave {option} out.")
    if args.data is not None and args.data != default and not args.data.is_dir():
        raise ConfigError(f"--data {args.data}: found no such folder; expected data sets, or leave --data out.")


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


def _narrowed(name: str, args: argparse.Namespace, settings: Settings) -> bool:
    """Whether a part covers less than its table promises, or another model, so that it must not replace the whole."""
    narrowed = {
        ("encoder", "memory", "overhead"): args.sizes or args.batches,
        ("encoder", "latency", "guard"): args.compile == "no" and device().type == "cuda",
        ("overhead", "latency", "guard"): args.model is not None or args.network or shipped(settings) is None,
        ("guard",): args.guard_images is not None or args.split != "val",
    }
    return any(name in parts and bool(value) for parts, value in narrowed.items())


def run(parts: list[tuple[str, Part]], settings: Settings, args: argparse.Namespace, partial: dict[str, bool]) -> bool:
    """Measure parts one after another and publish each at its end.

    Args:
        parts: (name, part) in order.
        settings: of all of them.
        args: of :func:`common.argument_parser`.
        partial: name -> whether its figures may not reach RESULTS.md.

    Returns:
        Whether anything failed. A part is published without its failed cases; one that cannot be planned, reported or
        published, or of which nothing was measured, leaves its section as it is and costs no other.

    Raises:
        ConfigError: the results file lacks a section, seen before anything is measured.
    """
    for name, part in parts:
        if is_published(args, partial=partial[name]):
            check_section(part.section, args.results)
    any_failed = False
    plan: dict[str, list[Case]] = {}
    for name, part in parts:
        try:
            plan[name] = part.cases(settings)
        except Exception:
            logger.exception("%s cannot be planned; its section stays as it is.", part.section)
            any_failed = True
    progress = Progress([case.cost for cases in plan.values() for case in cases])
    logger.info("About %s, guessed before the first case.", clock(progress.left()))
    begin = time.monotonic()
    for name, part in parts:
        rows: list[Row] = []
        failures = []
        for case in plan.get(name, []):
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
        if not any(_has_figure(row) for row in rows):
            if name in plan:
                notes = [*failures, *dict.fromkeys(row["note"] for row in rows if row.get("note"))]
                reason = "; ".join(notes) if plan[name] else part.needs
                logger.error("Nothing of %s was measured (%s); its section stays as it is.", part.section, reason)
                any_failed |= bool(plan[name])
            continue
        missing = "".join(f"\n\nFailed: {failure}" for failure in failures)
        try:
            publish(part.section, part.report(rows, settings) + missing, args, partial=partial[name])
        except Exception:
            logger.exception("%s was measured but cannot be published; its rows: %s", part.section, rows)
            any_failed = True
    logger.info("Done in %s.", clock(time.monotonic() - begin))
    return any_failed


def _has_figure(row: Row) -> bool:
    """Whether a row holds more than the reason why it is empty."""
    figures = [row[key] for key in ("timing", "times", "bytes", "changes") if key in row]
    return not figures or any(figures)


if __name__ == "__main__":
    raise SystemExit(main())
