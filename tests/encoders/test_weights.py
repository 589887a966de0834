"""Weights into encoders and networks: matched key by key, every key accounted for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hspsam_monai.encoders import sam_vit
from hspsam_monai.encoders.sam_vit import SamViT, Variant
from hspsam_monai.encoders.state_files import write_state
from hspsam_monai.encoders.weights import load_encoder, load_network
from hspsam_monai.errors import WeightsError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(sam_vit.VARIANTS, "small", Variant(48, 5, 3, (1, 2, 3, 4)))

    def build(image_size, seed=0, **options):
        torch.manual_seed(seed)
        encoder = SamViT("small", image_size, **options)
        for parameter in encoder.parameters():
            nn.init.normal_(parameter)
        return encoder

    return build


def official_file(path, encoder):
    """A file as segment_anything publishes it: the whole SAM, flat."""
    state = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({**state, "prompt_encoder.x": torch.zeros(1), "mask_decoder.y": torch.zeros(1)}, path)
    return path


def test_an_official_file_with_a_wrong_hash_is_not_loaded(tmp_path, monkeypatch, small):
    official_file(tmp_path / "sam_vit_b_01ec64.pth", small(64))
    monkeypatch.setenv("HSPSAM_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="expected ec2df627"):
        load_encoder(small(64), "sam_vit_b")


@torch.no_grad()
def test_official_checkpoint_of_1024_loads_at_512(tmp_path, small):
    big, encoder = small(1024), small(512, seed=1)
    report = load_encoder(encoder, official_file(tmp_path / "sam.pth", big))
    assert report.missing == report.unexpected == ()
    assert report.ignored == ("prompt_encoder.x", "mask_decoder.y")
    assert report.resized["pos_embed"] == ((1, 64, 64, 48), (1, 32, 32, 48))
    assert len(report.resized) == 1 + 2 * 4
    assert len(report.loaded) == len(encoder.state_dict())
    assert report.summary() == f"{len(report.loaded)} loaded, 9 resized, 2 ignored"
    by_hand = F.interpolate(big.pos_embed.permute(0, 3, 1, 2), (32, 32), mode="bicubic", align_corners=False)
    assert torch.equal(encoder.pos_embed, by_hand.permute(0, 2, 3, 1))
    by_hand = F.interpolate(big.blocks[4].attn.rel_pos_w.t()[None], 63, mode="linear")[0].t()
    assert torch.equal(encoder.blocks[4].attn.rel_pos_w, by_hand)
    assert torch.equal(encoder.blocks[0].attn.rel_pos_w, big.blocks[0].attn.rel_pos_w)


def test_missing_lora_is_accepted_and_reported(tmp_path, small):
    path = official_file(tmp_path / "sam.pth", small(64))
    report = load_encoder(small(64, lora_rank=2), path)
    assert len(report.missing) == 5 * 4 and all("lora_" in key for key in report.missing)
    # The other way round the trained updates would be lost without a word: refused.
    path = official_file(tmp_path / "tuned.pth", small(64, lora_rank=2))
    with pytest.raises(WeightsError, match=r"has 20 keys \(.*lora_.* and 12 more\)"):
        load_encoder(small(64), path)


def test_missing_keys_are_listed(tmp_path, small):
    state = small(64).state_dict()
    kept = {key: value for key, value in state.items() if ".mlp." not in key}
    write_state(tmp_path / "x.pth", kept)
    with pytest.raises(WeightsError, match=r"lacks 20 keys \(blocks.0.mlp.lin1.weight, .* and 12 more\)"):
        load_encoder(small(64), tmp_path / "x.pth")
    report = load_encoder(small(64), tmp_path / "x.pth", strict=False)
    assert len(report.missing) == 20


def test_wrong_shapes_are_named_and_nothing_is_loaded(tmp_path):
    write_state(tmp_path / "x.pth", {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)})
    layer = nn.Linear(4, 5)
    before = layer.weight.clone()
    with pytest.raises(WeightsError, match=r"weight has shape \(3, 4\) in the file and \(5, 4\) in the network"):
        load_network(layer, tmp_path / "x.pth")
    assert torch.equal(layer.weight, before)


def test_a_foreign_file_is_refused_even_when_not_strict(tmp_path):
    write_state(tmp_path / "x.pth", {"other": torch.zeros(3)})
    with pytest.raises(WeightsError, match="no key in common"):
        load_network(nn.Linear(2, 2), tmp_path / "x.pth", strict=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_network_round_trip(tmp_path, suffix):
    source, target = nn.Linear(4, 5), nn.Linear(4, 5)
    half = {key: value.half() for key, value in source.state_dict().items()}
    report = load_network(target, write_state(tmp_path / f"x{suffix}", half))
    assert report.summary() == "2 loaded"
    assert target.weight.dtype == torch.float32 and torch.equal(target.weight, source.weight.half().float())
    load_network(target, write_state(tmp_path / f"x{suffix}", source.state_dict()))
    assert torch.equal(target.weight, source.weight)
