"""The speed benchmark of the encoders: refusals, counted work, ratios."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hspsam_monai.encoders import sam_vit
from hspsam_monai.encoders.sam_vit import Variant
from hspsam_monai.errors import ConfigError

CPU = torch.device("cpu")


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


def test_aims_of_a_gpu_are_those_of_their_batch():
    from speed_encoder import ratios
    from timing import Timing

    def lines(size, batch):
        base = {"device": "cuda", "encoder": "sam_vit_b", "precision": "bfloat16", "size": size, "batch": batch}
        rows = [
            {**base, "implementation": name, "compiled": False, "note": "", "timing": Timing((1.0,)), "share": 0.45}
            for name in ("segment_anything", "hspsam")
        ]
        return ratios(rows)[0][8:]

    assert lines(512, 8) == ["≥ 1.3: missed", "0.45"]
    assert lines(512, 1) == ["–", "0.45"]
    assert lines(1024, 8) == ["–", "0.45 (≥ 0.5: missed)"]
    assert lines(1024, 32) == ["–", "0.45"]


def test_a_peer_that_cannot_be_built_costs_its_row_and_the_published_one_its_case(small, monkeypatch):
    import peers
    import speed_encoder

    def broken(_):
        raise TypeError("another version")

    def missing():
        raise ModuleNotFoundError("", name=peers.FAST)

    encoder = peers.random_encoder(small, 64)
    monkeypatch.setattr(peers, "_transformers", broken)
    contenders, absent = peers.build(encoder, CPU)
    assert [contender.name for contender in contenders] == ["segment_anything", peers.OURS]
    assert absent == {"transformers, SDPA": "failed: TypeError (another version)"}
    assert peers.reference(contenders, absent).name == "segment_anything"

    monkeypatch.setattr(peers, "peer_builders", lambda *_: dict.fromkeys(("segment_anything", peers.FAST), missing))
    contenders, absent = peers.build(encoder, CPU)
    source = "github.com/pytorch-labs/segment-anything-fast"
    assert absent[peers.FAST] == f"segment_anything_fast is not installed (it is at {source})"
    assert peers.packages(torch.device("cuda")) == ["transformers"]
    monkeypatch.setattr(speed_encoder, "models", lambda *_: (encoder, contenders, absent))
    with pytest.raises(ConfigError, match="no published output to compare with: segment_anything_fast is not"):
        speed_encoder.measure(small, 64, 1, _settings())


def test_what_a_peer_writes_stays_out_of_the_working_directory(tmp_path, monkeypatch):
    from pathlib import Path

    from peers import Contender

    monkeypatch.chdir(tmp_path)
    found = []

    def tunes(x):
        found.append(Path("flash_4_configs.p").is_file())
        Path("flash_4_configs.p").touch()
        return x

    fast = Contender("segment_anything_fast", tunes, cast=True, writes=True)
    for _ in range(2):
        fast.encode(torch.ones(1), "bfloat16")
    assert found == [False, True] and not list(tmp_path.iterdir()) and Path.cwd() == tmp_path


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
