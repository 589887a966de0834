"""The command line once there is a model: evaluate, segment, export, score, doctor, weights, demo."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hspsam_monai.cli.demo import _pictures
from hspsam_monai.data import find_cases, write_phantoms
from hspsam_monai.errors import ConfigError
from hspsam_monai.scores import score_masks
from tests.cli.conftest import hspsam


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
        phantoms = Path(shutil.copytree(phantoms, tmp_path / "data"))
        splits = json.loads((phantoms / "splits.json").read_text())
        (phantoms / "splits.json").write_text(json.dumps({**splits, "fold 2": splits["val"]}))
        for words, split in (([], "val"), (["--split", "train"], "train"), (["--split", "fold 2"], "fold 2")):
            hspsam("evaluate", "--data", phantoms, "--model", run, "--output", tmp_path / split, *words)
            assert handed[-1]["val_split"] == split and handed[-1]["kind"] == "evaluate"

    def test_all_that_cannot_be_scored_is_named_before_anything_is_written(
        self, phantoms: Path, run: Path, tmp_path: Path, handed: list[dict]
    ):
        data = Path(shutil.copytree(phantoms, tmp_path / "data"))
        names = json.loads((data / "splits.json").read_text())["val"]
        image = next((data / "images").glob(f"{names[0]}.*"))
        image.write_bytes(image.read_bytes()[:200])
        mask = data / "masks" / f"{names[1]}.png"
        Image.open(mask).crop((0, 0, 20, 30)).save(mask)
        words = ["evaluate", "--data", data, "--model", run, "--output", tmp_path / "eval"]
        message = " ".join(hspsam(*words, code=1).stderr.split())
        assert f"2 of {len(names)} cases cannot be scored" in message
        assert f"{names[0]}: " in message and f"{names[1]}: found a mask of 20 x 30 pixels" in message
        assert not handed and not (tmp_path / "eval").exists()
        hspsam(*words, "--split", "train")  # faults elsewhere do not matter
        assert len(handed) == 1

    def test_a_list_is_no_number(self, phantoms: Path, run: Path, tmp_path: Path, handed: list[dict]):
        words = ["segment", phantoms / "images", tmp_path / "masks", "--model", run]
        assert "scales: found 1; expected a list" in hspsam(*words, "scales=1", code=2).stderr
        hspsam(*words, "scales=[1]")
        assert handed[-1]["scales"] == [1]

    def test_the_shipped_proxy_prompt_needs_supports(self, phantoms: Path, tmp_path: Path, handed: list[dict]):
        for words in (["segment", phantoms / "images", tmp_path / "a"], ["evaluate", "--data", phantoms]):
            where = [] if words[0] == "segment" else ["--output", tmp_path / "a"]
            result = hspsam(*words, *where, "--model", "proxy_prompt", code=2)
            assert "hspsam context DIR KNOWN" in " ".join(result.stderr.split())
        assert not handed and not (tmp_path / "a").exists()

    def test_flips_are_as_configured_unless_asked_for(
        self, phantoms: Path, run: Path, tmp_path: Path, handed: list[dict]
    ):
        for words, flips in (([], True), (["--flips"], True), (["--no-flips"], False)):
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
        for content in ('{"my": "project"}', "[]", "no json"):
            (tmp_path / "demo.json").write_text(content)
            assert "no earlier demo" in hspsam("demo", "--output", tmp_path, code=1).stderr
            assert (tmp_path / "data").is_dir() and (tmp_path / "demo.json").read_text() == content

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
