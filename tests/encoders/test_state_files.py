"""Files of weights: read without running anything, written whole or not at all."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hspsam_monai.encoders.state_files import halved, read_state, write_state
from hspsam_monai.errors import WeightsError

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
        "from hspsam_monai.encoders.state_files import write_state, WeightsError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "for path in sys.argv[1:]:\n"
        "    try: write_state(path, {'a': torch.ones(1_000_000)})\n"
        "    except WeightsError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.count("could not be written") == 2, result.stdout + result.stderr
    assert [path.read_bytes() for path in paths] == old and sorted(tmp_path.iterdir()) == paths


def test_only_what_loses_nothing_is_halved():
    state = {
        "exact": torch.tensor([0.5, -3.0]), "fine": torch.tensor([0.1]), "large": torch.tensor([1e6]),
        "nan": torch.tensor([float("nan")]), "ids": torch.tensor([1, 2]), "none": torch.zeros(0, 4),
    }  # fmt: skip
    types = {key: value.dtype for key, value in halved(state).items()}
    wide = {"fine", "large", "nan"}
    assert {key for key, dtype in types.items() if dtype == torch.float32} == wide and types["ids"] == torch.int64
    assert torch.equal(halved(state)["exact"].float(), state["exact"])
