"""Training with 16 masks: Proxy Prompt against SAM's fine-tuned mask decoder and HSP-SAM on the same 16.

For each data set and each draw of the masks, every method sees the same cases with the same augmentation for the same
number of iterations (the bundle's ``task/few_shot.json``) and keeps its last weights; nothing chooses an epoch. Beside
them stands a Proxy Prompt with the same masks as its supports and a generator that nothing has trained: what its
readout solves in closed form. Scored on the validation split, which no method has seen.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser, cases_of, shared_folder, start_logging
from results import machine_line, markdown_table, publish
from scoring import MISSED, device, image_tensor, known_dice, mean_over_seeds, paired_bootstrap, score_cases
from slices import write_slices
from studies import Run, Study, code_digest, common_overrides, merged_config, training_arguments

from hspsam_monai.data import few_cases, mask_values, read_mask
from hspsam_monai.networks import load_pretrained

SECTION = "few-shot"
#: Method -> overlay of its network; ``hsp`` is train.json's own.
METHODS: dict[str, str | None] = {
    "proxy": "network/proxy_prompt.json",
    "decoder": "network/sam_decoder.json",
    "hsp": None,
}
#: Proxy Prompt before any training: only the context is made of the masks.
CONTEXT = "context"
#: The method that the others are compared with.
OURS = "proxy"
TASK = "task/few_shot.json"
#: Folders of the data sets below ``--data``: polyps, skin lesions, breast lesions, hippocampus.
SETS = ("polyp/kvasir", "skin/isic2018", "ultrasound/busi", "mr/hippocampus")
#: Slices of each volume that make a set of pictures of a set of volumes.
SLICES = 3
#: One side for all, so that no method sees more than another (the sets are stored at 256 to 352 pixels).
IMAGE_SIZE = 256


def main(argv: list[str] | None = None) -> None:
    """Run the study and print its table."""
    parser = argument_parser("few_shot", __doc__)
    training_arguments(parser)
    shared = shared_folder()
    parser.set_defaults(seeds=[0, 1, 2], image_size=IMAGE_SIZE, data=shared and shared / "data")
    parser.add_argument("--cases", type=int, default=16, help="masks to train with")
    parser.add_argument("--sets", nargs="+", default=list(SETS), metavar="FOLDER", help="data sets below --data")
    parser.add_argument("--methods", nargs="+", choices=[CONTEXT, *METHODS], default=[CONTEXT, *METHODS])
    args = parser.parse_args(argv)
    start_logging()

    common = common_overrides(args)
    roots = {name: _pictures(args.data / name, args.output / "slices") for name in args.sets}
    tests = {name: _with_object(cases_of(root, "val")) for name, root in roots.items()}
    trained = [method for method in METHODS if method in args.methods]
    keys = [(name, method, draw) for name in args.sets for draw in args.seeds for method in trained]
    runs = [_run(roots[name], method, draw, args.cases, common, tests[name]) for name, method, draw in keys]
    study = Study(args.output, runs)
    scores = {key: run["val"] for key, run in zip(keys, study.complete(), strict=True)}
    if CONTEXT in args.methods:
        for name, draw in ((name, draw) for name in args.sets for draw in args.seeds):
            run = _run(roots[name], "proxy", draw, args.cases, common, tests[name])
            scores[name, CONTEXT, draw] = _score_context(run, args.output, tests[name])
    table = _report(args.sets, args.methods, args.seeds, args.cases, scores)
    publish(SECTION, f"{table}\n\n{study.describe()}\n\n{machine_line()}", args)


def _run(
    root: Path, method: str, draw: int, cases: int, common: Mapping[str, Any], test: Sequence[Mapping[str, Any]]
) -> Run:
    """One training: the draw of the masks is the seed of everything else, too."""
    overrides = {**common, "dataset_dir": str(root), "seed": draw, "train_cases": cases}
    overrides["labels"] = {"background": 0, "object": 1}
    overlays = [*([METHODS[method]] if METHODS[method] else []), TASK]
    return Run(f"{root.name}-{method}-{cases}-{draw}", overrides, overlays, {"val": test})


def _score_context(run: Run, output: Path, tests: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Dice of each case by the run's network, untrained, with the run's masks as its supports."""
    table = output / f"{run.name}-{CONTEXT}" / code_digest([__file__]) / "val.csv"
    if known_dice(table, tests) is None:
        config, given = merged_config(run.overlay, run.overrides), run.overrides
        torch.manual_seed(given["seed"])
        network, size = (config.get_parsed_content(key) for key in ("network_def", "image_size"))
        load_pretrained(network, given["pretrained"])
        network.to(device()).eval()
        supports = few_cases(given["dataset_dir"], "train", given["train_cases"], given["seed"], network.num_classes)
        masks = [torch.from_numpy(read_mask(case["label"], network.num_classes)) for case in supports]
        network.set_context([image_tensor(case["image"])[0] for case in supports], masks)
        score_cases(network, size, network.num_classes, tests, table)
    return known_dice(table, tests)


def _pictures(root: Path, slices: Path) -> Path:
    """The data set itself or, of volumes, slices through everything that is labelled."""
    description = root / "dataset.json"
    if not description.is_file():
        return root
    numbers = {int(value) for value in json.loads(description.read_text())["labels"] if int(value)}
    return write_slices(root, slices, {root.name: numbers}, SLICES)[0]


def _with_object(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out images without an object, such as BUSI's normal ones: supports cannot show nothing."""
    return [case for case in cases if mask_values(case["label"]) != {0}]


def _report(sets: list[str], methods: list[str], draws: list[int], cases: int, scores: dict) -> str:
    head = ["validation images", "method", *(f"Dice, draw {draw}" for draw in draws), "mean ± sd over draws"]
    head += [f"missed (Dice < {MISSED})", f"{OURS} minus it, per draw: mean ± sd", "the same [95 % CI over images]"]
    rows = []
    for name in sets:
        for method in methods:
            runs = [scores[name, method, draw] for draw in draws]
            means = [float(np.mean(list(run.values()))) for run in runs]
            missed = np.mean([np.mean(np.array(list(run.values())) < MISSED) for run in runs])
            compared = ["–", "–"]
            if method != OURS and OURS in methods:
                own = [scores[name, OURS, draw] for draw in draws]
                gains = [float(np.mean(list(a.values()))) - b for a, b in zip(own, means, strict=True)]
                compared = [_spread(gains, "+"), str(paired_bootstrap(mean_over_seeds(own), mean_over_seeds(runs)))]
            rows.append([f"{name} ({len(runs[0])})", method, *means, _spread(means), f"{missed:.1%}", *compared])
    text = (
        f"Trained with {cases} masks, the same for every method of a draw; the last weights are kept and the "
        "validation split chooses nothing. Dice is the per-image mean at stored resolution over images with an "
        "object. sd: of the sample of draws (other masks and another seed). context: Proxy Prompt with the masks as "
        "its supports and an untrained generator; proxy: the same after training; decoder: SAM's mask decoder and "
        "prompt encoder fine-tuned, image encoder frozen; hsp: the network of train.json, all of it trained."
    )
    return f"{markdown_table(head, rows)}\n{text}"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation; one value has none."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
