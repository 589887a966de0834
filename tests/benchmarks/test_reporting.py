"""Tables, sections of RESULTS.md and intervals."""

import json
import re

import numpy as np
import pytest
import torch

from hspsam_monai.errors import ConfigError, DataError


def test_a_table_says_what_is_not_measured():
    from results import markdown_table

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
    from results import update_results

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
    from results import update_results

    file = tmp_path / "RESULTS.md"
    file.write_text("<!-- section: one -->\nold\n<!-- end: one -->\n")
    with pytest.raises(ConfigError, match=message):
        update_results(name, content, file)
    assert "old" in file.read_text()


def test_a_folder_called_shared_counts_only_with_what_the_benchmarks_need(tmp_path, monkeypatch):
    from common import shared_folder

    monkeypatch.setenv("HSPSAM_SHARED", str(tmp_path))
    assert shared_folder() is None  # anyone's
    (tmp_path / "data" / "polyp").mkdir(parents=True)
    assert shared_folder() == tmp_path
    monkeypatch.setenv("HSPSAM_SHARED", str(tmp_path / "other"))
    assert shared_folder() is None
    (tmp_path / "other" / "weights").mkdir(parents=True)
    (tmp_path / "other" / "weights" / "mobile_sam.pt").touch()
    assert shared_folder() == tmp_path / "other"


def test_a_script_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    import run

    file = tmp_path / "RESULTS.md"
    file.write_text("")
    called = []

    def fails(words):
        called.append(words)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(run, "_missing", lambda *_: [])
    monkeypatch.setattr(run.box_prompt, "main", fails)
    monkeypatch.setattr(run.speed, "main", lambda words: called.append(words) or 0)
    monkeypatch.setattr(run, "shared_folder", lambda: tmp_path)  # its data/polyp is absent: not named to speed.py
    assert run.main(["--results", str(file)]) == 1
    assert len(called) == 2 and "--data" not in called[1]
    capsys.readouterr()


def test_every_script_has_its_section(repo):
    import box_prompt
    import clicks
    import doubtful
    import epochs
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
    for script in (box_prompt, *trained, stored_features, epochs, clicks, int8, doubtful, proxy_speed):
        assert text.count(f"<!-- section: {script.SECTION} -->") == 1
    sections = re.findall(r"<!-- section: (\S+) -->", text)
    assert sections == re.findall(r"<!-- end: (\S+) -->", text)
    assert set(run.unmeasured(repo / "benchmarks" / "RESULTS.md")) <= set(sections)


def test_the_machine_is_described_without_its_name():
    import socket

    from results import machine, machine_line

    found = machine()
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] in machine_line()
    assert socket.gethostname() not in json.dumps(list(found.values())[:-1])


def test_the_machine_says_where_tf32_is_allowed_on_a_gpu(monkeypatch):
    import results

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert results.machine()["tf32"] == {"matrix products": False, "convolutions": True}
    found = {**results.machine(), "device": "A GPU"}
    monkeypatch.setattr(results, "machine", lambda: found)
    assert "A GPU (TF32: matrix products off, convolutions on);" in results.machine_line()


def test_a_constant_difference_has_no_width():
    from scoring import paired_bootstrap

    interval = paired_bootstrap([0.5, 0.7, 0.9], [0.4, 0.6, 0.8], resamples=200)
    assert interval == pytest.approx((0.1, 0.1, 0.1))


def test_the_interval_equals_the_normal_one_on_many_cases():
    from scoring import paired_bootstrap

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
    from scoring import paired_bootstrap

    runs = np.repeat(np.random.default_rng(1).normal(size=40), 20)  # 40 sequences of 20 equal frames
    one = paired_bootstrap(runs, resamples=2000)
    blocks = paired_bootstrap(runs, resamples=2000, block=20)
    ratio = (blocks.high - blocks.low) / (one.high - one.low)
    assert 2.5 < ratio < np.sqrt(20)  # the whole factor needs blocks cut at the sequences
    assert blocks.mean == one.mean


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [0.0])])
def test_unpaired_values_are_refused(a, b):
    from scoring import paired_bootstrap

    with pytest.raises(DataError):
        paired_bootstrap(a, b)


def test_seeds_are_averaged_case_by_case():
    from scoring import mean_over_seeds

    assert mean_over_seeds([{"a": 0.2, "b": 1.0}, {"b": 0.0, "a": 0.4}]) == pytest.approx([0.3, 0.5])
    with pytest.raises(DataError, match="same cases"):
        mean_over_seeds([{"a": 0.2}, {"b": 0.2}])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["epochs", "few_shot", "sam_sp_ablation", "stored_features", "systems"])
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
    elif name == "epochs":
        words += ["--set", "batch_size=2", "--images", "4", "--rounds", "2"]
    else:
        words += ["--steps", "0", "1", "--prompts", "--distillation", "--set", "batch_size=4"]
    script.main(words)
    text = results.read_text()
    rows = {"sam_sp_ablation": ("s0", "s1-box"), "systems": ("hsp", "sam-sp")}
    rows["few_shot"] = ("context", "proxy", "decoder", "hsp")
    rows["stored_features"] = rows["epochs"] = ("LoRA", "stored features")
    expected = rows[name]
    assert all(f"| {one} |" in text for one in expected) and str(tmp_path) not in text
    capsys.readouterr()
