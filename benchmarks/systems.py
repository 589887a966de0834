"""The systems side by side: HSP-SAM, SAM-SP and SAM's decoder alone on one encoder, one budget, one augmentation.

Each is its bundle overlay as it stands, so it keeps its own learning rate and its own way to adapt the encoder; the
images, their order, the number of steps and the image size are the same. ``hsp`` is train.json's own network,
``hsp-lora`` the same with the encoder adapted as SAM-SP's is.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import argument_parser, by_source, cases_of, shared_folder, start_logging
from results import machine_line, markdown_table, publish
from scoring import MISSED, dice_columns, mean_over_seeds, paired_bootstrap
from studies import Run, Study, budget, common_overrides, iterations_argument, training_arguments

SECTION = "systems"
#: System -> overlay of its network and what is overridden besides.
SYSTEMS: dict[str, tuple[str | None, dict[str, object]]] = {
    "hsp": (None, {}),
    "hsp-lora": (None, {"network_def::adapt": "lora", "network_def::lora_rank": 8}),
    "sam-sp": ("network/sam_sp.json", {}),
    "sam-sp-full": ("network/sam_sp.json", {"network_def::adapt": "full"}),
}
#: The system that the others are compared with.
OURS = "hsp"
SETS = ("polyp", "skin/isic2018")


def main(argv: list[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argument_parser("systems", __doc__)
    training_arguments(parser)
    iterations_argument(parser)
    shared = shared_folder()
    parser.set_defaults(data=shared and shared / "data")
    parser.add_argument("--sets", nargs="+", default=list(SETS), metavar="FOLDER", help="data sets below --data")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=["hsp", "sam-sp"])
    args = parser.parse_args(argv)
    start_logging()

    common = common_overrides(args)
    keys, runs = [], []
    for name in args.sets:
        root = args.data / name
        tests = by_source(cases_of(root, "val"))
        steps = budget(args.iterations, len(cases_of(root, "train")), common)
        for system in args.systems:
            overlay, changed = SYSTEMS[system]
            for seed in args.seeds:
                keys.append((name, system, seed))
                overrides = {**common, **steps, **changed, "dataset_dir": str(root), "seed": seed}
                overrides["labels"] = {"background": 0, "object": 1}
                runs.append(Run(f"{root.name}-{system}-{seed}", overrides, overlay, tests))
    study = Study(args.output, runs)
    scores = dict(zip(keys, study.complete(), strict=True))
    text = _report(args.sets, args.systems, args.seeds, scores)
    publish(SECTION, f"{text}\n\n{study.describe()}\n\n{machine_line()}", args)


def _report(sets: Sequence[str], systems: Sequence[str], seeds: Sequence[int], scores: dict) -> str:
    head = ["validation images", "system", *(f"Dice, seed {seed}" for seed in seeds), "Dice, mean"]
    head += [f"missed (Dice < {MISSED})", f"{OURS} minus it [95 % CI over images]"]
    rows = []
    for name in sets:
        for source in scores[name, systems[0], seeds[0]]:
            own = mean_over_seeds([scores[name, OURS, seed][source] for seed in seeds]) if OURS in systems else None
            for system in systems:
                tables = [scores[name, system, seed][source] for seed in seeds]
                other = mean_over_seeds(tables)
                compared = "–" if own is None or system == OURS else str(paired_bootstrap(own, other))
                label = f"{name if source == 'val' else f'{name}/{source}'} ({len(other)})"
                rows.append([label, system, *dice_columns(tables), compared])
    text = (
        "Dice is the per-image mean at stored resolution, one pass. The same splits picked the epoch, so the figures "
        "compare the systems and are a little too high in themselves. Intervals: paired bootstrap over images of "
        "each image's mean over seeds."
    )
    return f"{markdown_table(head, rows)}\n{text}"


if __name__ == "__main__":
    main()
