"""The command line: every command, its exit codes and its words."""

import csv
import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hspsam_monai.cli.app import app
from hspsam_monai.cli.console import explain
from hspsam_monai.cli.models import find_model, model_path, read_overlay, shipped_model, shipped_name
from hspsam_monai.cli.options import check_overrides, overlay_names, parse_overrides
from hspsam_monai.data import write_phantoms
from hspsam_monai.errors import ConfigError, DataError, WeightsError
from tests.cli.conftest import TINY, hspsam


class TestFace:
    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys; from typer.testing import CliRunner; from hspsam_monai.cli.app import app\n"
            "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
            "heavy = {'torch', 'monai', 'numpy', 'PIL', 'scipy'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize(
        ("own", "expected"),
        [
            ({}, ["PASSIVE", "1000"]),
            ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
            ({"OMP_WAIT_POLICY": "PASSIVE"}, ["PASSIVE", "None"]),
            ({"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"]),
        ],
    )
    def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(self, own: dict, expected: list[str]):
        code = (
            "import os; from hspsam_monai.cli import prepare; prepare()\n"
            "print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
        )
        settings = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        environment = {key: value for key, value in os.environ.items() if key not in settings} | own
        done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == expected

    @pytest.mark.skipif(
        sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="for glibc"
    )
    @pytest.mark.parametrize("own", [None, "MALLOC_TRIM_THRESHOLD_"])
    def test_freed_memory_is_kept_unless_the_user_says_otherwise(self, own: str | None):
        code = (
            "import ctypes, resource; from hspsam_monai.cli import keep_freed_memory\n"
            "kept = keep_freed_memory(); libc = ctypes.CDLL(None); size = 1 << 27\n"
            "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
            "libc.free.argtypes = [ctypes.c_void_p]\n"
            "def once():\n"
            "    block = libc.malloc(size); ctypes.memset(block, 1, size); libc.free(block)\n"
            "once(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; once(); once()\n"
            "print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
        )
        names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES", "LD_PRELOAD")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        environment |= {own: "131072"} if own else {}
        done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
        kept, faults = map(int, done.stdout.split())
        assert kept == (own is None)
        assert (faults < 64) if kept else (faults >= 64)  # 128 MiB are 64 huge pages or 32768 small ones, twice

    @pytest.mark.parametrize("command", "demo check train evaluate segment context export score doctor weights".split())
    def test_every_command_has_help(self, command: str):
        assert "Usage" in hspsam(command, "--help").output

    def test_version(self):
        assert hspsam("--version").output.startswith("hspsam 0.")

    def test_process_ends_with_one_sentence(self, phantoms: Path, tmp_path: Path):
        command = [sys.executable, "-m", "hspsam_monai", "train", "--data", str(phantoms), "--output", str(tmp_path)]
        done = subprocess.run([*command, "--task", "polip"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Did you mean polyp?" in done.stderr and "Traceback" not in done.stderr

    def test_debug_keeps_the_traceback(self, phantoms: Path, tmp_path: Path):
        result = CliRunner().invoke(app, ["train", "--output", str(tmp_path), "--task", "polip", "--debug"])
        assert isinstance(result.exception, ConfigError)

    def test_explain_finds_the_named_error_in_the_chain(self):
        def wrapped():
            try:
                raise DataError("no masks")
            except DataError as error:
                raise RuntimeError("failed to evaluate expression") from error

        with pytest.raises(RuntimeError) as caught:
            wrapped()
        assert explain(caught.value) == ("no masks", 1)
        assert explain(ConfigError("x")) == ("x", 2)
        assert explain(KeyError("x")) is None
        assert "full" in explain(OSError(28, "No space left on device", "/a"))[0]


class TestOptions:
    def test_values_are_literals_or_text(self):
        pairs = ["epochs=3", "lr=1e-4", "ema=0", "resume_from=a=b", "x=true", "y=null", "z=[1, 2]", "w=(1,2)"]
        assert parse_overrides(pairs) == {
            "epochs": 3,
            "lr": 1e-4,
            "ema": 0,
            "resume_from": "a=b",
            "x": True,
            "y": None,
            "z": [1, 2],
            "w": [1, 2],
        }

    @pytest.mark.parametrize(
        ("pair", "words"),
        [
            ("epochs", "KEY=VALUE"),
            ("lr=$__import__('os').system('true')", "expression"),
            ("labels={'a': '$1'}", "expression"),
            ("x=%other.json#a", "expression"),
            ("dataset_dir=x", "--data"),
        ],
    )
    def test_refused_pairs(self, pair: str, words: str):
        with pytest.raises(ConfigError, match=words):
            parse_overrides([pair])

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("epoch", 1, "Did you mean epochs"),
            ("augmentation::camra", 1, "Did you mean camera"),
            ("epochs", "many", "whole number"),
            ("epochs", 1.5, "whole number"),
            ("lr", "fast", "a number"),
            ("augmentation", 3, "dictionary"),
            ("handlers::9", 1, "no '9'"),
        ],
    )
    def test_entries_must_exist_and_fit(self, key: str, value: object, words: str):
        config = {"epochs": 1, "lr": 0.1, "augmentation": {"camera": 0.5}, "handlers": [{"_target_": "X"}]}
        with pytest.raises(ConfigError, match=words):
            check_overrides({key: value}, config)

    def test_whole_numbers_may_be_written_with_a_point(self):
        config = {"seed": 0, "lr": 0.1, "resume": False, "network_def": {"size": 64}, "scales": [1]}
        given = {"seed": 1e3, "lr": 1.0, "network_def::size": 32.0, "scales": [1.0]}
        found = check_overrides(given, config)
        assert found == given and type(found["seed"]) is int and type(found["network_def::size"]) is int
        assert type(found["lr"]) is float

    def test_arguments_of_a_class_may_be_added(self):
        check_overrides({"network_def::dropout": 0.1}, {"network_def": {"_target_": "X"}})

    def test_overlays_are_the_bundles_files(self, bundle: Path):
        assert overlay_names("task") == sorted(path.stem for path in (bundle / "configs" / "task").glob("*.json"))


class TestModels:
    def test_run_folder_and_file_mean_the_same(self, run: Path):
        assert find_model(run) == find_model(run / "model.pt")
        assert find_model(run).network["image_size"] == 64

    def test_lone_file_takes_the_shipped_configuration(self, run: Path, tmp_path: Path, bundle: Path):
        (tmp_path / "other.pt").write_bytes((run / "model.pt").read_bytes())
        shipped = json.loads((bundle / "configs" / "inference.json").read_text())
        assert find_model(tmp_path / "other.pt").network["network_def"] == shipped["network_def"]

    def test_missing(self, tmp_path: Path):
        with pytest.raises(WeightsError, match="--model"):
            find_model(tmp_path)
        with pytest.raises(WeightsError, match="hsp_sam, sam_sp, proxy_prompt"):
            find_model("sam-sp")

    def test_shipped_models_have_names(self, run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for name, network in (("hsp_sam", "HSPSAM"), ("sam_sp", "SAMSP"), ("proxy_prompt", "ProxyPrompt")):
            found = find_model(name)
            assert found.path == shipped_model(name).resolve() and found.path.parent == (bundle / "models").resolve()
            assert found.network["network_def"]["_target_"].endswith(f".{network}")
            assert find_model(found.path) == found and shipped_name(found.network) == name
        assert find_model(None) == find_model("shipped") == find_model("hsp_sam")
        assert find_model("sam_sp").labels == find_model(None).labels
        assert (find_model("sam_sp").network["scales"], len(find_model(None).network["scales"])) == ([1], 4)
        # In a mirror image examples of a left organ show the right one.
        assert [find_model(n).network["flips"] for n in ("hsp_sam", "sam_sp", "proxy_prompt")] == [True, True, False]
        for name in ("sam_sp", "hsp_sam", "proxy_prompt"):
            shutil.copytree(run, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        assert find_model("sam_sp").path == (tmp_path / "sam_sp" / "model.pt").resolve()
        # Who names none means the shipped one, whatever lies in the folder at hand.
        assert find_model(None).path == find_model("shipped").path == shipped_model().resolve()
        assert model_path(None, supports=True) == shipped_model("proxy_prompt")

    @pytest.mark.parametrize(
        "change",
        [
            {"image_size": "$__import__('os').system('touch stolen')"},
            {"network_def": {"_target_": "os.system", "command": "touch stolen"}},
            {"network_def": {"_target_": "hspsam_monai.networks.pretrained.logging.os.system"}},
            {"network_def": {"_target_": "hspsam_monai.networks.HSPSAM", "encoder": {"_target_": "os.system"}}},
            {"initialize": ["$1"]},
        ],
    )
    def test_overlay_that_would_run_code_is_refused(self, run: Path, tmp_path: Path, change: dict):
        overlay = tmp_path / "network.json"
        overlay.write_text(json.dumps(json.loads((run / "network.json").read_text()) | change))
        with pytest.raises(ConfigError):
            read_overlay(overlay)

    def test_runs_of_before_an_entry_existed_keep_their_masks(self, run: Path, tmp_path: Path):
        config = json.loads((run / "network.json").read_text())
        for entry in ("flips", "min_confidence", "scales"):
            assert find_model(run).network[entry] == config.pop(entry)
        (tmp_path / "network.json").write_text(json.dumps(config))
        (tmp_path / "model.pt").write_bytes(b"")
        before, shipped = find_model(tmp_path).network, find_model(None).network
        assert (before["flips"], before["min_confidence"], before["scales"]) == (True, 0, [1])
        assert (shipped["min_confidence"], len(shipped["scales"])) == (0.65, 4)


class TestCheck:
    def test_good(self, phantoms: Path):
        assert "No faults" in hspsam("check", phantoms).stdout

    def test_every_fault_is_named(self, phantoms: Path, tmp_path: Path):
        data = write_phantoms(tmp_path / "data", 6, size=(64, 64))
        (data / "masks" / "phantom_0001.png").unlink()
        (data / "images" / "phantom_0002.jpg").write_bytes(b"")
        Image.fromarray(np.full((64, 64), 7, np.uint8)).save(data / "masks" / "phantom_0003.png")
        result = hspsam("check", data, "--json", tmp_path / "report.json", code=1)
        for number in (1, 2, 3):
            assert f"phantom_000{number}" in result.stdout
        assert len(json.loads((tmp_path / "report.json").read_text())["faults"]) >= 3

    def test_a_file_that_cannot_be_written_is_one_sentence(self, phantoms: Path, tmp_path: Path):
        result = hspsam("check", phantoms, "--json", tmp_path / "none" / "report.json", code=1)
        assert f"{tmp_path / 'none' / 'report.json'}: no such file or folder" in result.stderr
        assert "num_classes is 0" in hspsam("check", phantoms, "--classes", 0, code=2).stderr
        assert "expected one of them" in hspsam("check", phantoms, "--task", "polyp", "--classes", 0, code=2).stderr

    def test_unknown_task_lists_what_there_is(self, phantoms: Path):
        assert "polyp" in hspsam("check", phantoms, "--task", "polip", code=2).stderr

    def test_faults_stop_a_training(self, tmp_path: Path):
        data = write_phantoms(tmp_path / "data", 4, size=(64, 64))
        (data / "masks" / "phantom_0001.png").unlink()
        result = hspsam("train", "--data", data, "--output", tmp_path / "run", "--pretrained", "none", code=1)
        assert "missing_mask" in result.stderr and not (tmp_path / "run").exists()

    def test_a_training_goes_on_regardless_only_if_told_to(self, tmp_path: Path, handed: list[dict]):
        data = write_phantoms(tmp_path / "data", 4, size=(64, 64))
        (data / "masks" / "phantom_0001.png").unlink()
        words = ["train", "--data", data, "--output", tmp_path / "run", "--pretrained", "none"]
        hspsam(*words, code=1)
        assert not handed
        hspsam(*words, "--no-check")
        assert [run["dataset_dir"] for run in handed] == [str(data)]


class TestTrain:
    def test_writes_model_and_record(self, run: Path):
        for name in ("model.pt", "last.pt", "config.json", "network.json", "log.txt", "learning_curve.csv"):
            assert (run / name).is_file(), name

    def test_typo_in_key(self, phantoms: Path, tmp_path: Path):
        result = hspsam("train", "--data", phantoms, "--output", tmp_path / "run", "epoch=1", code=2)
        assert "Did you mean epochs?" in result.stderr

    def test_volumes_are_refused_before_anything_is_built(self, tmp_path: Path):
        for part in ("imagesTr", "labelsTr"):
            (tmp_path / "set" / part).mkdir(parents=True)
            values = np.zeros((8, 8, 4), np.uint8)
            values[2:5, 2:5, 1] = part == "labelsTr"
            for name, shade in (("a", 1), ("b", 2)):
                values[0, 0, 0] = shade if part == "imagesTr" else 0
                nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "set" / part / f"{name}.nii.gz")
        pairs = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in "ab"]
        (tmp_path / "set" / "dataset.json").write_text(json.dumps({"training": pairs}))
        words = ["train", "--data", tmp_path / "set", "--output", tmp_path / "run", "--pretrained", "none", *TINY]
        assert "found 2 volumes; expected pictures" in hspsam(*words, code=1).stderr
        assert "found a volume; expected a picture. Export its slices" in hspsam(*words, "--no-check", code=1).stderr

    def test_unknown_network(self, phantoms: Path, tmp_path: Path):
        result = hspsam("train", "--data", phantoms, "--output", tmp_path, "--network", "hsp_same", code=2)
        assert "hsp_sam" in result.stderr

    def test_missing_weights_say_what_to_do(self, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HSPSAM_WEIGHTS", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        result = hspsam("train", "--data", phantoms, "--output", tmp_path / "run", code=1)
        assert "hspsam weights fetch mobile_sam" in result.stderr and "--pretrained none" in result.stderr

    def test_a_training_may_start_from_several(
        self, phantoms: Path, run: Path, tmp_path: Path, handed: list[dict], monkeypatch: pytest.MonkeyPatch
    ):
        shutil.copytree(run, tmp_path / "hsp_sam")
        words = ["train", "--data", phantoms, "--output", tmp_path / "run", "--no-check", "--network", "sam_sp"]
        for starts, expected in (
            (["none"], ""),
            (["shipped"], str(shipped_model("sam_sp").resolve())),
            (["none", "hsp_sam"], ["", str(shipped_model().resolve())]),
            ([str(run / "model.pt"), "hsp_sam"], [str((run / "model.pt").resolve()), str(shipped_model().resolve())]),
        ):
            hspsam(*words, *(word for start in starts for word in ("--pretrained", start)))
            assert handed[-1]["pretrained"] == expected
            shutil.rmtree(tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        for start, expected in (("hsp_sam", tmp_path / "hsp_sam" / "model.pt"), ("shipped", shipped_model("sam_sp"))):
            hspsam(*words, "--pretrained", start)
            assert handed[-1]["pretrained"] == str(expected.resolve())
            shutil.rmtree(tmp_path / "run")

    def test_another_run_is_never_touched(self, phantoms: Path, run: Path):
        before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
        assert "--resume" in hspsam("train", "--data", phantoms, "--output", run, *TINY, code=1).stderr
        assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}

    def test_results_never_go_over_a_run(self, phantoms: Path, run: Path):
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        for words in (["evaluate", "--data", phantoms, "--model", run, "--output", run],
                      ["segment", phantoms / "images", run, "--model", run]):  # fmt: skip
            assert "holds a model (last.pt)" in hspsam(*words, code=2).stderr
        assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def test_a_stored_list_of_cases_cannot_be_drawn_from(self, phantoms: Path, tmp_path: Path):
        words = ["--output", tmp_path / "run", "--network", "hsp_sam_frozen", "--task", "few_shot"]
        result = hspsam("train", "--data", phantoms, *words, "--pretrained", "none", code=2)
        assert "network_def::adapt=frozen" in result.stderr and not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["batch_size=0"], "batch_size: found 0; expected 1 or more"),
            (["lr=0"], "lr: found 0; expected a number above 0"),
            (["ema=1"], "ema: found 1; expected a number above 0 and below 1"),
            (["patience=-1"], "patience: found -1; expected 0 or more"),
            (['labels={"a": 1, "b": 2}'], "background 0 and the others 1, 2"),
            (['labels={"a": 0, "b": "c"}'], "background 0 and the others 1, 2"),
            (["--task", "many"], "expected a network that takes them"),
        ],
    )
    def test_settings_that_would_fail_later_are_refused_first(self, phantoms: Path, tmp_path: Path, words, message):
        result = hspsam(
            "train", "--data", phantoms, "--output", tmp_path / "run", "--pretrained", "none", *words, code=2
        )
        assert message in result.stderr and not (tmp_path / "run").exists()

    def test_nothing_to_resume(self, phantoms: Path, tmp_path: Path):
        result = hspsam("train", "--data", phantoms, "--output", tmp_path, "--resume", code=1)
        assert "Nothing to resume" in result.stderr

    @pytest.mark.slow
    def test_resume_keeps_the_configuration(self, phantoms: Path, tmp_path: Path):
        folder = tmp_path / "run"
        hspsam("train", "--data", phantoms, "--output", folder, "--pretrained", "none", *TINY)
        hspsam("train", "--output", folder, "--resume", "epochs=2")
        with (folder / "learning_curve.csv").open() as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
        assert json.loads((folder / "config.json").read_text())["image_size"] == 64
