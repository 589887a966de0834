"""Where a run may write: never over a data set, nor over another run's record."""

from __future__ import annotations

from pathlib import Path

from hspsam_monai.data.layouts import DECATHLON_FILE, is_folder_set
from hspsam_monai.errors import ConfigError, TrainingError

#: A training's files: the state to resume from, the model, the curve.
LAST, BEST, CURVE = "last.pt", "model.pt", "learning_curve.csv"
#: What tells a folder of results, see :func:`hspsam_monai.training.write_record`.
RECORD = "environment.json"
#: What tells a folder that holds a trained model.
MODELS = (LAST, BEST)
#: What a run writes besides its record; without one they are someone else's.
_OWN = ("config.json", "network.json", "splits.json", "cases.csv", "summary.json", "gallery.html", CURVE)

#: Folders of images and of labels inside a data set.
PARTS = ("images", "masks", "imagesTr", "imagesTs", "labelsTr", "labelsTs")


def _is_set(path: Path) -> bool:
    return is_folder_set(path) or (path / DECATHLON_FILE).is_file()


def check_output(folder: str | Path, resume: bool | None = None) -> None:
    """Refuse an output folder before anything is written into it; called first by every configuration.

    Args:
        folder: where results are to go; it need not exist.
        resume: of a training: whether it goes on with the run in ``folder``. ``None`` for an evaluation or inference.

    Raises:
        ConfigError: it is a data set or its folder of images or masks; it holds a model whose configuration and
            splits would be overwritten; it holds files called like a run's and no run's record; or it starts with
            ``~``, which only a shell expands.
        TrainingError: a training would overwrite another or a model, or there is none to resume.
    """
    if str(folder).startswith("~"):
        raise ConfigError(f"{folder}: found ~, which only a shell expands; expected the full path.")
    path = Path(folder).resolve()
    # A folder masks/ beside images/ may be the results of an earlier run, which left its record there.
    inside = not (path / RECORD).is_file() and any(
        part.name in PARTS and _is_set(part.parent) for part in (path, *path.parents)
    )
    if inside or _is_set(path):
        raise ConfigError(
            f"{folder} is {'part of ' if inside else ''}a data set, whose files could be overwritten; expected another "
            "folder for results."
        )
    found = [name for name in MODELS if (path / name).is_file()]
    if resume is None:
        if found:
            raise ConfigError(
                f"{folder} holds a model ({found[0]}), whose configuration and splits would be overwritten; expected "
                "another folder for results, such as one inside it."
            )
    elif resume and MODELS[0] not in found:
        raise TrainingError(f"Nothing to resume: {path / MODELS[0]} does not exist. Start without --resume.")
    elif not resume and MODELS[0] in found:
        raise TrainingError(f"{folder} holds an earlier run. Go on with --resume, or choose another --output.")
    elif not resume and found:
        raise TrainingError(f"{folder} holds a model ({found[0]}) that would be overwritten. Choose another --output.")
    foreign = [] if resume else [n for n in _OWN if (path / n).exists() and not (path / RECORD).is_file()]
    if foreign:
        raise ConfigError(
            f"{folder} holds {', '.join(foreign)} and no {RECORD}, so no results of before; they would be "
            "overwritten. Expected another folder for results."
        )
