"""The speed benchmark: turns, ratios, refusals, counted work, tables; and a smoke run from end to end."""

import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hspsam_monai import encoders
from hspsam_monai.encoders import sam_vit
from hspsam_monai.encoders.sam_vit import SamViT, Variant
from hspsam_monai.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _scripts(repo):
    """The scripts import each other from their own folder, as when they are started."""
    sys.path.insert(0, str(repo / "benchmarks"))
    yield
    sys.path.remove(str(repo / "benchmarks"))


@pytest.fixture
def small(monkeypatch):
    """Names a small ViT with windowed and global blocks."""
    monkeypatch.setitem(sam_vit.VARIANTS, "small", Variant(48, 4, 3, (1, 3)))
    monkeypatch.setitem(encoders.ENCODERS, "sam_small", partial(SamViT, "small"))
    return "sam_small"


# Turns and ratios


def test_contenders_take_turns_after_their_warm_up():
    from timing import interleave

    calls = []
    runs = {name: partial(calls.append, name) for name in "ABC"}
    times = interleave(runs, CPU, 0.0, least=2, most=5, warm=1)
    assert "".join(calls) == "ABC" * 3  # one to warm up, two measured
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"A": 2, "B": 2, "C": 2}


def test_the_budget_decides_the_rounds_within_their_limits(monkeypatch):
    import timing

    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work(seconds):
        now[0] += seconds

    def rounds(cost, budget, **limits):
        found = timing.interleave({"a": partial(work, cost), "b": partial(work, 2 * cost)}, CPU, budget, **limits)
        assert found["b"].median == pytest.approx(2 * cost)
        return len(found["a"].seconds)

    assert rounds(1.0, 10.0) == 4  # the fourth round begins after 9 s
    assert rounds(30.0, 10.0) == 3  # slow cases get the least
    assert rounds(0.001, 10.0, most=50) == 50
    with pytest.raises(ConfigError, match="least is 4"):
        timing.interleave({}, CPU, 1.0, least=4, most=3)


def test_the_ratio_is_that_of_the_fastest_peer():
    from timing import Timing, race

    peers = {"slow": Timing((9.0, 9.0, 1.0)), "fast": Timing((6.0, 5.0, 7.0))}
    found = race(Timing((4.0, 3.0, 8.0)), peers)
    assert found.peer == "fast"
    assert found.by_median == pytest.approx(6 / 4)
    assert found.by_minimum == pytest.approx(5 / 3)
    assert race(None, peers) is None
    assert race(Timing((1.0,)), {}) is None


def test_a_timing_shows_minimum_median_and_maximum():
    from timing import Timing

    assert Timing((0.2, 0.0123, 0.00456)).cells() == ["4.56", "12.3", "200", "3"]


@pytest.mark.parametrize(
    ("value", "aim", "at_most", "text"),
    [
        (1.4, 1.4, False, "≥ 1.4: reached"),
        (1.39, 1.4, False, "≥ 1.4: missed"),
        (1.39, 1.4, True, "≤ 1.4: reached"),
        (1.41, 1.4, True, "≤ 1.4: missed"),
        (None, 5.0, False, "≥ 5: not measured"),
        (1.0, None, False, "–"),
    ],
)
def test_a_verdict_stands_beside_its_aim(value, aim, at_most, text):
    from timing import verdict

    assert verdict(value, aim, at_most=at_most) == text


def test_progress_corrects_its_guess(monkeypatch):
    import timing

    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    progress = timing.Progress([10.0, 30.0, 20.0])
    assert progress.begin("first") == "1 of 3: first; about 1 min 00 s left"
    now[0] = 20.0  # twice as long as guessed
    assert progress.begin("second") == "2 of 3: second; about 1 min 40 s left"


# Contenders


@pytest.mark.parametrize("name", ["sam_small", "mobile_sam"])
def test_all_contenders_compute_the_same_from_the_same_weights(small, name):
    from peers import OURS, PRECISIONS, build, random_encoder, refusal

    encoder = random_encoder(name, 64)
    contenders, absent = build(encoder, CPU)
    names = [contender.name for contender in contenders]
    peers = ["kornia"] if name == "mobile_sam" else ["segment_anything", "transformers, SDPA"]
    assert (names, absent) == ([*peers, OURS], {})
    image = torch.rand(2, 3, 64, 64)
    expected = contenders[0].encode(contenders[0].input(image, encoder), "float32")
    assert expected.shape == (2, 256, 4, 4)
    for contender in contenders:
        for precision in PRECISIONS:
            output = contender.encode(contender.input(image, encoder), precision)
            assert refusal(output, expected, precision) is None, (contender.name, precision)
    if name == "sam_small":
        assert type(contenders[1].module.layers[0].attn).__name__ == "SamVisionSdpaAttention"
    # Weights that usually start at zero are not, or wrong ones would pass unseen.
    assert all(parameter.abs().max() > 0 for parameter in encoder.parameters())
    again = random_encoder(name, 64).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in encoder.state_dict().items())


def test_an_output_that_differs_is_refused():
    from peers import refusal

    expected = torch.randn(1, 256, 2, 2)
    assert refusal(expected * (1 + 5e-6), expected, "float32") is None
    assert "2.0e-05 relative" in refusal(expected * (1 + 2e-5), expected, "float32")
    assert refusal(expected.bfloat16(), expected, "bfloat16") is None
    assert "cosine" in refusal(expected + 0.1 * torch.randn_like(expected), expected, "bfloat16")
    assert "not finite" in refusal(expected * torch.nan, expected, "bfloat16")
    assert "shape" in refusal(expected[:, :8], expected, "float32")


def _settings(**options):
    from parts import Settings

    return Settings(**{"sizes": (64,), "batches": (1,), "seconds": 0.0, "least": 2, "most": 2, **options})


def test_a_row_whose_output_differs_is_not_timed(small, monkeypatch):
    import speed_encoder

    speed_encoder.models.cache_clear()
    with torch.no_grad():
        encoder, contenders, _ = speed_encoder.models(small, 64, CPU)
        contenders[1].module.neck.layer_norm2.weight.mul_(1.001)  # transformers
    settings = _settings(encoders=(small,), precisions=("float32",))
    rows = {row["implementation"]: row for row in speed_encoder.measure(small, 64, 1, settings)}
    assert rows["transformers, SDPA"]["timing"] is None
    assert rows["transformers, SDPA"]["note"].startswith("outputs differ")
    assert len(rows["hspsam"]["timing"].seconds) == len(rows["segment_anything"]["timing"].seconds) == 2
    assert 0 < rows["hspsam"]["share"]
    text = speed_encoder.report(list(rows.values()), settings)
    assert "| sam_small | 64 | 1 | float32 | eager | segment_anything |" in text
    assert "not measured | not measured | outputs differ" in text

    with torch.no_grad():
        encoder.neck[3].weight.mul_(1.001)  # ours: nothing of the row may be timed
    monkeypatch.setattr(speed_encoder, "interleave", None)
    rows = speed_encoder.measure(small, 64, 1, settings)
    assert all(row["timing"] is None for row in rows)
    assert speed_encoder.ratios(rows)[0][6].startswith("refused: outputs differ")
    speed_encoder.models.cache_clear()


def test_the_ratio_stands_beside_its_aim_and_compiled_rows_apart():
    from speed_encoder import ratios
    from timing import Timing

    base = {"device": "cpu", "encoder": "sam_vit_b", "precision": "float32", "size": 256, "batch": 1, "note": ""}

    def row(name, seconds, compiled=False, share=0.5):
        return {
            **base, "implementation": name, "compiled": compiled, "timing": Timing((seconds,)), "share": share,
        }  # fmt: skip

    rows = [row("a", 3.0), row("b", 2.0), row("hspsam", 1.25)]
    rows += [row("a, compiled", 1.5, True), row("hspsam, compiled", 1.25, True)]
    eager, compiled = ratios(rows)
    assert eager[4:9] == ["eager", "b", "1.60 ×", "1.60 ×", "≥ 1.4: reached"]
    assert compiled[4:9] == ["compiled", "a, compiled", "1.20 ×", "1.20 ×", "≥ 1.4: missed"]


# Work


def test_counted_work_is_that_of_the_published_encoders(small):
    """Padded work equals what torch counts in the peers, whose attention is made of plain products."""
    from peers import build, random_encoder, variant_of
    from work import tiny_flops, vit_flops

    for name, size in ((small, 256), (small, 224), ("mobile_sam", 128)):
        encoder = random_encoder(name, size)
        published = build(encoder, CPU)[0][0]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            published.module(torch.rand(1, 3, size, size))
        variant = variant_of(encoder)
        count = partial(vit_flops, variant) if variant else tiny_flops
        assert count(size, padded=True) == counter.get_total_flops()
        if (name, size) == (small, 224):  # exactly one window: nothing is padded
            assert count(size) == count(size, padded=True)
        else:
            assert count(size) < count(size, padded=True)


def test_real_work_saves_what_padding_costs():
    """Arithmetic on ViT-B at 256 pixels: 16 x 16 tokens in 2 x 2 windows of 14."""
    from work import vit_flops

    variant = sam_vit.VARIANTS["b"]
    saved = vit_flops(variant, 256, padded=True) - vit_flops(variant, 256)
    tokens = 28**2 - 16**2
    projections = 4 * tokens * 768**2
    shapes = {196: 1, 28: 2, 4: 1}  # real tokens of a window -> how many; partial ones see one key of padding
    pairs = 4 * 196**2 - sum(many * real * (real + (real < 196)) for real, many in shapes.items())
    assert saved == 2 * 8 * (projections + 2 * pairs * 768 + 28 * tokens * 768)


def test_the_roofline_counts_what_it_multiplies():
    from work import roofline, tiny_products, vit_products

    assert vit_products(Variant(48, 4, 3, (1,)), 64, 2)[2] == (32, 48, 192)
    assert tiny_products(64, 1)[0] == (64, 128, 384)
    run, flops = roofline([(8, 4, 2), (3, 5, 7)], CPU, torch.float32)
    with FlopCounterMode(display=False) as counter:
        assert run().shape == (3, 7)
    assert flops == counter.get_total_flops() == 2 * (8 * 4 * 2 + 3 * 5 * 7)


# Memory, networks, training, guard


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
    assert latency_report([], _settings()).startswith("not measured")


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
    assert report([], _settings()).startswith("not measured")


# The program


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
    capsys.readouterr()


def test_settings_follow_the_device_and_a_part_of_the_sizes_is_not_published(monkeypatch):
    import speed
    from common import RESULTS

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
    settings, partial_of = parsed("--quick")
    assert settings.sizes == (64,) and all(partial_of.values())
    monkeypatch.setattr(speed, "device", lambda: torch.device("cuda", 0))
    settings, _ = parsed()
    assert settings.batches == (1, 4, 8, 32) and settings.compile
    text = RESULTS.read_text()
    for part in speed.PARTS.values():
        assert text.count(f"<!-- section: {part.section} -->") == 1


@pytest.mark.slow
def test_a_smoke_run_fills_every_section_of_another_file(tmp_path, small, monkeypatch, capsys):
    import speed
    from common import RESULTS

    from hspsam_monai.data import write_phantoms

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
