"""Where a run may not write."""

import pytest

from hspsam_monai.errors import ConfigError, TrainingError
from hspsam_monai.training import check_output


@pytest.fixture
def data(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    return tmp_path / "data"


@pytest.mark.parametrize("resume", [None, False])
def test_a_data_set_and_its_parts_are_refused(data, tmp_path, resume):
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "dataset.json").write_text("{}")
    (tmp_path / "link").symlink_to(data / "masks")
    parts = [tmp_path / "list" / name for name in ("", "labelsTr", "imagesTr", "labelsTr/deep")]
    for folder in (data, data / "masks", data / "images", data / "masks" / "a", tmp_path / "link", *parts):
        with pytest.raises(ConfigError, match="data set, whose files could be overwritten"):
            check_output(folder, resume)
    for folder in (data / "results", tmp_path / "masks", tmp_path / "none" / "yet"):
        check_output(folder, resume)
    (data / "masks" / "environment.json").touch()  # results of before, not anybody's truth
    check_output(data / "masks", resume)
    with pytest.raises(ConfigError, match="only a shell expands"):
        check_output("~/out", resume)


def test_runs_and_models_are_spared(tmp_path):
    with pytest.raises(TrainingError, match="Nothing to resume"):
        check_output(tmp_path, resume=True)
    (tmp_path / "model.pt").touch()
    with pytest.raises(ConfigError, match=r"holds a model \(model.pt\)"):
        check_output(tmp_path)
    with pytest.raises(TrainingError, match=r"holds a model \(model.pt\)"):  # shared, or of supports
        check_output(tmp_path, resume=False)
    (tmp_path / "last.pt").touch()
    check_output(tmp_path, resume=True)
    with pytest.raises(TrainingError, match="earlier run"):
        check_output(tmp_path, resume=False)


def test_a_run_that_was_stopped_before_its_first_epoch_ended_may_be_begun_anew(tmp_path):
    for name in ("environment.json", "config.json", "network.json", "splits.json", "log.txt"):
        (tmp_path / name).touch()
    check_output(tmp_path, resume=False)
    check_output(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "splits.json", "cases.csv", "summary.json", "learning_curve.csv"])
@pytest.mark.parametrize("resume", [None, False])
def test_files_of_others_that_are_called_like_a_runs_are_spared(tmp_path, name, resume):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"holds {name} and no environment.json"):
        check_output(tmp_path, resume)
