"""Commands run in this process, and one tiny run that they all work on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hspsam_monai.cli import workflows
from hspsam_monai.cli.app import app
from hspsam_monai.data import write_phantoms

TINY = ["image_size=64", "batch_size=4", "epochs=1", "warmup=1"]


def hspsam(*arguments: object, code: int = 0):
    """Run a command in this process and demand its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + "".join(map(str, [result.exception]))
    return result


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantoms of 64 pixels, three of them for validation."""
    return write_phantoms(tmp_path_factory.mktemp("cli") / "data", 10, size=(64, 64), val_fraction=0.3)


@pytest.fixture(scope="session")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch from random weights."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    hspsam("train", "--data", phantoms, "--output", folder, "--pretrained", "none", *TINY)
    return folder


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the commands hand to MONAI's workflow, which is not run but leaves a model and a summary."""
    runs = []

    def note(files: list[Path], kind: str, values: dict) -> None:
        runs.append({"files": files, "kind": kind, **values})
        folder = Path(values["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.pt").touch()
        one = {"mean": 1.0, "ci95": [1.0, 1.0]}
        (folder / "summary.json").write_text(json.dumps({"n": 1, "dice": one, "iou": one}))

    monkeypatch.setattr(workflows, "run_workflow", note)
    return runs
