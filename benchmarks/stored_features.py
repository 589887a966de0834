"""What stored features cost in Dice: the preset that trains on them against the one that adapts the encoder by LoRA.

Both are the bundle's overlays as they stand (``hsp_sam_frozen``, ``hsp_sam_lora``): the same images, augmentation,
number of steps, decoder and prompts; in one the prompts join a LoRA encoder's attention, in the other a frozen encoder
has spoken once. How much faster the steps are is ``speed.py --parts training``.
"""

from __future__ import annotations

from common import argument_parser, by_source, cases_of, start_logging
from results import machine_line, markdown_table, publish
from scoring import MISSED, dice_columns, mean_over_seeds, paired_bootstrap
from studies import Run, Study, budget, common_overrides, iterations_argument, training_arguments

SECTION = "stored-features"
#: Preset -> overlay of its network; the others are compared with the first.
PRESETS = {"LoRA": "network/hsp_sam_lora.json", "stored features": "network/hsp_sam_frozen.json"}


def main(argv: list[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argument_parser("stored_features", __doc__)
    training_arguments(parser)
    iterations_argument(parser)
    args = parser.parse_args(argv)
    start_logging()

    tests = by_source(cases_of(args.data, "val"))
    common = common_overrides(args)
    common |= budget(args.iterations, len(cases_of(args.data, "train")), common)
    common |= {"dataset_dir": str(args.data), "labels": {"background": 0, "object": 1}}
    keys = [(preset, seed) for preset in PRESETS for seed in args.seeds]
    runs = [
        Run(f"{preset.replace(' ', '-').lower()}-{seed}", {**common, "seed": seed}, PRESETS[preset], tests)
        for preset, seed in keys
    ]
    study = Study(args.output, runs)
    scores = dict(zip(keys, study.complete(), strict=True))
    text = _report(args.seeds, list(tests), scores)
    publish(SECTION, f"{text}\n\n{study.describe()}\n\n{machine_line()}", args)


def _report(seeds: list[int], sources: list[str], scores: dict) -> str:
    first = next(iter(PRESETS))
    head = ["validation images", "preset", *(f"Dice, seed {seed}" for seed in seeds), "Dice, mean"]
    head += [f"missed (Dice < {MISSED})", f"difference to {first} [95 % CI over images]"]
    rows = []
    for source in sources:
        base = mean_over_seeds([scores[first, seed][source] for seed in seeds])
        for preset in PRESETS:
            tables = [scores[preset, seed][source] for seed in seeds]
            own = mean_over_seeds(tables)
            compared = "–" if preset == first else str(paired_bootstrap(own, base))
            rows.append([f"{source} ({len(own)})", preset, *dice_columns(tables), compared])
    text = (
        "Dice is the per-image mean at stored resolution, one pass. The same splits picked the epoch, so the figures "
        "compare the presets and are a little too high in themselves."
    )
    return f"{markdown_table(head, rows)}\n{text}"


if __name__ == "__main__":
    main()
