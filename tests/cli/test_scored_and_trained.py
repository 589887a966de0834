"""What a person is told of the cases of a run: which were trained on, which are scored."""

import json
import logging

import pytest
from monai.bundle import ConfigParser

from hspsam_monai.cli import data_checks, scoring, workflows
from hspsam_monai.data import write_phantoms
from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.scores import CaseScore, summarise
from hspsam_monai.training import write_record


def cases(*names):
    return [{"case": name} for name in names]


def test_scores_of_trained_cases_are_doubted(tmp_path, caplog):
    """A drawn split moves as a data set grows, so what was trained on may come to lie in val."""
    data = write_phantoms(tmp_path / "data", 4, size=(32, 32))
    (data / "splits.json").unlink(missing_ok=True)
    names = sorted(path.stem for path in (data / "images").iterdir())
    with caplog.at_level(logging.WARNING):
        data_checks.warn_of_trained(tmp_path, str(data), "all")
        assert not caplog.text  # no record beside the model
        (tmp_path / "splits.json").write_text(json.dumps({"train": [*names[:3], "other"], "val": names[3:]}))
        data_checks.warn_of_trained(tmp_path, str(data), "all")
    assert (
        f"3 of the 4 cases of split all are among those this model was trained on, by name ({names[0]}," in caplog.text
    )
    caplog.clear()
    other = write_phantoms(tmp_path / "other", 4, seed=9, size=(32, 32))
    (tmp_path / "config.json").write_text(json.dumps({"dataset_dir": str(data)}))
    data_checks.warn_of_trained(tmp_path, str(other), "all")
    assert not caplog.text  # other pictures of the same names
    data_checks.warn_of_trained(tmp_path, str(data), "no such split")  # left to the evaluation
    data_checks.warn_of_trained(tmp_path, str(data), "all")
    assert "3 of the 4 cases of split all are among those this model was trained on, by name and content" in caplog.text


def test_a_run_goes_on_with_its_own_cases_only(tmp_path):
    write_record(tmp_path, {"train": cases("a", "b"), "val": cases("c")})
    write_record(tmp_path, {"train": cases("b", "a"), "val": cases("c")}, resume=True)
    before = (tmp_path / "splits.json").read_text()
    with pytest.raises(DataError, match=r"train 2 \(now 3\), val 1 \(now 1\), and 3 places that differ"):
        write_record(tmp_path, {"train": cases("a", "b", "d"), "val": cases("e")}, resume=True)
    assert (tmp_path / "splits.json").read_text() == before
    write_record(tmp_path, {"train": cases("x"), "val": cases("y")})
    assert json.loads((tmp_path / "splits.json").read_text())["train"] == ["x"]


def test_a_run_of_several_processes_goes_on_as_it_began(bundle, tmp_path, monkeypatch):
    config = ConfigParser.load_config_files(
        [str(bundle / "configs" / f"{n}.json") for n in ("train", "multi_gpu_train")]
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "last.pt").write_bytes(b"")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"was trained by several processes.*torchrun"):
        workflows.train(tmp_path, tmp_path, resume=True)


def test_names_of_cases_are_no_markup(monkeypatch):
    shown = []
    monkeypatch.setattr(scoring.out, "print", shown.append)
    scores = {"dice": (0.5,), "iou": (0.4,), "truth_pixels": (3,), "pred_pixels": (3,)}
    rows = [CaseScore(case=name, image="i", **scores) for name in ("mr[t1]", "s[/red]")]
    scoring.show_scores(rows, summarise(rows))
    cells = [str(cell) for cell in shown[0].columns[0]._cells]
    assert cells[:2] == ["mr[t1]", "s[/red]"]
