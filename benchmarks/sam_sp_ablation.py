"""What SAM-SP's second pass brings: S = 0, 1, 2 passes; box, mask or points as prompt; with and without distillation.

Variants change one thing at a time, starting from the overlay ``network/sam_sp.json`` with S = 1 and the box (the
paper's). All are trained on the train splits of every source together with the same budget, and scored on the
validation split of each source; S = 0 is SAM fine-tuned alike without prompting itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from common import argument_parser, by_source, cases_of, start_logging
from results import machine_line, markdown_table, publish
from scoring import mean_over_seeds, paired_bootstrap
from studies import Run, Study, common_overrides, training_arguments

from hspsam_monai.networks.self_prompts import KINDS

SECTION = "sam-sp-ablation"
OVERLAY = "network/sam_sp.json"


@dataclass(frozen=True)
class Variant:
    """One network of the ablation.

    Attributes:
        steps: S self-prompting passes.
        prompt: kinds of prompt, of :data:`hspsam_monai.networks.self_prompts.KINDS`.
        distilled: whether the last pass teaches the first.
        corrections: marks of a simulated person; 0 is the paper's training.
    """

    steps: int = 1
    prompt: tuple[str, ...] = ("box",)
    distilled: bool = True
    corrections: int = 0

    @property
    def name(self) -> str:
        """Name that tells all of it; without a second pass there is neither prompt nor teacher."""
        corrected = f"-c{self.corrections}" if self.corrections else ""
        if not self.steps:
            return f"s0{corrected}"
        return f"s{self.steps}-{'+'.join(self.prompt)}{'' if self.distilled else '-undistilled'}{corrected}"

    def overrides(self) -> dict[str, object]:
        """Give the overrides of train.json with the overlay."""
        own: dict[str, object] = {"network_def::steps": self.steps, "network_def::prompt": list(self.prompt)}
        own["network_def::corrections"] = self.corrections
        return own if self.distilled else {**own, "train::loss::weight": 0.0}


def variants(steps: list[int], prompts: list[str], distillation: list[str], corrections: int = 0) -> list[Variant]:
    """List the starting point and what differs from it in one thing, each network once, S = 0 first."""
    base = Variant(corrections=corrections)
    found = [replace(base, steps=count) for count in steps]
    found += [base, *(replace(base, prompt=tuple(text.split("+"))) for text in prompts)]
    found += [replace(base, distilled=word == "on") for word in distillation]
    return sorted({one.name: one for one in found}.values(), key=lambda one: one.steps)


def main(argv: list[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argument_parser("sam_sp_ablation", __doc__)
    training_arguments(parser)
    parser.add_argument("--steps", nargs="*", type=int, default=[0, 1, 2], help="S")
    parser.add_argument("--prompts", nargs="*", default=list(KINDS), help="kinds at S = 1, joined by + for a mix")
    parser.add_argument("--distillation", nargs="*", choices=["on", "off"], default=["on", "off"], help="at S = 1")
    parser.add_argument("--corrections", type=int, default=0, help="a simulated person's marks, of every variant")
    args = parser.parse_args(argv)
    start_logging()

    common = common_overrides(args)
    chosen = variants(args.steps, args.prompts, args.distillation, args.corrections)
    cases_of(args.data, "train")  # found now, not after the first run
    tests = by_source(cases_of(args.data, "val"))
    pairs = [(variant, seed) for variant in chosen for seed in args.seeds]
    runs = [
        Run(
            f"{variant.name}-{seed}",
            {**common, **variant.overrides(), "dataset_dir": str(args.data), "seed": seed},
            OVERLAY,
            tests,
        )
        for variant, seed in pairs
    ]
    study = Study(args.output, runs)
    scores = dict(zip(pairs, study.complete(), strict=True))
    publish(SECTION, f"{_report(chosen, args.seeds, scores)}\n\n{study.describe()}\n\n{machine_line()}", args)


def _report(chosen: list[Variant], seeds: list[int], scores: dict) -> str:
    sources = list(scores[chosen[0], seeds[0]])
    baseline = next((variant for variant in chosen if not variant.steps), None)
    head = ["variant", *(f"Dice {source}" for source in sources), *(f"Dice, seed {seed}" for seed in seeds)]
    head += ["Dice, all", "difference to S = 0 [95 % CI]"]
    every = {variant: [_flat(scores[variant, seed]) for seed in seeds] for variant in chosen}
    rows = []
    for variant in chosen:
        means = [float(mean_over_seeds([scores[variant, seed][s] for seed in seeds]).mean()) for s in sources]
        own = mean_over_seeds(every[variant])
        compared = variant != baseline and baseline is not None
        difference = str(paired_bootstrap(own, mean_over_seeds(every[baseline]))) if compared else "–"
        seed_means = [float(np.mean(list(run.values()))) for run in every[variant]]
        rows.append([variant.name, *means, *seed_means, float(own.mean()), difference])
    text = (
        "Dice is the per-image mean at stored resolution on the validation splits. The same splits picked the epoch, "
        "so the figures compare variants and are a little too high in themselves. Intervals: paired bootstrap over "
        "images of each image's mean over seeds; they do not cover the choice of seeds."
    )
    return f"{markdown_table(head, rows)}\n{text}"


def _flat(run: dict[str, dict[str, float]]) -> dict[str, float]:
    """Test set -> case -> Dice, as one table."""
    return {f"{name}/{case}": dice for name, table in run.items() for case, dice in table.items()}


if __name__ == "__main__":
    main()
