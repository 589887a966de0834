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
    check_output(tmp_path, resume=False)  # a run that was stopped before its first epoch ended
    (tmp_path / "last.pt").touch()
    check_output(tmp_path, resume=True)
    with pytest.raises(TrainingError, match="earlier run"):
        check_output(tmp_path, resume=False)
