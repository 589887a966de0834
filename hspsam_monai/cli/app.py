"""The commands of ``hspsam``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import hspsam_monai
from hspsam_monai.cli import weights
from hspsam_monai.cli.console import Face, out, progress, say, set_up_logging

app = typer.Typer(
    cls=Face,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(weights.app, name="weights")

Data = Annotated[
    Path,
    typer.Option("--data", help="images/ + masks/ (and splits.json), a folder of such folders, or dataset.json."),
]
Pairs = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Entries of the configuration, such as epochs=20.", show_default=False),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N or mps; else the first GPU if there is one, else the CPU.")
]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"hspsam {hspsam_monai.__version__}")
        raise typer.Exit


@app.callback()
def start(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """SAM that prompts itself: medical images in, masks out.

    Start with `hspsam demo`, or `hspsam doctor` if something does not work.
    """
    set_up_logging(debug)


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Your images and masks instead of phantoms; their val split is kept unseen.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of everything the demo writes.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the training.")] = None,
    count: Annotated[int | None, typer.Option(min=10, help="Phantoms to train on, validation included.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of phantoms and training.")] = 0,
) -> None:
    """Do the main job once: train, evaluate on unseen images, segment a folder, show pictures and scores."""
    from hspsam_monai.cli.demo import run_demo

    run_demo(output, data=data, epochs=epochs, count=count, seed=seed)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="The data set.")],
    task: Annotated[str | None, typer.Option(help="Task whose classes are expected.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes with background; else 2.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")] = None,
) -> None:
    """List every fault of a data set, before any training. Exit code 1 if there is one."""
    from hspsam_monai.cli.lean import import_monai
    from hspsam_monai.cli.options import task_labels
    from hspsam_monai.errors import ConfigError
    from hspsam_monai.files import NAMES, atomic_write

    if task and classes is not None:
        raise ConfigError("--task and --classes are both given; expected one of them.")
    labels = task_labels(task)
    import_monai()
    from hspsam_monai.data import check_dataset

    with progress("Checking") as bar:
        report = check_dataset(data, len(labels or "01") if classes is None else classes, labels, bar)
    say(report.table())
    if json_file is not None:
        with atomic_write(json_file) as part:
            part.write_text(report.to_json() + "\n", encoding="utf-8", errors=NAMES)
    say("No faults." if report.ok else "The data set has faults.", "green" if report.ok else "bold red")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    pairs: Pairs = None,
    data: Annotated[Path | None, typer.Option("--data", help="The data set; with --resume the run's own.")] = None,
    network: Annotated[str | None, typer.Option(help="Overlay in the bundle's configs/network.")] = None,
    task: Annotated[str | None, typer.Option(help="Overlay in configs/task; without, background/foreground.")] = None,
    pretrained: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights to start from: name, file, `shipped` or `none` (random); given again: of that the encoder."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not look through the data set first.")] = False,
) -> None:
    """Check a data set, then train on it. OUTPUT/model.pt is of the best epoch, with keep=last of the last."""
    from hspsam_monai.cli import workflows
    from hspsam_monai.cli.options import parse_overrides

    best = workflows.train(
        data,
        output,
        network=network,
        task=task,
        pretrained=pretrained,
        resume=resume,
        check=not no_check,
        overrides=parse_overrides(pairs or []),
    )
    say(f"{best}: the model. Try: hspsam segment IMAGES MASKS --model {output}", "green")


@app.command()
def evaluate(
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder of table, summary and galleries.")],
    pairs: Pairs = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a run, a model.pt, or a shipped model: hsp_sam, sam_sp; without, hsp_sam."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val, all, or another key of the splits.")] = "val",
    device: Device = None,
) -> None:
    """Score a model on a data set: per-case table, summary, gallery."""
    from hspsam_monai.cli import workflows
    from hspsam_monai.cli.options import parse_overrides

    summary = workflows.evaluate(
        data, model, output, split=split, device=device, overrides=parse_overrides(pairs or [])
    )
    dice = summary["dice"]
    say(
        f"{summary['n']} cases, mean Dice {dice['mean']:.4f} (95 % CI {dice['ci95'][0]:.4f} to {dice['ci95'][1]:.4f}), "
        f"mean IoU {summary['iou']['mean']:.4f}",
        "bold",
    )
    say(f"{output / 'gallery.html'}, {output / 'cases.csv'}")


@app.command()
def segment(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="An image or a folder of images.")],
    output: Annotated[Path, typer.Argument(help="Folder of the masks: palette PNGs, value = class.")],
    pairs: Pairs = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a run, a model.pt, or a shipped model: hsp_sam, sam_sp; without, hsp_sam."),
    ] = None,
    support: Annotated[
        Path | None,
        typer.Option(
            help="Folder with images/ and masks/ that show what to segment; the model is then a Proxy Prompt.",
            show_default=False,
        ),
    ] = None,
    flips: Annotated[
        bool | None,
        typer.Option(
            help="Average four mirror images: better, 4 to 5 times slower. On for all but Proxy Prompt, whose examples "
            "may show the left one of two.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Segment images. A bad file does not stop the others; all bad files are named at the end (exit code 1)."""
    from hspsam_monai.cli import workflows
    from hspsam_monai.cli.lean import import_monai
    from hspsam_monai.cli.models import model_path
    from hspsam_monai.cli.options import parse_overrides

    overrides = parse_overrides(pairs or [])
    model_path(model, supports=support is not None)  # a mistyped name is told at once
    import_monai()
    workflows.segment(source, output, model=model, support=support, flips=flips, device=device, overrides=overrides)
    say(f"Masks are in {output}; to look at them open {output / 'gallery.html'}.", "green")


@app.command()
def context(
    support: Annotated[Path, typer.Argument(metavar="SUPPORT", help="Folder with images/ and masks/.")],
    output: Annotated[Path, typer.Argument(help="Folder of the model with its context, used like a training run's.")],
    pairs: Pairs = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of a run, or a model.pt, of a Proxy Prompt; without, the shipped one.")
    ] = None,
    device: Device = None,
) -> None:
    """Compute what supports say once and store it with the model: `hspsam segment --model OUTPUT` needs no supports."""
    from hspsam_monai.cli import workflows
    from hspsam_monai.cli.lean import import_monai
    from hspsam_monai.cli.models import model_path
    from hspsam_monai.cli.options import parse_overrides

    overrides = parse_overrides(pairs or [])
    model_path(model, supports=True)  # a mistyped name is told at once
    import_monai()
    workflows.store_context(support, output, model=model, device=device, overrides=overrides)
    say(f"{output}: a model that knows these supports. Try: hspsam segment IMAGES MASKS --model {output}", "green")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder of a run, a model.pt, or `shipped`.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
) -> None:
    """Write a model as ONNX: any batch, images of its own size; checked against PyTorch (needs the extra `export`)."""
    from hspsam_monai.cli.exporting import export as write

    worst, size = write(model, output)
    say(f"{output}: image (B, 3, {size}, {size}) in [0, 1] -> pred, logits.", "green")
    say(f"Its logits differ from PyTorch's by at most {worst:.1e} on random images, batch 1 and 3.")


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks, or one mask.")],
    labels: Annotated[Path, typer.Argument(help="Folder of true masks, a data set, or one mask.")],
    classes: Annotated[int, typer.Option(help="Number of classes, background included.")] = 2,
    split: Annotated[str | None, typer.Option(help="Only this split of the data set LABELS.")] = None,
    surface: Annotated[bool, typer.Option("--surface", help="Also HD95 and NSD.")] = False,
    tolerance: Annotated[float, typer.Option(help="Of NSD: mm in volumes, pixels in pictures.")] = 1.0,
    partial: Annotated[bool, typer.Option("--partial", help="Accept labels without prediction.")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a table of all cases.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary.")] = None,
) -> None:
    """Score masks: Dice and IoU, with --surface HD95 and NSD; per case, mean, sd and confidence interval."""
    from hspsam_monai.cli import scoring
    from hspsam_monai.cli.lean import import_monai

    import_monai()
    from hspsam_monai.scores import write_case_table, write_summary

    rows, summary = scoring.score(
        predictions,
        labels,
        classes=classes,
        split=split,
        surface=surface,
        tolerance=tolerance,
        partial=partial,
    )
    if csv_file is not None:
        write_case_table(csv_file, rows)
    if json_file is not None:
        write_summary(json_file, summary, {"predictions": predictions, "labels": labels, "split": split})
    scoring.show_scores(rows, summary)


@app.command()
def doctor() -> None:
    """Tell what is installed, which device is used, what would fail. Exit code 1 if something essential does."""
    from hspsam_monai.cli.doctor import doctor as look

    if not look():
        raise typer.Exit(1)
