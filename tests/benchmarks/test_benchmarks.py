"""The benchmarks: tables, sections of RESULTS.md, intervals, true boxes, and a study that is stopped and resumed."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hspsam_monai.data import find_cases, mask_values, read_image, read_mask, write_phantoms
from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.transforms import fit_image


@pytest.fixture(scope="module", autouse=True)
def _scripts(repo):
    """The scripts import each other from their own folder, as when they are started."""
    sys.path.insert(0, str(repo / "benchmarks"))
    yield
    sys.path.remove(str(repo / "benchmarks"))


@pytest.fixture
def phantoms(tmp_path):
    """Two sources of six phantoms."""
    for seed, name in enumerate(("kvasir", "clinicdb")):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_phantoms(tmp_path / "data" / name, 6, seed=seed, size=(72, 96), val_fraction=0.34)
    return tmp_path / "data"


# Tables and RESULTS.md


def test_a_table_says_what_is_not_measured():
    from common import markdown_table

    text = markdown_table(["a", "b"], [[0.123456, None], ["x|y", 3]])
    assert text.splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 0.1235 | not measured |",
        "| x\\|y | 3 |",
    ]
    with pytest.raises(ConfigError, match="1 cells"):
        markdown_table(["a", "b"], [[1]])


def test_one_section_is_replaced_and_the_rest_stays(tmp_path):
    from common import update_results

    file = tmp_path / "RESULTS.md"
    before = (
        "# T\n<!-- section: one -->\nold\n<!-- end: one -->\nbetween\n<!-- section: two -->\n2\n<!-- end: two -->\n"
    )
    file.write_text(before)
    update_results("one", "new \\1 text\n\n", file)
    assert file.read_text() == before.replace("old", "new \\1 text")
    update_results("one", "old", file)
    assert file.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["RESULTS.md"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("three", "x", "must hold"), ("one", "<!-- end: one -->", "may not hold")],
)
def test_a_section_that_is_not_there_is_refused(tmp_path, name, content, message):
    from common import update_results

    file = tmp_path / "RESULTS.md"
    file.write_text("<!-- section: one -->\nold\n<!-- end: one -->\n")
    with pytest.raises(ConfigError, match=message):
        update_results(name, content, file)
    assert "old" in file.read_text()


def test_every_script_has_its_section(repo):
    import box_prompt
    import doubtful
    import few_shot
    import int8
    import prompt_ablation
    import proxy_speed
    import run
    import sam_sp_ablation
    import stored_features
    import support_curve
    import systems
    import unseen_sources

    text = (repo / "benchmarks" / "RESULTS.md").read_text()
    trained = (unseen_sources, prompt_ablation, sam_sp_ablation, systems, few_shot, support_curve)
    for script in (box_prompt, *trained, stored_features, int8, doubtful, proxy_speed):
        assert text.count(f"<!-- section: {script.SECTION} -->") == 1
    sections = re.findall(r"<!-- section: (\S+) -->", text)
    assert sections == re.findall(r"<!-- end: (\S+) -->", text)
    assert set(run.unmeasured(repo / "benchmarks" / "RESULTS.md")) <= set(sections)


def test_the_machine_is_described_without_its_name():
    import socket

    from common import machine, machine_line

    found = machine()
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] in machine_line()
    assert socket.gethostname() not in json.dumps(list(found.values())[:-1])


# Doubtful components


def test_the_largest_band_beside_the_object_is_empty_and_thin_ones_are_none():
    from doubtful import empty_band

    mask = np.zeros((10, 20), np.uint8)
    mask[2:5, 3:9] = 1
    window = empty_band(mask)
    assert window == (slice(None), slice(9, 20)) and not mask[window].any()  # 0.55 of the width, 0.5 of the height
    mask[1:9, 2:17] = 1
    assert empty_band(mask) is None


def test_bars_are_measured_on_images_and_their_empty_parts(phantoms, tmp_path, capsys):
    from doubtful import main

    words = ["--data", str(phantoms), "--measure", "shipped:kvasir:all", "--bars", "0", "0.999", "--limit", "3"]
    main([*words, "--output", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| shipped |")]
    assert [line.split("|")[3].strip() for line in lines] == ["0", "0.999"]
    assert lines[1].split("|")[-2].strip() == "1.0000"  # nothing is that sure: every empty part stays empty
    with pytest.raises(ConfigError, match="MODEL:SET:SPLIT"):
        main([*words[:3], "shipped"])


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


# Intervals


def test_a_constant_difference_has_no_width():
    from common import paired_bootstrap

    interval = paired_bootstrap([0.5, 0.7, 0.9], [0.4, 0.6, 0.8], resamples=200)
    assert interval == pytest.approx((0.1, 0.1, 0.1))


def test_the_interval_equals_the_normal_one_on_many_cases():
    from common import paired_bootstrap

    random = np.random.default_rng(0)
    base = random.random(2000)
    gain = random.normal(0.03, 0.2, 2000)
    interval = paired_bootstrap(base + gain, base, resamples=2000)
    half = 1.96 * gain.std() / np.sqrt(2000)
    assert interval.mean == pytest.approx(gain.mean())
    assert interval.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(gain.mean() + half, abs=0.1 * half)
    assert paired_bootstrap(base + gain, base, resamples=2000) == interval


def test_blocks_widen_the_interval_of_alike_neighbours():
    from common import paired_bootstrap

    runs = np.repeat(np.random.default_rng(1).normal(size=40), 20)  # 40 sequences of 20 equal frames
    one = paired_bootstrap(runs, resamples=2000)
    blocks = paired_bootstrap(runs, resamples=2000, block=20)
    ratio = (blocks.high - blocks.low) / (one.high - one.low)
    assert 2.5 < ratio < np.sqrt(20)  # the whole factor needs blocks cut at the sequences
    assert blocks.mean == one.mean


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [0.0])])
def test_unpaired_values_are_refused(a, b):
    from common import paired_bootstrap

    with pytest.raises(DataError):
        paired_bootstrap(a, b)


def test_seeds_are_averaged_case_by_case():
    from common import mean_over_seeds

    assert mean_over_seeds([{"a": 0.2, "b": 1.0}, {"b": 0.0, "a": 0.4}]) == pytest.approx([0.3, 0.5])
    with pytest.raises(DataError, match="same cases"):
        mean_over_seeds([{"a": 0.2}, {"b": 0.2}])


# Boxes and variants


def test_true_boxes_are_first_and_last_pixel_and_specks_have_none():
    from box_prompt import true_boxes

    truth = np.zeros((40, 60), np.uint8)
    truth[3:10, 5:20] = 1
    truth[10:12, 20:22] = 1  # touches by a corner: the same polyp
    truth[20:30, 40:59] = 1
    truth[39, 0] = 1  # a speck
    assert true_boxes(truth, True, 16).tolist() == [[5, 3, 21, 11], [40, 20, 58, 29]]
    assert true_boxes(truth, False, 16).tolist() == [[5, 3, 58, 29]]
    assert len(true_boxes(truth, True, 1)) == 3
    for separate in (True, False):
        assert true_boxes(np.zeros((4, 4), np.uint8), separate, 1).shape == (0, 4)


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


def test_the_curves_references_need_no_training(phantoms):
    from common import image_tensor
    from support_curve import METHODS, _candidates, _report

    from hspsam_monai.networks import ProxyPrompt

    torch.manual_seed(0)
    small = {"value_width": 24, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 16, "top_k": 1}
    network = ProxyPrompt("mobile_sam", image_size=64, **small).eval()
    cases = [case for case in find_cases(phantoms / "kvasir") if mask_values(case["label"]) != {0}][:2]
    found = _candidates(network, 64, cases)
    assert set(found) == set(METHODS) and len(network.context_keys) == 2 * 16
    image = fit_image(image_tensor(cases[0]["image"]), 64)
    label = torch.from_numpy(read_mask(cases[0]["label"], 2))[None, None].float()
    label = F.interpolate(label, (64, 64), mode="nearest-exact")
    cells = F.adaptive_avg_pool2d(label, 4)
    with torch.no_grad():
        nearest, copy = (found[name](image)[:, 1:].sigmoid() for name in ("nearest", "copy"))
    # A support itself finds its own cells; the copy is the mean of both masks.
    assert (F.interpolate(nearest, (4, 4), mode="bilinear", antialias=True) - cells).abs().mean() < 0.15
    assert copy.min() < 0.01 and set(copy.unique().round(decimals=2).tolist()) <= {0.0, 0.5, 1.0}

    scores = {(m, k, d): {"a": 0.5 + k / 100, "b": 0.5} for m in METHODS for k in (1, 4) for d in (0, 1)}
    text = _report("busi", [1, 4], [0, 1], scores)
    assert "| proxy | 4 | 0.5200 | 0.5200 | 0.5200 ± 0.0000 | 0.0% | +0.0150" in text


def test_proxy_speed_sets_every_context_and_its_recurrence_is_the_scans(capsys):
    import proxy_speed

    proxy_speed.main("--dry --sizes 64 --supports 1 3 --tokens 64 128 --seconds 0.01".split())
    out = capsys.readouterr().out
    assert [line.split("|")[2].strip() for line in out.splitlines() if line.startswith("| 64 |")] == ["K = 1", "K = 3"]
    assert "scan, 128 tokens" in out and "plain recurrence, 64 tokens" in out
    assert float(out.split("64 tokens: ")[-1].split()[0].rstrip(".")) < 1e-6


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


# Studies


@pytest.mark.slow
@pytest.mark.parametrize("name", ["few_shot", "sam_sp_ablation", "stored_features", "systems"])
def test_the_other_networks_studies_end_with_a_table(name, phantoms, tmp_path, capsys):
    import importlib

    script = importlib.import_module(name)
    results = tmp_path / "RESULTS.md"
    results.write_text(f"<!-- section: {script.SECTION} -->\nnot measured\n<!-- end: {script.SECTION} -->\n")
    words = ["--data", str(phantoms), "--weights", "none", "--output", str(tmp_path / "out"), "--seeds", "0"]
    words += ["--results", str(results), "--epochs", "1", "--image-size", "64"]
    if name == "few_shot":
        words += ["--sets", "kvasir", "--cases", "3", "--set", "draws=4", "batch_size=2"]
    elif name == "systems":
        words += ["--sets", "kvasir", "--set", "batch_size=4"]
    elif name == "stored_features":
        words += ["--set", "batch_size=4"]
    else:
        words += ["--steps", "0", "1", "--prompts", "--distillation", "--set", "batch_size=4"]
    script.main(words)
    text = results.read_text()
    rows = {"few_shot": ("proxy", "decoder", "hsp"), "sam_sp_ablation": ("s0", "s1-box"), "systems": ("hsp", "sam-sp")}
    rows["stored_features"] = ("LoRA", "stored features")
    expected = rows[name]
    assert all(f"| {one} |" in text for one in expected) and str(tmp_path) not in text
    capsys.readouterr()


@pytest.mark.slow
def test_an_ablation_is_trained_scored_reported_and_not_repeated(phantoms, tmp_path, monkeypatch, capsys):
    import common
    import prompt_ablation
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
    scores = common.read_dice(tmp_path / "out" / "none-slim-full-0" / "scores" / "val.csv")
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

    from hspsam_monai.encoders.weights import read_state
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


@pytest.mark.slow
@pytest.mark.data
def test_mobile_sam_finds_a_polyp_in_its_true_box(shared):
    from box_prompt import BoxedMobileSAM, true_boxes
    from common import image_tensor

    from hspsam_monai.data import read_mask
    from hspsam_monai.scores import score_masks

    case = find_cases(shared / "data" / "polyp" / "kvasir", "val")[0]
    truth = read_mask(case["label"], 2)
    sam = BoxedMobileSAM(shared / "weights" / "mobile_sam.pt")
    with torch.inference_mode():
        embedding, inner = sam.embed(image_tensor(case["image"]))
        mask = sam.segment(embedding, inner, true_boxes(truth, True, 16), truth.shape, best=False)
    assert score_masks(mask, truth, 2)["mean_dice"] > 0.8


# int8


def test_int8_replaces_linear_layers_of_a_copy_and_reports_both(phantoms):
    import int8

    from hspsam_monai.networks import HSPSAM

    torch.manual_seed(0)
    network = HSPSAM("mobile_sam", 64, prompts_per_level=1, decoder="slim", prompt_source="image").eval()
    rows = int8.measure(network, 64, 2, find_cases(phantoms, "val")[:2], rounds=1)
    assert len(rows) == 2 and all(row["seconds int8"] > 0 and row["differ"] < 0.5 for row in rows)
    quantised = int8.quantise(network)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = quantised(image), network(image)
    assert not torch.equal(found, expected)
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.98
    assert any(type(m) is torch.nn.Linear for m in network.modules())
    assert not any(type(m) is torch.nn.Linear for m in quantised.encoder.modules())


def test_int8_is_offered_only_where_it_is_faster_and_as_good():
    import argparse

    import int8

    args = argparse.Namespace(split="val", rounds=1)

    def rows(seconds, dice):
        return [
            {"dice float32": 0.9, "dice int8": dice, "differ": 0.01, "seconds float32": 1.3, "seconds int8": seconds}
        ]

    assert "It reaches that." in int8.report(rows(0.99, 0.896), args)
    assert "not offered" in int8.report(rows(1.01, 0.9), args)
    assert "not offered" in int8.report(rows(0.5, 0.894), args)
