"""What the learned prompts bring: static, image-conditioned or none; how many; which decoder; which adaptation.

Variants change one thing at a time, starting from train.json's network. All are trained on the train splits of
every source together with the same budget, and scored on the validation split of each source.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from common import argument_parser, by_source, cases_of, logger, start_logging
from results import machine_line, markdown_table, publish
from scoring import PRECISION, device, load_run, mean_over_seeds, paired_bootstrap
from studies import Run, Study, common_overrides, merged_config, training_arguments

from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks.adaptation import ADAPTATIONS
from hspsam_monai.networks.hierarchical_decoder import STYLES
from hspsam_monai.networks.prompter import SOURCES

SECTION = "prompt-ablation"
#: Forward passes of each variant before the clock counts.
WARM_UP = 3


@dataclass(frozen=True)
class Variant:
    """One network of the ablation; the fields are arguments of :class:`hspsam_monai.networks.HSPSAM`."""

    prompt_source: str
    prompts_per_level: int
    decoder: str
    adapt: str

    @property
    def name(self) -> str:
        """Name that tells all of it; without prompts their number means nothing."""
        prompts = "" if self.prompt_source == "none" else f"-p{self.prompts_per_level}"
        return f"{self.prompt_source}{prompts}-{self.decoder}-{self.adapt}"

    def overrides(self) -> dict[str, object]:
        """Give the overrides of train.json."""
        return {f"network_def::{key}": value for key, value in vars(self).items()}


def main(argv: list[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argument_parser("prompt_ablation", __doc__)
    training_arguments(parser)
    parser.add_argument("--sources", nargs="*", choices=SOURCES, default=["static", "image", "none"])
    parser.add_argument("--prompts", nargs="*", type=int, default=[], help="prompts per level, such as 1 2 4 8 16")
    parser.add_argument("--decoders", nargs="*", choices=STYLES, default=[])
    parser.add_argument("--adapt", nargs="*", choices=ADAPTATIONS, default=[])
    parser.add_argument("--around", choices=SOURCES, help="prompt source of the starting point; default: train.json's")
    parser.add_argument("--rounds", type=int, default=20, help="timed forward passes of each variant")
    args = parser.parse_args(argv)
    start_logging()

    common = common_overrides(args)
    own = merged_config().get("network_def")
    base = Variant(**{key: own[key] for key in Variant.__dataclass_fields__})
    if args.around:
        base = replace(base, prompt_source=args.around)
    variants = _variants(base, args.sources, args.prompts, args.decoders, args.adapt)
    cases_of(args.data, "train")  # found now, not after the first run
    tests = by_source(cases_of(args.data, "val"))
    pairs = [(variant, seed) for variant in variants for seed in args.seeds]
    runs = [
        Run(
            f"{variant.name}-{seed}",
            {**common, **variant.overrides(), "dataset_dir": str(args.data), "seed": seed},
            tests=tests,
        )
        for variant, seed in pairs
    ]
    study = Study(args.output, runs)
    scores = dict(zip(pairs, study.complete(), strict=True))
    nets = {v: load_run(study.folder(runs[pairs.index((v, args.seeds[0]))])) for v in variants}
    times = _time({v.name: net for v, net in nets.items()}, args.rounds)

    head = ["variant", "parameters (M)", "trained (M)", "ms/image, min", "ms/image, median"]
    for test, cases in tests.items():
        head += [f"{test} ({len(cases)}), seed {s}" for s in args.seeds] + [f"{test}, mean"]
    head.append(f"difference to {base.name}, all images [95 % CI]")
    rows = []
    for variant in variants:
        network = nets[variant][0]
        row = [variant.name, _millions(network), _millions(network, trained=True)]
        row += [f"{1e3 * t:.1f}" for t in (min(times[variant.name]), statistics.median(times[variant.name]))]
        for test in tests:
            means = [float(np.mean(list(scores[variant, seed][test].values()))) for seed in args.seeds]
            row += [*means, float(np.mean(means))]
        all_cases = [_all_cases(scores, v, args.seeds) for v in (variant, base)]
        row.append("–" if variant == base else str(paired_bootstrap(*all_cases)))
        rows.append(row)
    text = (
        "Dice is the per-image mean at stored resolution on the validation splits. The same splits picked the epoch "
        "(by their mean together), so the figures compare variants and are a little too high in themselves. "
        "Intervals: paired bootstrap over images of each image's mean over seeds; they do not cover the choice of "
        f"seeds. ms/image: forward pass of one image at the network's size, batch 1, {PRECISION}, after {WARM_UP} "
        f"warm-up passes, variants interleaved in one process, {args.rounds} rounds."
    )
    publish(SECTION, f"{markdown_table(head, rows)}\n{text}\n\n{study.describe()}\n\n{machine_line()}", args)


def _variants(
    base: Variant, sources: list[str], prompts: list[int], decoders: list[str], adapt: list[str]
) -> list[Variant]:
    """List the starting point and what differs from it in one thing, each network once."""
    variants = [base]
    variants += [replace(base, prompt_source=source) for source in sources]
    variants += [replace(base, prompts_per_level=count) for count in prompts if base.prompt_source != "none"]
    variants += [replace(base, decoder=style) for style in decoders]
    variants += [replace(base, adapt=mode) for mode in adapt]
    return list({variant.name: variant for variant in variants}.values())


def _all_cases(scores: dict, variant: Variant, seeds: list[int]) -> np.ndarray:
    runs = [scores[variant, seed] for seed in seeds]
    return np.concatenate([mean_over_seeds([run[test] for run in runs]) for test in runs[0]])


def _millions(network: torch.nn.Module, trained: bool = False) -> str:
    count = sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)
    return f"{count / 1e6:.2f}"


@torch.inference_mode()
def _time(networks: dict[str, tuple[torch.nn.Module, int, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each forward pass, variants interleaved."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    inferer = ImageInferer(precision=PRECISION)
    for index in range(rounds + WARM_UP):
        for name, (network, size, _) in networks.items():
            image = torch.rand(1, 3, size, size, device=device())
            begin = _now()
            inferer(image, network)
            if index >= WARM_UP:
                times[name].append(_now() - begin)
    logger.info("Timed %d variants.", len(networks))
    return times


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
