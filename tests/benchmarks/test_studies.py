"""Studies that train: what their variants share, and one that is stopped and resumed."""

import json

import numpy as np
import pytest
import torch

from hspsam_monai.data import find_cases, mask_values, read_image, read_mask
from hspsam_monai.errors import ConfigError, DataError


def test_the_generators_tasks_are_parts_of_data_sets_with_their_splits(phantoms, tmp_path):
    from tasks import copy_part

    source, root = phantoms / "kvasir", tmp_path / "task"
    copy_part(source, root, (2, 1), 0)
    splits, own = (json.loads((folder / "splits.json").read_text()) for folder in (root, source))
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 2, "val": 1}
    assert all(set(splits[name]) <= set(own[name]) for name in splits)
    assert all(mask_values(case["label"]) != {0} for case in find_cases(root))
    assert len(find_cases(root)) == 3
    before = sorted(path.stat().st_mtime_ns for path in root.rglob("*"))
    copy_part(source, root, (3, 1), 1)  # is there already
    assert sorted(path.stat().st_mtime_ns for path in root.rglob("*")) == before


def test_variants_differ_from_the_start_in_one_thing_and_come_once():
    from prompt_ablation import Variant, _variants

    base = Variant("image", 8, "slim", "full")
    names = [v.name for v in _variants(base, ["static", "image", "none"], [1, 8], ["paper"], ["lora"])]
    assert names == [
        "image-p8-slim-full", "static-p8-slim-full", "none-slim-full", "image-p1-slim-full",
        "image-p8-paper-full", "image-p8-slim-lora",
    ]  # fmt: skip


def test_the_plain_peer_has_the_same_encoder_and_budget():
    from studies import merged_config
    from unseen_sources import VARIANTS

    ours, plain = (merged_config(*VARIANTS[name]) for name in ("hsp", "plain"))
    assert ours.get("network_def")["encoder"] == plain.get("network_def")["encoder"]
    assert plain.get("network_def")["adapt"] == ours.get("network_def")["adapt"] == "full"
    differing = {key for key in ours.config if ours.get(key) != plain.get(key)}
    assert differing == {"network_def"}


def test_variants_of_the_unseen_study_differ_in_the_prompts_alone():
    from studies import merged_config
    from unseen_sources import VARIANTS

    defs = {name: merged_config(*VARIANTS[name]).get("network_def") for name in ("hsp", "static", "none")}
    for name, source in (("hsp", "image"), ("static", "static"), ("none", "none")):
        assert defs[name] == {**defs["hsp"], "prompt_source": source}


def test_a_budget_in_iterations_trains_every_source_equally_long():
    from studies import budget

    assert budget(None, 792, {}) == {}
    assert budget(600, 792, {}) == {"epochs": 6}  # 99 steps of 8
    assert budget(600, 478, {}) == {"epochs": 10}  # 59 steps of 8
    assert budget(600, 792, {"batch_size": 4}) == {"epochs": 3}
    assert budget(10, 3, {}) == {"epochs": 10}  # fewer cases than a batch are one step


def test_variants_of_sam_sp_differ_in_one_thing_and_zero_passes_come_first():
    from sam_sp_ablation import OVERLAY, variants
    from studies import merged_config

    found = variants([0, 1, 2], ["box", "mask", "points"], ["on", "off"])
    assert [v.name for v in found] == ["s0", "s1-box", "s1-mask", "s1-points", "s1-box-undistilled", "s2-box"]
    configs = {v.name: merged_config(OVERLAY, v.overrides()) for v in found}
    assert configs["s2-box"].get("network_def")["steps"] == 2
    assert configs["s1-mask"].get("network_def")["prompt"] == ["mask"]
    assert configs["s1-box-undistilled"].get_parsed_content("train::loss").weight == 0
    assert configs["s1-box"].get_parsed_content("train::loss").weight > 0
    budgets = {(c["epochs"], c["batch_size"], c["lr"], c["image_size"]) for c in configs.values()}
    assert len(budgets) == 1
    # The paper's training unless asked for, though the overlay has a simulated person.
    assert {c.get("network_def")["corrections"] for c in configs.values()} == {0}
    corrected = variants([0, 1], ["mask+points"], ["on"], corrections=2)
    assert [v.name for v in corrected] == ["s0-c2", "s1-box-c2", "s1-mask+points-c2"]
    assert all(v.overrides()["network_def::corrections"] == 2 for v in corrected)


def test_few_shot_methods_share_cases_and_budget(phantoms):
    from few_shot import METHODS, _report, _run, _with_object
    from studies import merged_config

    root = phantoms / "kvasir"
    runs = {method: _run(root, method, 1, 3, {"image_size": 64}, []) for method in METHODS}
    configs = {method: merged_config(run.overlay, run.overrides) for method, run in runs.items()}
    for key in ("epochs", "batch_size", "draws", "image_size", "keep", "augmentation", "warmup", "power"):
        assert len({json.dumps(config[key]) for config in configs.values()}) == 1, key
    drawn = {m: [c["case"] for c in config.get_parsed_content("train::dataset").data] for m, config in configs.items()}
    assert len({tuple(names) for names in drawn.values()}) == 1 and len(drawn["proxy"]) == 3
    assert set(drawn["proxy"]) <= {case["case"] for case in find_cases(root, "train")}
    everything = find_cases(root)
    assert len(_with_object(everything)) == len(everything) - 1  # a tenth of the phantoms is empty

    scores = {
        ("s", m, d): {"a": base + d / 10, "b": base} for m, base in (("proxy", 0.8), ("hsp", 0.5)) for d in (0, 1)
    }
    text = _report(["s"], ["proxy", "hsp"], [0, 1], 16, scores)
    assert "| s (2) | proxy | 0.8000 | 0.8500 | 0.8250 ± 0.0354 |" in text
    assert "+0.3000 ± 0.0000 | +0.3000 [+0.3000, +0.3000] |" in text


def test_systems_share_everything_but_the_network(phantoms):
    from studies import merged_config
    from systems import SYSTEMS, _report

    configs = {name: merged_config(overlay, changed) for name, (overlay, changed) in SYSTEMS.items()}
    for key in ("epochs", "batch_size", "image_size", "augmentation", "warmup", "power", "ema", "keep", "lr"):
        assert len({json.dumps(config[key]) for config in configs.values()}) == 1, key
    adapted = {name: config.get("network_def")["adapt"] for name, config in configs.items()}
    assert adapted == {"hsp": "full", "hsp-lora": "lora", "sam-sp": "lora", "sam-sp-full": "full"}
    scores = {("p", s, d): {"val": {"a": base + d / 10, "b": base}} for s, base in (("hsp", 0.8), ("sam-sp", 0.7))
              for d in (0, 1)}  # fmt: skip
    text = _report(["p"], ["hsp", "sam-sp"], [0, 1], scores)
    assert "| p (2) | sam-sp | 0.7000 | 0.7500 | 0.7250 | 0.0% | +0.1000 [+0.1000, +0.1000] |" in text


def test_the_codes_fingerprint_covers_overlays_and_scoring(tmp_path, monkeypatch):
    import studies

    import hspsam_monai

    monkeypatch.setattr(hspsam_monai, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(studies, "bundle_root", lambda: tmp_path)
    names = ["scores.py", "evaluation.py", "networks/a.py", "configs/train.json", "configs/task/polyp.json"]
    files = [tmp_path / name for name in [*names, "configs/network/own.json"]]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    codes = [(studies.run_code(), studies.run_code("network/own.json"))]
    for file in files:
        file.write_text("{ }")
        codes.append((studies.run_code(), studies.run_code("network/own.json")))
    plain, own = zip(*codes, strict=True)
    assert len(set(plain)) == 6 and len(set(own)) == 7  # the overlay of another run is none of its business
    assert all(b.startswith(f"{a}+") for a, b in codes)


def test_a_killed_sitting_is_counted_and_its_code_kept(phantoms, tmp_path, monkeypatch):
    import studies

    overrides = {"dataset_dir": str(phantoms / "kvasir"), "pretrained": "", "seed": 0}
    run = studies.Run("run", overrides)
    study, folder = studies.Study(tmp_path, [run]), tmp_path / "run"
    curve, sittings = folder / "learning_curve.csv", folder / "sittings.json"
    monkeypatch.setattr(studies, "run_code", lambda _: "first")

    def one_epoch(files, overrides):
        curve.write_text("epoch,val_mean_dice\n1,0.5\n")
        (folder / "last.pt").touch()
        (folder / "config.json").write_text("{}")

    def killed(files, overrides):
        one_epoch(files, overrides)
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        study._train(run)
    (sitting,) = json.loads(sittings.read_text())
    # SIGKILL leaves what was written when the sitting began.
    sittings.write_text(json.dumps([{**sitting, "begun": curve.stat().st_mtime - 100, "seconds": None}]))
    monkeypatch.setattr(studies, "train", one_epoch)
    monkeypatch.setattr(studies, "run_code", lambda _: "second")
    study._train(run)
    record = json.loads((folder / "run.json").read_text())
    assert record["codes"] == ["first", "second"] and 100 <= record["seconds"] < 110
    assert "code first, second. **The runs come from different states of the code.**" in study.describe()


def test_different_overlays_are_no_different_states_of_the_code(phantoms, tmp_path):
    import studies

    overrides = {"dataset_dir": str(phantoms / "kvasir"), "seed": 0}
    overlays = {"hsp": None, "plain": "network/conv_pyramid.json"}
    study = studies.Study(tmp_path, [studies.Run(name, overrides, overlay) for name, overlay in overlays.items()])

    def text(**codes):
        for name, code in codes.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text("{}")
            record = {"settings": {"pretrained": ""}, "seconds": 1, **code}
            (tmp_path / name / "run.json").write_text(json.dumps(record))
        return study.describe()

    assert "different states" not in text(hsp={"codes": ["a"]}, plain={"codes": ["a+b"]})
    assert "different states" in text(hsp={"codes": ["a"]}, plain={"codes": ["a+b", "a+c"]})
    assert "different states" in text(hsp={"codes": ["a"]}, plain={"codes": ["c+b"]})
    assert "code a." in text(hsp={"code": "a"}, plain={"code": "a"})  # records from before


def test_slices_are_a_data_set_of_pictures(tmp_path):
    import nibabel
    from slices import write_slices

    affine, names = np.eye(4), {"train": ["a", "b"], "val": ["c"]}
    for case in "abc":
        image, label = np.zeros((10, 12, 8), np.float32), np.zeros((10, 12, 8), np.uint8)
        label[2:7, 3:8, 2:7] = 2
        image[label > 0] = 500 + ord(case)
        for kind, array in (("imagesTr", image), ("labelsTr", label)):
            (tmp_path / "volumes" / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "volumes" / kind / f"{case}.nii.gz")
    (tmp_path / "volumes" / "splits.json").write_text(json.dumps(names))
    (root,) = write_slices(tmp_path / "volumes", tmp_path / "out", {"organ": {2}}, 3)
    assert [case["case"] for case in find_cases(root, "val")] == ["c_003", "c_004", "c_005"]
    for case in find_cases(root):
        grey, mask = read_image(case["image"])[..., 0], read_mask(case["label"], 2)
        assert mask.shape == (12, 10) and mask.sum() == 25
        assert ((grey > 0.9) == (mask > 0)).all()
        assert mask[12 - 8 : 12 - 3, 2:7].all()  # rows from the last voxel of the second axis to its first
    with pytest.raises(DataError, match="without heart"):
        write_slices(tmp_path / "volumes", tmp_path / "out", {"heart": {1}})


@pytest.mark.slow
def test_an_ablation_is_trained_scored_reported_and_not_repeated(phantoms, tmp_path, monkeypatch, capsys):
    import prompt_ablation
    import scoring
    import studies

    results = tmp_path / "RESULTS.md"
    results.write_text("<!-- section: prompt-ablation -->\nnot measured\n<!-- end: prompt-ablation -->\n")
    words = ["--data", str(phantoms / "kvasir"), "--weights", "none", "--output", str(tmp_path / "out")]
    words += ["--results", str(results), "--epochs", "1", "--image-size", "64", "--seeds", "0", "--rounds", "2"]
    words += ["--sources", "image", "none", "--set", "batch_size=2"]
    prompt_ablation.main(words)
    text = results.read_text()
    assert "| image-p8-slim-full |" in text
    assert "| none-slim-full |" in text
    assert "epochs 1, image_size 64, batch_size 2" in text
    assert str(tmp_path) not in text
    scores = scoring.read_dice(tmp_path / "out" / "none-slim-full-0" / "scores" / "val.csv")
    assert list(scores) == [case["case"] for case in find_cases(phantoms / "kvasir", "val")]

    def never(*_):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(studies, "train", never)
    monkeypatch.setattr(studies, "score_cases", never)
    prompt_ablation.main(words)
    with pytest.raises(ConfigError, match=r"epochs 1 \(now 2\)"):
        prompt_ablation.main([*words, "--epochs", "2"])
    capsys.readouterr()


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(phantoms, tmp_path, monkeypatch):
    import studies

    from hspsam_monai.encoders.state_files import read_state
    from hspsam_monai.training import Checkpointer

    overrides = {"dataset_dir": str(phantoms / "kvasir"), "pretrained": "", "seed": 3, "epochs": 2}
    overrides |= {"image_size": 64, "batch_size": 2, "network_def::prompt_source": "static"}
    run = studies.Run("run", overrides, tests={"all": find_cases(phantoms / "clinicdb")})
    expected = studies.Study(tmp_path / "whole", [run]).complete()

    save = Checkpointer.save

    def save_and_stop(self, engine):
        save(self, engine)
        raise KeyboardInterrupt

    study = studies.Study(tmp_path / "parts", [run])
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            study.complete()
    assert not (tmp_path / "parts" / "run" / "run.json").exists()
    assert study.complete() == expected
    whole, parts = (read_state(tmp_path / name / "run" / "model.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    record = json.loads((tmp_path / "parts" / "run" / "run.json").read_text())
    assert record["epochs"] == 2
    assert not (tmp_path / "parts" / "run" / "last.pt").exists()
