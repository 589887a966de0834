"""The speed benchmark: parts, tables, settings; and a smoke run from end to end."""

import os

import numpy as np
import pytest
import torch

from hspsam_monai.data import write_phantoms
from hspsam_monai.errors import ConfigError

CPU = torch.device("cpu")


def _settings(**options):
    from parts import Settings

    return Settings(**{"sizes": (64,), "batches": (1,), "seconds": 0.0, "least": 2, "most": 2, **options})


def test_a_peak_is_what_a_run_holds_at_once():
    from fresh import peak_bytes

    def run():
        return float(np.ones(2**23)[::512].sum())  # 64 MiB

    found = peak_bytes(run, "cpu")
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert 60 <= found / 2**20 < 90  # the system counts pages in lots
    else:
        assert found is None


def test_memory_is_ours_over_each_peer():
    from speed_memory import report

    base = {"kind": "encoder", "name": "mobile_sam", "size": 64, "batch": 1, "precision": "float32", "note": ""}
    rows = [
        {**base, "implementation": "kornia", "bytes": 400 * 2**20},
        {**base, "implementation": "hspsam", "bytes": 100 * 2**20},
        {**base, "implementation": "transformers, SDPA", "bytes": None, "note": "out of memory"},
    ]
    lines = report(rows, _settings()).splitlines()
    assert lines[2] == "| pass | mobile_sam | kornia | 64 | 1 | float32 | 400 | 0.25 | – |"
    assert lines[3].endswith("| 100 | – | – |")
    assert lines[4].endswith("| not measured | – | out of memory |")


def test_memory_stands_beside_its_aim_on_a_gpu(monkeypatch):
    import parts
    from speed_memory import report

    base = {"kind": "encoder", "name": "sam_vit_b", "size": 1024, "batch": 8, "precision": "bfloat16", "note": ""}
    rows = [
        {**base, "implementation": name, "bytes": size * 2**20}
        for name, size in (("segment_anything", 400), ("transformers, SDPA", 400), ("hspsam", 100))
    ]
    single = [{**row, "batch": 1} for row in rows]
    monkeypatch.setattr(parts, "device", lambda: torch.device("cuda", 0))
    lines = report(rows + single, _settings()).splitlines()[2:]
    assert "| 0.25 (≤ 0.25: reached) |" in lines[0]
    assert sum("≤" in line for line in lines if line.startswith("|")) == 1
    rows[0] |= {"bytes": None, "note": "out of memory"}
    assert "| not measured | – (≤ 0.25: not measured) | out of memory |" in report(rows, _settings())


def test_the_overhead_compares_within_rounds():
    from speed_network import overhead_ratio, overhead_report
    from timing import Timing

    times = {
        "encoder": Timing((1.0, 2.0, 4.0)), "prompted": Timing((1.0, 2.0, 4.0)), "whole": Timing((1.1, 2.2, 8.0)),
    }  # fmt: skip
    assert overhead_ratio(times) == pytest.approx(1.1)
    rows = [{"name": "n", "size": size, "precision": "float32", "times": times} for size in (256, 512)]
    text = overhead_report(rows, _settings())
    assert "| n | 256 | float32 | 2000 | 2000 | 2200 | 1.000 | 1.100 | – | 3 |" in text
    assert "| 1.100 | ≤ 1.1: reached | 3 |" in text


def test_latency_shows_percentiles_and_the_cold_start_its_aim():
    from speed_network import latency_report
    from timing import Timing

    rows = [
        {"what": "warm, one pass, float32", "timing": Timing(tuple(np.arange(1, 102) / 1e3)), "size": 64},
        {
            "what": "cold start", "timing": Timing((13.0, 11.0, 10.0)),
            "parts": {"import": 8.0, "load": 1.0, "mask": 2.0},
        },
    ]  # fmt: skip
    text = latency_report(rows, _settings())
    assert "| warm, one pass, float32 | 1.00 | 51.0 | 100 | 101 | 101 | – |" in text
    assert "| cold start | 10000 | 11000 | – | 13000 | 3 | ≤ 12 s: reached |" in text


def test_warm_rows_compiled_on_a_cpu_are_no_graphs_and_one_that_fails_costs_no_other(monkeypatch):
    import speed_network
    from timing import Timing

    def interleave(runs, *_, failures, **__):
        failures["one pass, float32, compiled"] = "failed: RuntimeError"
        return {name: Timing((1.0,)) for name in runs if name not in failures}

    monkeypatch.setattr(speed_network, "shipped", lambda _: "model.pt")
    monkeypatch.setattr(speed_network, "load_network", lambda *_: (None, 64, 2))
    for name in ("mirror_inferer", "to_mask"):
        monkeypatch.setattr(speed_network, name, lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    monkeypatch.setattr(speed_network, "interleave", interleave)
    rows = {row["what"]: row["timing"] is not None for row in speed_network.warm(_settings(compile=True))}
    one, four = "warm, one pass, float32", "warm, four mirror images, float32"
    assert rows == {one: True, four: True, f"{one}, compiled": False}


def test_every_trainee_learns_what_it_says(monkeypatch):
    import speed_training

    image, label = speed_training.images(32, 2, CPU)
    assert label.shape == (2, 1, 32, 32) and label.unique().tolist() == [0, 1]
    trained = {}
    for name, builder in speed_training.TRAINED.items():
        trainee = builder(image)
        optimizer = trainee.optimizer()
        optimizer.param_groups[0]["lr"] = 1e-3
        before = [p.detach().clone() for p in trainee.network.parameters()]
        losses = [speed_training.step(trainee, optimizer, label, "float32").item() for _ in range(2)]
        assert np.isfinite(losses).all()
        moved = sum(not torch.equal(a, b) for a, b in zip(before, trainee.network.parameters(), strict=True))
        trained[name] = moved / len(before)
    full, lora, frozen = (trained[f"HSP-SAM mobile_sam, {how}"] for how in ("full", "LoRA", "frozen"))
    assert full > lora > frozen > 0


def test_training_rows_stand_beside_lora_and_the_cache_beside_its_aim():
    from speed_training import LORA, report
    from timing import Timing

    def row(name, seconds, cached=False):
        return {
            "name": name, "precision": "float32", "dtype": "float32", "timing": Timing((seconds,)), "cached": cached,
        }  # fmt: skip

    text = report([row(LORA, 3.0), row("full", 4.0)], _settings())
    assert "| full | float32 | 0.25 | 4000 | 4000 | 4000 | 1 | 0.75 × | – |" in text
    assert "≥ 5: not measured" in text
    text = report([row(LORA, 3.0), row("cache", 0.5, cached=True)], _settings())
    assert "| 6.00 × | ≥ 5: reached |" in text
    assert "not measured" not in text


def test_a_trainee_that_fails_costs_no_other(monkeypatch):
    import speed_training

    def broken(image):
        raise ValueError("not built")

    trained = {name: speed_training.TRAINED[name] for name in (speed_training.LORA, "MONAI UNet")}
    monkeypatch.setattr(speed_training, "TRAINED", {"broken": broken, **trained})
    settings = _settings(train_size=32, train_batch=1, least=1, most=1)
    rows = speed_training.measure("float32", settings)
    assert [row["timing"] is None for row in rows] == [True, False, False]
    text = speed_training.report(rows, settings)
    assert "| broken | float32 | not measured |" in text
    assert "broken, float32: failed: ValueError (not built)." in text


def test_the_guard_counts_pixels_and_dice():
    from speed_guard import Change, change, report

    truth = np.zeros((10, 10), np.uint8)
    truth[:5] = 1
    exact, fast = truth.copy(), truth.copy()
    fast[5, :2] = 1  # 2 of 100 pixels, Dice 2 * 50 / 102
    found = change(fast, exact, truth, 2, 0.25)
    assert found.pixels == pytest.approx(2.0)
    assert found.dice == pytest.approx(100 / 102 - 1)
    assert change(exact, exact, truth, 2) == Change(0.0, 0.0)
    rows = [
        {"name": "bfloat16 autocast", "changes": [Change(0.05, 0.0), Change(0.1, -0.0016, 0.5)], "note": ""},
        {"name": "worse", "changes": [Change(0.3, 0.004)], "note": ""},
        {"name": "compiled", "changes": [], "note": "failed: RuntimeError"},
    ]
    lines = report(rows, _settings()).splitlines()
    assert "| 2 | 0.0750 % | 0.100 % | ≤ 0.1: reached | -0.00080 | 0.0016 | ≤ 0.001: reached | 0.500 |" in lines[2]
    assert lines[3].count("missed") == 2
    assert lines[4].endswith("| failed: RuntimeError |")


def _results(tmp_path, *sections):
    file = tmp_path / "RESULTS.md"
    file.write_text("".join(f"<!-- section: {s} -->\nnot measured\n<!-- end: {s} -->\n" for s in sections))
    return file


def test_a_part_is_published_when_it_is_done_and_a_failed_case_costs_no_other(tmp_path, capsys):
    import speed
    from parts import Case, Part

    file = _results(tmp_path, "one", "two")
    seen = []

    def fails():
        raise ConfigError("no such thing")

    def second():
        seen.append(file.read_text())
        return [{"value": 2}]

    def report(rows, _):
        return f"rows {[row['value'] for row in rows]}"

    one = Part("one", lambda _: [Case("a", 1.0, lambda: [{"value": 1}]), Case("b", 1.0, fails)], report)
    two = Part("two", lambda _: [Case("c", 1.0, second)], report)
    args = speed.argument_parser("speed", "x", data_required=False).parse_args(["--results", str(file)])
    failed = speed.run([("one", one), ("two", two)], _settings(), args, {"one": False, "two": False})
    assert failed
    assert "rows [1]\n\nFailed: b: failed: ConfigError (no such thing)" in seen[0]
    assert "rows [2]" in file.read_text()
    empty = Part("two", lambda _: [Case("d", 1.0, fails)], report)
    assert speed.run([("two", empty)], _settings(), args, {"two": False})
    assert "rows [2]" in file.read_text()  # what stood there stays
    nothing = Part("two", lambda _: [], report)  # no data, no model: no failure, but no section either
    assert not speed.run([("two", nothing)], _settings(), args, {"two": False})
    for figure in ({"timing": None}, {"bytes": None}, {"changes": []}):
        refused = Part("two", lambda _, row=figure: [Case("e", 1.0, lambda: [{**row, "note": "refused"}])], report)
        assert speed.run([("two", refused)], _settings(), args, {"two": False})
    assert "rows [2]" in file.read_text()
    capsys.readouterr()


def test_a_part_that_cannot_be_planned_or_reported_costs_no_other(tmp_path, capsys):
    import speed
    from parts import Case, Part

    file = _results(tmp_path, "one", "two", "three")
    case = [Case("a", 1.0, lambda: [{"value": 1}])]
    parts = [
        ("one", Part("one", lambda _: 1 / 0, lambda *_: "")),
        ("two", Part("two", lambda _: case, lambda *_: 1 / 0)),
        ("three", Part("three", lambda _: case, lambda *_: "measured")),
    ]
    args = speed.argument_parser("speed", "x", data_required=False).parse_args(["--results", str(file)])
    assert speed.run(parts, _settings(), args, dict.fromkeys(("one", "two", "three"), False))
    assert file.read_text().count("not measured") == 2 and "three -->\nmeasured" in file.read_text()

    args.results = _results(tmp_path, "one")
    with pytest.raises(ConfigError, match="section: three"):  # before anything is measured
        speed.run([("three", Part("three", lambda _: 1 / 0, None))], _settings(), args, {"three": False})
    args.results = tmp_path / "none.md"
    with pytest.raises(ConfigError, match="no such file"):
        speed.run([("three", Part("three", lambda _: 1 / 0, None))], _settings(), args, {"three": False})
    capsys.readouterr()


def test_what_is_named_and_absent_is_refused(tmp_path, monkeypatch):
    import speed

    monkeypatch.setattr(speed, "run", None)
    for option in ("--data", "--model", "--network"):
        with pytest.raises(ConfigError, match=f"{option} .*nowhere.*no such"):
            speed.main([option, str(tmp_path / "nowhere")])


def test_settings_follow_the_device_and_a_part_of_the_sizes_is_not_published(monkeypatch):
    import speed
    from results import RESULTS

    def parsed(*words):
        found = {}

        def run(parts, settings, args, partial):
            found.update(s=settings, p=partial)
            return False

        monkeypatch.setattr(speed, "run", run)
        assert speed.main([*words]) == 0
        return found["s"], found["p"]

    settings, partial_of = parsed()
    assert (settings.sizes, settings.batches, settings.compile) == ((256, 512, 1024), (1, 4), False)
    assert not any(partial_of.values())
    settings, partial_of = parsed("--sizes", "256", "--guard-images", "3", "--parts", "encoder", "latency", "guard")
    assert settings.sizes == (256,)
    assert partial_of == {"encoder": True, "latency": False, "guard": True}
    every = ("encoder", "memory", "overhead", "latency", "training", "guard")
    narrowed = {
        ("--compile", "no"): set(),  # as it is on a CPU anyway
        ("--model", str(RESULTS)): {"overhead", "latency", "guard"},
        ("--network", str(RESULTS)): {"overhead", "latency", "guard"},
        ("--split", "train"): {"guard"},
    }
    for words, expected in narrowed.items():
        assert parsed(*words)[1] == {name: name in expected for name in every}, words
    settings, partial_of = parsed("--quick")
    assert settings.sizes == (64,) and all(partial_of.values())
    monkeypatch.setattr(speed, "device", lambda: torch.device("cuda", 0))
    settings, _ = parsed()
    assert settings.batches == (1, 4, 8, 32) and settings.compile
    assert settings.compile_batches == (1, 8, 32)
    without = {"encoder", "latency", "guard"}
    assert parsed("--compile", "no")[1] == {name: name in without for name in every}
    text = RESULTS.read_text()
    for part in speed.PARTS.values():
        assert text.count(f"<!-- section: {part.section} -->") == 1


def test_float32_is_not_tf32_here_and_in_fresh_processes(monkeypatch):
    import fresh
    import speed

    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    seen = []

    def see(*_, **__):
        seen.append([flag.allow_tf32 for flag in flags])
        raise RuntimeError("seen")

    monkeypatch.setattr(speed, "run", see)
    monkeypatch.setattr(fresh, "_encoder", see)
    monkeypatch.setattr("monai.bundle.ConfigParser.read_config", see)
    monkeypatch.setattr("hspsam_monai.cli.prepare", lambda: None)  # it changes this process for good
    starts = [
        lambda: speed.main(["--parts", "training"]),
        lambda: fresh.memory("encoder", "mobile_sam", 64, 1, "float32"),
        lambda: fresh.cold("model.pt", []),
    ]
    try:
        for start in starts:
            for flag in flags:
                flag.allow_tf32 = True
            with pytest.raises(RuntimeError, match="seen"):
                start()
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
    assert seen == [[False, False]] * 3


@pytest.mark.slow
def test_a_smoke_run_fills_every_section_of_another_file(tmp_path, small, monkeypatch, capsys):
    import speed
    from results import RESULTS

    before = RESULTS.read_bytes()
    file = _results(tmp_path, *[part.section for part in speed.PARTS.values()])
    write_phantoms(tmp_path / "data", 4, seed=0, size=(72, 96), val_fraction=0.5)
    words = ["--quick", "--data", str(tmp_path / "data"), "--results", str(file)]
    assert speed.main(words) == 0
    text = file.read_text()
    assert "Failed" not in text and "failed" not in text
    for line in ("| sam_vit_b | 64 | 1 | float32 | eager |", "| pass | mobile_sam | kornia | 64 |", "| shipped model |",
                 "| cold start |", "| hspsam segment, one picture |", "| MONAI UNet |",
                 "| bfloat16 autocast | 2 |"):  # fmt: skip
        assert line in text, line
    assert str(tmp_path) not in text
    words = ["--quick", "--parts", "training", "--results", str(RESULTS)]
    assert speed.main(words) == 0
    assert RESULTS.read_bytes() == before
    capsys.readouterr()
