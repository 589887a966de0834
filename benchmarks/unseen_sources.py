"""Leave one source out: train on one hospital's polyps, test on another's, with and without self-prompting.

``hsp`` is train.json's own network, ``static`` and ``none`` the same with the paper's static prompts and without any,
``plain`` the same encoder under a convolutional pyramid (:class:`hspsam_monai.networks.ConvPyramidSAM`); data order,
augmentation, budget and image size are the same. The epoch is picked on the validation split of the source trained
on; the other source is only ever tested on.
"""

from __future__ import annotations

import numpy as np
from common import argument_parser, cases_of, start_logging
from results import machine_line, markdown_table, publish
from scoring import MISSED, mean_over_seeds, paired_bootstrap
from studies import Run, Study, budget, common_overrides, iterations_argument, merged_config, training_arguments

from hspsam_monai.errors import ConfigError

SECTION = "unseen-sources"
#: Variant -> overlay of the bundle and what is overridden besides.
VARIANTS: dict[str, tuple[str | None, dict[str, str]]] = {
    "hsp": (None, {}),
    "plain": ("network/conv_pyramid.json", {}),
    "static": (None, {"network_def::prompt_source": "static"}),
    "none": (None, {"network_def::prompt_source": "none"}),
}
#: The variant every other is compared with.
BASELINE = "plain"
DIRECTIONS = ("kvasir:clinicdb", "clinicdb:kvasir")
#: Consecutive frames drawn together for the second interval (choice: about one video sequence of ClinicDB).
BLOCK = 20


def main(argv: list[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argument_parser("unseen_sources", __doc__)
    training_arguments(parser)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), metavar="TRAIN:TEST")
    iterations_argument(parser)
    args = parser.parse_args(argv)
    start_logging()

    common = common_overrides(args)
    encoders = {merged_config(VARIANTS[v][0], common).get("network_def")["encoder"] for v in args.variants}
    if len(encoders) > 1:
        raise ConfigError(f"The variants use different encoders ({', '.join(sorted(encoders))}); expected one.")
    keys, runs = [], []
    for direction in args.directions:
        train_set, sign, test_set = direction.partition(":")
        if not sign or train_set == test_set:
            raise ConfigError(f"--directions got {direction!r}; expected TRAIN:TEST, two folders of {args.data}.")
        tests = {"seen": cases_of(args.data / train_set, "val"), "unseen": cases_of(args.data / test_set, "all")}
        steps = budget(args.iterations, len(cases_of(args.data / train_set, "train")), common)
        for seed in args.seeds:
            for variant in args.variants:
                keys.append((direction, variant, seed))
                overlay, changed = VARIANTS[variant]
                overrides = {**common, **steps, **changed, "dataset_dir": str(args.data / train_set), "seed": seed}
                runs.append(Run(f"{train_set}-{test_set}-{variant}-{seed}", overrides, overlay, tests))
    study = Study(args.output, runs)
    scores = dict(zip(keys, study.complete(), strict=True))
    publish(SECTION, _report(args.directions, args.variants, args.seeds, scores, study), args)


def _report(directions: list[str], variants: list[str], seeds: list[int], scores: dict, study: Study) -> str:
    head = ["train → test", "variant", "seen val Dice", *(f"unseen Dice, seed {s}" for s in seeds), "unseen Dice, mean"]
    head += [f"missed (Dice < {MISSED})", f"difference to {BASELINE} [95 % CI]", f"the same, blocks of {BLOCK} frames"]
    rows = []
    for direction in directions:
        sets = {v: {t: [scores[direction, v, s][t] for s in seeds] for t in ("seen", "unseen")} for v in variants}
        unseen = {v: mean_over_seeds(sets[v]["unseen"]) for v in variants}
        for variant in variants:
            seed_means = [float(np.mean(list(run.values()))) for run in sets[variant]["unseen"]]
            missed = np.mean([np.mean(np.array(list(run.values())) < MISSED) for run in sets[variant]["unseen"]])
            intervals = ["–", "–"]
            if variant != BASELINE and BASELINE in variants:
                pair = (unseen[variant], unseen[BASELINE])
                intervals = [paired_bootstrap(*pair), paired_bootstrap(*pair, block=BLOCK)]
            seen = float(mean_over_seeds(sets[variant]["seen"]).mean())
            count = len(unseen[variant])
            rows.append([
                f"{direction.replace(':', ' → ')} ({count} images)", variant, seen, *seed_means,
                float(np.mean(seed_means)), f"{missed:.1%}", *intervals,
            ])  # fmt: skip
    text = (
        "Dice is the per-image mean at stored resolution. The epoch was picked on the seen validation split, whose "
        "figure is therefore a little too high; unseen images were never used to choose anything. Intervals: paired "
        "bootstrap over images of the difference of each image's mean over seeds, so they hold for these trained "
        "networks and say nothing about further seeds. ClinicDB's neighbouring frames are alike: there the interval "
        "over blocks of consecutive frames is the honest one (Kvasir's images have no order)."
    )
    return f"{markdown_table(head, rows)}\n{text}\n\n{study.describe()}\n\n{machine_line()}"


if __name__ == "__main__":
    main()
