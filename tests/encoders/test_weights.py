"""Weights: found, verified, read without running anything, matched by key, written whole or not at all."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from hspsam_monai.encoders import sam_vit, weights
from hspsam_monai.encoders.sam_vit import SamViT, Variant
from hspsam_monai.encoders.weights import (
    CATALOGUE,
    fetch,
    load_encoder,
    load_network,
    locate,
    read_state,
    verify,
    write_state,
)
from hspsam_monai.errors import WeightsError


@pytest.fixture(autouse=True)
def no_folders(monkeypatch, tmp_path):
    """Neither the user's folders nor the network are touched by these tests."""
    monkeypatch.delenv("HSPSAM_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(*_args, **_options):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


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


# -- finding


def test_locate_looks_in_order(tmp_path, monkeypatch):
    cache, named = tmp_path / "cache" / "hspsam", tmp_path / "named"
    for folder in (cache, named):
        folder.mkdir(parents=True)
        (folder / "mobile_sam.pt").write_bytes(b"x")
    explicit = tmp_path / "mine.pt"
    explicit.write_bytes(b"x")
    assert locate(explicit) == explicit
    assert locate("mobile_sam") == cache / "mobile_sam.pt"
    monkeypatch.setenv("HSPSAM_WEIGHTS", str(named))
    assert locate("mobile_sam") == named / "mobile_sam.pt"
    assert locate("mobile_sam.pt") == named / "mobile_sam.pt"


def test_locate_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(WeightsError, match=r"looked for .*sam_vit_b_01ec64.pth.*hspsam weights fetch sam_vit_b"):
        locate("sam_vit_b")
    with pytest.raises(WeightsError, match="neither a file nor one of sam_vit_b"):
        locate(tmp_path / "none.pth")


def test_catalogue_is_consistent():
    for name, entry in CATALOGUE.items():
        assert entry.name == name and entry.url.startswith("https://")
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32
    assert CATALOGUE["sam_vit_l"].file_name == "sam_vit_l_0b3195.pth"


# -- hashes and fetching


def test_wrong_hash_is_refused(tmp_path, monkeypatch, small):
    path = official_file(tmp_path / "sam_vit_b_01ec64.pth", small(64))
    with pytest.raises(WeightsError, match="expected ec2df627"):
        verify(path)
    monkeypatch.setenv("HSPSAM_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="expected ec2df627"):
        load_encoder(small(64), "sam_vit_b")


def test_verify_without_known_hash_says_so(tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"abc")
    found = verify(path)
    assert not found.verified and found.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert verify(path, found.sha256).verified
    with pytest.raises(WeightsError, match="expected 00"):
        verify(path, sha256="00" * 32)


class Response(io.BytesIO):
    """What urlopen returns, cut short."""

    def __init__(self, content):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content))}


def serve(monkeypatch, content):
    calls = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: calls.append(url) or Response(content))
    return calls


def test_fetch_keeps_only_the_right_file(tmp_path, monkeypatch):
    right = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(WeightsError, match=r"No sha256 is known.*--sha256"):
        fetch("medsam", tmp_path)
    serve(monkeypatch, b"something else")
    with pytest.raises(WeightsError, match=f"expected {right}"):
        fetch("medsam", tmp_path, sha256=right)
    assert list(tmp_path.iterdir()) == []
    calls, progress = serve(monkeypatch, b"weights"), []
    path = fetch("medsam", tmp_path, lambda *step: progress.append(step), right.upper())
    assert path.read_bytes() == b"weights" and progress == [(7, 7)]
    assert fetch("medsam", tmp_path, sha256=right) == path and len(calls) == 1  # already there
    with pytest.raises(WeightsError, match=r"The catalogue knows mobile_sam\.pt by sha256"):
        fetch("mobile_sam", tmp_path, sha256=right)


def test_a_connection_that_ends_early_is_no_wrong_file(tmp_path, monkeypatch):
    response = Response(b"weights")
    response.headers["Content-Length"] = "1000"
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: response)
    with pytest.raises(WeightsError, match=r"the connection ended after 7 of 1000 bytes.*Try again"):
        fetch("medsam", tmp_path, sha256="00" * 32)
    assert list(tmp_path.iterdir()) == []


def test_fetch_without_connection_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"could not be fetched from https://dl.*no network"):
        fetch("sam_vit_b", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match="not in the catalogue"):
        fetch("nonsense", tmp_path)


# -- reading


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "network"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_reads_every_known_layout(tmp_path, wrapper, prefix):
    state = {f"{prefix}a.weight": torch.ones(2), f"{prefix}b": torch.zeros(1)}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {}}, tmp_path / "x.pth")
    assert set(read_state(tmp_path / "x.pth")) == {"a.weight", "b"}


def test_reads_safetensors(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert torch.equal(read_state(tmp_path / "x.safetensors")["a"], torch.ones(2))


class Hostile:
    """Runs a command when unpickled the ordinary way."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".pkl", ".safetensors"])
@pytest.mark.parametrize("function", [os.system, exec, eval, os.mkdir], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", ["raw", "zip", "legacy"])
def test_hostile_pickles_do_not_run(tmp_path, suffix, function, form):
    trace = tmp_path / "trace"
    code = {os.system: f"mkdir '{trace}'", os.mkdir: str(trace)}.get(
        function, f"__import__('os').mkdir({str(trace)!r})"
    )
    content = {"model": {"weight": torch.zeros(1), "bias": Hostile(function, code)}}
    path = tmp_path / f"evil{suffix}"
    if form == "raw":
        path.write_bytes(pickle.dumps(Hostile(function, code)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match=rf"evil{suffix} cannot be read safely"):
        read_state(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_named(tmp_path, suffix, keep):
    path = write_state(tmp_path / f"x{suffix}", {"a": torch.randn(1000), "b": torch.randn(10)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(WeightsError, match=rf"x{suffix} cannot be read safely"):
        read_state(path)


def test_files_without_tensors_are_named(tmp_path):
    torch.save({"epoch": 3, "note": "x"}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="holds no named tensors, but epoch, note"):
        read_state(tmp_path / "x.pth")
    torch.save(torch.zeros(2), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="but Tensor"):
        read_state(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="is not a file"):
        read_state(tmp_path)


# -- loading


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


# -- writing


def test_checkpoints_keep_plain_data(tmp_path):
    path = write_state(tmp_path / "new" / "x.pt", {"model": {"a": torch.ones(2)}, "epoch": 3})
    assert torch.load(path, weights_only=True)["epoch"] == 3


def test_safetensors_take_views_and_metadata(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    path = write_state(tmp_path / "x.safetensors", {"a": shared.t(), "b": shared}, metadata={"seed": "1"})
    assert torch.equal(load_file(path)["a"], shared.t())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, suffix):
    path = write_state(tmp_path / f"x{suffix}", {"a": torch.ones(2)})
    old = path.read_bytes()

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WeightsError, match="could not be written: No space left on device"):
        write_state(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_unstorable_content_is_named(tmp_path):
    with pytest.raises(WeightsError, match="could not be written"):
        write_state(tmp_path / "x.pth", {"a": lambda: None})
    with pytest.raises(WeightsError, match="could not be written"):
        write_state(tmp_path / "x.safetensors", {"a": 3})
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk_keeps_the_old_files(tmp_path):
    """The kernel refuses to let a file grow, as on a full disk; the limit needs its own process."""
    paths = [write_state(tmp_path / name, {"a": torch.ones(2)}) for name in ("x.pth", "x.safetensors")]
    old = [path.read_bytes() for path in paths]
    code = (
        "import resource, sys, torch\n"
        "from hspsam_monai.encoders.weights import write_state, WeightsError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "for path in sys.argv[1:]:\n"
        "    try: write_state(path, {'a': torch.ones(1_000_000)})\n"
        "    except WeightsError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.count("could not be written") == 2, result.stdout + result.stderr
    assert [path.read_bytes() for path in paths] == old and sorted(tmp_path.iterdir()) == paths


# -- the real file


@pytest.mark.data
def test_mobile_sam_is_found_and_verified(shared, monkeypatch):
    monkeypatch.setenv("HSPSAM_WEIGHTS", str(shared / "weights"))
    found = verify("mobile_sam")
    assert found.path == shared / "weights" / "mobile_sam.pt" and found.verified
    assert len(read_state(found.path)) == 439
    assert weights.search_folders()[0] == shared / "weights"
