"""Benchmarks that measure without training: boxes, clicks, doubtful parts, references, int8, epochs, Proxy Prompt."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hspsam_monai.data import find_cases, mask_values, read_mask
from hspsam_monai.errors import ConfigError
from hspsam_monai.transforms import fit_image


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


def test_mirror_images_are_measured_beside_one_pass(phantoms, tmp_path, capsys):
    from mirror_scales import MIRRORS, ONE, SCALED, main

    words = ["--data", str(phantoms), "--measure", "shipped:kvasir:all", "--every", "4", "--scales", "1"]
    main([*words, "--output", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| shipped, 320 px |")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [row[3] for row in cells] == [ONE, MIRRORS, SCALED]
    assert cells[1][4] == cells[2][4] and cells[2][6].startswith("+0.0000 [")  # at scale 1 both are the same
    assert cells[0][4] != cells[1][4]


def test_a_simulated_person_clicks_the_depth_of_what_is_wrong():
    from clicks import next_click

    truth = np.zeros((40, 60), bool)
    truth[10:21, 20:31] = True
    assert next_click(np.zeros_like(truth), truth) == (1, 25.0, 15.0, 1)
    assert next_click(truth, truth) is None
    found = truth.copy()
    found[0:19, 40:60] = True  # 19 x 20 too much, deeper than nothing missed
    object_, x, y, label = next_click(found, truth)
    assert (object_, label) == (1, 0) and 8 <= y <= 10 and 48 <= x <= 51  # its border is the picture's


def test_what_clicks_cannot_measure_is_refused_first(phantoms, tmp_path, monkeypatch):
    import clicks

    monkeypatch.setattr(clicks, "weights_file", lambda given: given)
    words = ["--data", str(phantoms), "--split", "all", "--dry", "--output", str(tmp_path)]
    for further, message in (
        (["--clicks", "0"], "1 or more"),
        (["--models", "a/run", "b/run"], "different names"),
        (["--models", "shipped"], "no SAM-SP"),
    ):
        with pytest.raises(ConfigError, match=message):
            clicks.main([*words, "--weights", "somewhere", *further])


def test_clicks_are_accumulated_until_the_mask_is_right(monkeypatch):
    import clicks

    given = []

    def method(image):
        def segment(marks):
            given.append(list(marks))
            mask = np.zeros(tuple(image.shape[-2:]), bool)
            return truth if any(label for *_, label in marks) else mask

        return segment

    truth = np.zeros((8, 8), bool)
    truth[2:6, 2:6] = True
    monkeypatch.setattr(clicks, "image_tensor", lambda path: torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(clicks, "read_mask", lambda path, classes: truth.astype(np.uint8))
    found = clicks.measure({"one": method}, [{"image": "a", "label": "b"}], 3)
    assert found["one"].tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert len(given) == 2 and given[0] == [] and len(given[1]) == 1  # a right mask is not segmented again


def test_the_clock_of_an_epoch_leaves_out_what_follows_its_last_step(monkeypatch):
    import epochs
    from ignite.engine import Engine, Events

    now = [0.0]
    monkeypatch.setattr(epochs.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    trainer = Engine(lambda engine, batch: spend(1))
    trainer.add_event_handler(Events.STARTED, lambda: spend(7))
    trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: spend(0.5))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: spend(100))
    clock = epochs.EpochClock()
    clock.attach(trainer)
    trainer.run([0, 1, 2], max_epochs=2)
    assert clock.epochs == [4.5, 4.5] and clock.before == 7


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


def test_the_curves_references_need_no_training(phantoms):
    from scoring import image_tensor
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


def test_the_curves_tables_belong_to_one_model_and_its_cases(phantoms, tmp_path, monkeypatch, capsys):
    import support_curve
    from scoring import score_cases

    scored = []

    def network(model):
        return score_cases, 64, [model / "model.pt"]

    def score(network, size, classes, cases, table):
        scored.append(table)
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("case,mean_dice\n" + "".join(f"{case['case']},0.5\n" for case in cases))

    monkeypatch.setattr(support_curve, "_network", network)
    monkeypatch.setattr(support_curve, "_candidates", lambda *_: dict.fromkeys(support_curve.METHODS))
    monkeypatch.setattr(support_curve, "score_cases", score)
    words = ["--data", str(phantoms), "--unseen", "kvasir", "--supports", "1", "--draws", "0", "--dry"]

    def tables(model):
        scored.clear()
        support_curve.main([*words, "--output", str(tmp_path / "out"), "--model", str(tmp_path / model)])
        return list(scored)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_text(name)
    first = tables("a")
    assert len(first) == 3 and tables("a") == []
    assert len(tables("b")) == 3 and tables("b") == tables("a") == []
    first[0].write_text("case,mean_dice\nanother,0.5\n")
    assert tables("a") == [first[0]]
    (tmp_path / "a" / "model.pt").write_text("trained again")
    assert len(tables("a")) == 3
    capsys.readouterr()


def test_boxed_cases_belong_to_their_code_data_and_weights(phantoms, tmp_path, monkeypatch):
    import box_prompt

    weights = tmp_path / "mobile_sam.pt"
    weights.write_text("one")
    cases = find_cases(phantoms / "kvasir")

    def kept():
        return box_prompt._kept(tmp_path, "model", weights, cases, 16)

    names = [kept()]
    assert kept() == names[0]
    weights.write_text("two")
    names.append(kept())
    label = next(path for path in (phantoms / "kvasir" / "masks").iterdir())
    label.write_bytes(label.read_bytes() + b" ")
    names.append(kept())
    monkeypatch.setattr(box_prompt, "code_digest", lambda _: "another")
    names.append(kept())
    assert len(set(names)) == 4


def test_proxy_speed_sets_every_context_and_its_recurrence_is_the_scans(capsys):
    import proxy_speed

    proxy_speed.main("--dry --encoders mobile_sam --sizes 64 --supports 1 3 --tokens 64 128 --seconds 0.01".split())
    out = capsys.readouterr().out
    rows = [line.split("|")[3].strip() for line in out.splitlines() if line.startswith("| mobile_sam | 64 |")]
    assert rows == ["K = 1", "K = 3"]
    assert "scan, 128 tokens" in out and "plain recurrence, 64 tokens" in out
    assert float(out.split("64 tokens: ")[-1].split()[0].rstrip(".")) < 1e-6


@pytest.mark.slow
@pytest.mark.data
def test_mobile_sam_finds_a_polyp_in_its_true_box(shared):
    from box_prompt import BoxedMobileSAM, true_boxes
    from scoring import image_tensor

    from hspsam_monai.data import read_mask
    from hspsam_monai.scores import score_masks

    case = find_cases(shared / "data" / "polyp" / "kvasir", "val")[0]
    truth = read_mask(case["label"], 2)
    sam = BoxedMobileSAM(shared / "weights" / "mobile_sam.pt")
    with torch.inference_mode():
        embedding, inner = sam.embed(image_tensor(case["image"]))
        mask = sam.segment(embedding, inner, true_boxes(truth, True, 16), truth.shape, best=False)
    assert score_masks(mask, truth, 2)["mean_dice"] > 0.8


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
