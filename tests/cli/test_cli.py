"""The command line: every command, its exit codes and its words."""

import csv
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hspsam_monai.cli import workflows
from hspsam_monai.cli.app import app
from hspsam_monai.cli.console import explain
from hspsam_monai.cli.demo import _pictures
from hspsam_monai.cli.models import find_model, read_overlay
from hspsam_monai.cli.options import check_overrides, overlay_names, parse_overrides
from hspsam_monai.data import find_cases, write_phantoms
from hspsam_monai.errors import ConfigError, DataError, WeightsError
from hspsam_monai.scores import score_masks

TINY = ["image_size=64", "batch_size=4", "epochs=1", "warmup=1"]


def hspsam(*arguments: object, code: int = 0):
    """Run a command in this process and demand its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + "".join(map(str, [result.exception]))
    return result


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantoms of 64 pixels, three of them for validation."""
    return write_phantoms(tmp_path_factory.mktemp("cli") / "data", 10, size=(64, 64), val_fraction=0.3)


@pytest.fixture(scope="module")
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


class TestFace:
    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys; from typer.testing import CliRunner; from hspsam_monai.cli.app import app\n"
            "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
            "heavy = {'torch', 'monai', 'numpy', 'PIL', 'scipy'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize("own", [None, "ACTIVE"])
    def test_waiting_threads_sleep_unless_the_user_says_otherwise(self, own: str | None):
        code = "import os; from hspsam_monai.cli import prepare; prepare(); print(os.environ['OMP_WAIT_POLICY'])"
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": own} if own else {}
        done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == (own or "PASSIVE")

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
        for entry in ("min_confidence", "scales"):
            assert find_model(run).network[entry] == config.pop(entry)
        (tmp_path / "network.json").write_text(json.dumps(config))
        (tmp_path / "model.pt").write_bytes(b"")
        before, shipped = find_model(tmp_path).network, find_model(None).network
        assert (before["min_confidence"], before["scales"]) == (0, [1])
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

    def test_unknown_network(self, phantoms: Path, tmp_path: Path):
        result = hspsam("train", "--data", phantoms, "--output", tmp_path, "--network", "hsp_same", code=2)
        assert "hsp_sam" in result.stderr

    def test_missing_weights_say_what_to_do(self, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HSPSAM_WEIGHTS", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        result = hspsam("train", "--data", phantoms, "--output", tmp_path / "run", code=1)
        assert "hspsam weights fetch mobile_sam" in result.stderr and "--pretrained none" in result.stderr

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


class TestUse:
    def test_evaluate_segment_and_score_agree(self, phantoms: Path, run: Path, tmp_path: Path):
        result = hspsam("evaluate", "--data", phantoms, "--model", run, "--output", tmp_path / "eval")
        summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
        assert f"mean Dice {summary['dice']['mean']:.4f}" in result.stdout
        assert (tmp_path / "eval" / "gallery.png").is_file()

        masks = tmp_path / "masks"
        hspsam("segment", phantoms / "images", masks, "--model", run, "--device", "cpu")
        assert {p.stem for p in masks.glob("phantom_*.png")} == {p.stem for p in (phantoms / "images").iterdir()}
        assert np.array(Image.open(masks / "phantom_0000.png")).shape == (64, 64)

        scores = ["--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json"]
        hspsam("score", masks, phantoms, "--split", "val", *scores)
        again = json.loads((tmp_path / "s.json").read_text())
        assert again["n"] == 3
        assert again["dice"]["mean"] == pytest.approx(summary["dice"]["mean"], abs=1e-6)

    def test_a_split_is_handed_on(self, phantoms: Path, run: Path, tmp_path: Path, handed: list[dict]):
        for words, split in (([], "val"), (["--split", "train"], "train"), (["--split", "fold 2"], "fold 2")):
            hspsam("evaluate", "--data", phantoms, "--model", run, "--output", tmp_path / "eval", *words)
            assert handed[-1]["val_split"] == split and handed[-1]["kind"] == "evaluate"

    def test_flips_are_as_configured_unless_asked_for(
        self, phantoms: Path, run: Path, tmp_path: Path, handed: list[dict]
    ):
        for words, flips in (([], None), (["--flips"], True), (["--no-flips"], False)):
            hspsam("segment", phantoms / "images", tmp_path / "masks", "--model", run, *words)
            assert handed[-1].get("flips") is flips and handed[-1]["kind"] == "infer"

    def test_log_files_end_with_their_run(self, phantoms: Path, run: Path, tmp_path: Path):
        first, second = tmp_path / "first", tmp_path / "second"
        hspsam("segment", phantoms / "images" / "phantom_0000.jpg", first, "--model", run)
        length = (first / "log.txt").stat().st_size
        hspsam("segment", phantoms / "images" / "phantom_0000.jpg", second, "--model", run)
        assert length > 0 and (first / "log.txt").stat().st_size == length

    def test_bad_file_does_not_stop_the_others(self, phantoms: Path, run: Path, tmp_path: Path):
        images = tmp_path / "images"
        images.mkdir()
        for name in ("phantom_0000.jpg", "phantom_0001.jpg"):
            (images / name).write_bytes((phantoms / "images" / name).read_bytes())
        (images / "broken.png").write_bytes(b"")
        (images / "text.jpg").write_text("no picture")
        result = hspsam("segment", images, tmp_path / "masks", "--model", run, code=1)
        assert "2 of 4 files failed" in result.stderr
        assert "broken" in result.stderr and "text" in result.stderr
        assert len(list((tmp_path / "masks").glob("phantom_*.png"))) == 2

    def test_names_that_are_no_text_cost_nothing(self, phantoms: Path, run: Path, tmp_path: Path):
        first, *_ = sorted((phantoms / "images").iterdir())
        (tmp_path / "images").mkdir()
        try:
            (tmp_path / "images" / f"caf\udce9{first.suffix}").write_bytes(first.read_bytes())
        except (OSError, UnicodeError):
            pytest.skip("this file system takes no such name")
        (tmp_path / "images" / "moving.gif").write_bytes(b"GIF89a")
        result = hspsam("segment", tmp_path / "images", tmp_path / "masks", "--model", run, "--no-flips")
        assert "moving.gif" in result.stderr
        assert (tmp_path / "masks" / "caf\udce9.png").is_file()
        for name in ("cases.csv", "gallery.html"):
            assert "caf" in (tmp_path / "masks" / name).read_text(encoding="utf-8")

    def test_results_of_before_are_told_from_those_of_now(self, phantoms: Path, run: Path, tmp_path: Path):
        first, *_ = sorted((phantoms / "images").iterdir())
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / first.name).write_bytes(first.read_bytes())
        words = ["segment", tmp_path / "images", tmp_path / "masks", "--model", run, "--no-flips"]
        hspsam(*words)
        assert json.loads((tmp_path / "masks" / "config.json").read_text())["flips"] is False
        (tmp_path / "images" / first.name).write_bytes(b"")
        mask = tmp_path / "masks" / f"{first.stem}.png"
        assert f"({mask} is an earlier run's.)" in hspsam(*words, code=1).stderr
        assert mask.is_file() and not (tmp_path / "masks" / "cases.csv").exists()

    def test_pictures_and_paths_are_left_alone(self, phantoms: Path, run: Path, tmp_path: Path):
        picture = tmp_path / "p.png"
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
        before = picture.read_bytes()
        result = hspsam("segment", picture, tmp_path, "--model", run, "--no-flips", code=1)
        assert "is the picture itself" in result.stderr and picture.read_bytes() == before
        result = hspsam("segment", phantoms / "images", phantoms / "masks", "--model", run, code=2)
        assert "part of a data set" in result.stderr
        result = hspsam("segment", picture, tmp_path / "out#1", "--model", run, code=2)
        assert "expected another name" in result.stderr

    def test_unknown_device(self, phantoms: Path, run: Path, tmp_path: Path):
        result = hspsam("segment", phantoms / "images", tmp_path, "--model", run, "--device", "gpu", code=2)
        assert "expected cpu" in result.stderr


class TestExport:
    @pytest.mark.parametrize("network", [{"_target_": "hspsam_monai.networks.SAMSP"}, None])
    def test_networks_without_a_fixed_graph_are_refused_at_once(self, tmp_path: Path, bundle: Path, network):
        pytest.importorskip("onnxscript")
        model = bundle / "models" / "proxy_prompt.safetensors"
        if network is not None:
            model = tmp_path / "model.pt"
            model.touch()
            (tmp_path / "network.json").write_text(json.dumps({"labels": {"a": 0, "b": 1}, "network_def": network}))
        result = hspsam("export", model, tmp_path / "out.onnx", code=2)
        assert "no fixed graph" in result.stderr and not (tmp_path / "out.onnx").exists()

    def test_what_is_missing_is_named_before_any_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        assert "ends in .onnx" in hspsam("export", "shipped", tmp_path / "model.pt", code=2).stderr
        assert "No model at" in hspsam("export", tmp_path / "no.pt", tmp_path / "m.onnx", code=1).stderr
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        result = hspsam("export", "shipped", tmp_path / "m.onnx", code=2)
        assert "onnx, onnxscript, onnxruntime" in result.stderr and "hspsam_monai[export]" in result.stderr
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_a_run_becomes_a_file_that_says_what_it_is(self, run: Path, tmp_path: Path):
        from hspsam_monai.inference.export import read_metadata

        result = hspsam("export", run, tmp_path / "out" / "model.onnx")
        assert "image (B, 3, 64, 64)" in result.stdout and "batch 1 and 3" in result.stdout
        meta = read_metadata(tmp_path / "out" / "model.onnx")
        assert meta["model"] == run.name and meta["image_size"] == "64"
        assert json.loads(meta["classes"]) == {"background": 0, "foreground": 1}


class TestScore:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """Three cases: half right (Dice 2/3), right, missed."""
        truth = np.zeros((8, 8), np.uint8)
        truth[:4] = 1
        for folder, masks in {
            "pred": [truth * (np.arange(8) < 4), truth, truth * 0],
            "true": [truth, truth, truth],
        }.items():
            (tmp_path / folder).mkdir()
            for name, mask in zip("abc", masks, strict=True):
                Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / folder / f"{name}.png")
        return tmp_path / "pred", tmp_path / "true"

    def test_values(self, folders: tuple[Path, Path], tmp_path: Path):
        result = hspsam("score", *folders, "--surface", "--csv", tmp_path / "s.csv")
        assert all(word in result.stdout for word in ("0.6667", "1.0000", "0.5556", "HD95", "NSD"))
        with (tmp_path / "s.csv").open() as file:
            dice = {row["case"]: float(row["mean_dice"]) for row in csv.DictReader(file)}
        assert dice == pytest.approx({"a": 2 / 3, "b": 1.0, "c": 0.0}, abs=1e-6)

    def test_missing_prediction(self, folders: tuple[Path, Path]):
        (folders[0] / "c.png").unlink()
        assert "no prediction" in hspsam("score", *folders, code=1).stderr
        assert "0.8333" in hspsam("score", *folders, "--partial").stdout

    def test_classes_and_tolerance(self, tmp_path: Path):
        masks = np.random.default_rng(0).integers(0, 3, (2, 24, 24)).repeat(6, axis=1).repeat(6, axis=2)
        for name, mask in zip(("pred.png", "true.png"), masks.astype(np.uint8), strict=True):
            Image.fromarray(mask).save(tmp_path / name)
        words = ["score", tmp_path / "pred.png", tmp_path / "true.png", "--surface", "--json", tmp_path / "s.json"]
        assert "raise the number of classes" in hspsam(*words, code=1).stderr
        found = []
        for tolerance in (1.0, 4.0):
            hspsam(*words, "--classes", 3, "--tolerance", tolerance)
            summary = json.loads((tmp_path / "s.json").read_text())
            expected = score_masks(*masks, 3, surface=True, tolerance=tolerance)
            for metric in ("dice", "nsd"):
                means = [values[metric] for values in summary["per_class"].values()]
                assert means == pytest.approx(expected[metric]) and len(means) == 2
            found.append(summary["nsd"]["mean"])
        assert found[0] < found[1]


class TestHelpers:
    def test_doctor(self):
        result = hspsam("doctor")
        assert "Everything essential works" in result.stdout
        assert all(word in result.stdout for word in ("torch", "precision", "memory", "bundle"))

    def test_doctor_without_bundle(self, monkeypatch: pytest.MonkeyPatch):
        def missing():
            raise ConfigError("The bundle was not found. Set HSPSAM_BUNDLE.")

        monkeypatch.setattr("hspsam_monai.bundle_path.bundle_root", missing)
        result = hspsam("doctor", code=1)
        assert "HSPSAM_BUNDLE" in result.stdout and "Broken: bundle" in result.stdout

    def test_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HSPSAM_WEIGHTS", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert "mobile_sam" in hspsam("weights", "list").stdout
        assert "No known weights" in hspsam("weights", "verify", code=1).stderr
        (tmp_path / "mobile_sam.pt").write_bytes(b"not the official file")
        assert "sha256" in hspsam("weights", "verify", code=1).stderr
        assert "catalogue" in hspsam("weights", "fetch", "no_such", code=1).stderr

    @pytest.mark.data
    def test_weights_verify(self, shared: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HSPSAM_WEIGHTS", str(shared / "weights"))
        assert "verified" in hspsam("weights", "verify", "mobile_sam").stdout


class TestDemo:
    @pytest.mark.slow
    def test_demo_runs_twice(self, tmp_path: Path):
        for _ in range(2):  # the second replaces the first
            result = hspsam("demo", "--output", tmp_path / "demo", "--count", 10, "--epochs", 1)
            assert "Mean Dice on unseen images" in result.stdout
        assert (tmp_path / "demo" / "after" / "gallery.png").is_file()

    def test_demo_keeps_what_is_there_until_the_data_is_good(self, tmp_path: Path):
        data = write_phantoms(tmp_path / "demo" / "data", 4, size=(64, 64))
        (tmp_path / "demo" / "demo.json").write_text("{}")
        assert "lies in" in hspsam("demo", "--data", data, "--output", tmp_path / "demo", code=1).stderr
        hspsam("demo", "--data", tmp_path / "none", "--output", tmp_path / "demo", code=1)
        assert len(list((data / "images").iterdir())) == 4

    def test_demo_removes_nothing_of_others(self, tmp_path: Path):
        (tmp_path / "data").mkdir()
        assert "no earlier demo" in hspsam("demo", "--output", tmp_path, code=1).stderr
        assert (tmp_path / "data").is_dir()

    def test_unseen_images_of_a_union_lie_side_by_side(self, tmp_path: Path):
        data = tmp_path / "data"
        splits = {"a": {"train": ["seen"], "val": ["b__x", "x"]}, "a__b": {"train": [], "val": ["x"]}}
        for source, split in splits.items():
            for value, name in enumerate(split["train"] + split["val"]):
                for part, suffix in (("images", ".jpg"), ("masks", ".png")):
                    (data / source / part).mkdir(parents=True, exist_ok=True)
                    picture = Image.fromarray(np.full((40, 40), value + len(source), np.uint8))
                    picture.save(data / source / part / (name + suffix))
            (data / source / "splits.json").write_text(json.dumps(split))
        found = find_cases(_pictures(tmp_path / "demo", data, "val"), labels=False)
        assert [case["case"] for case in found] == ["a__b__x", "a__b__x_2", "a__x"]
        known = {Path(case["image"]).read_bytes() for case in find_cases(data, "val")}
        assert {Path(case["image"]).read_bytes() for case in found} == known and len(known) == 3
