"""Descriptions of transforms: equal for equal ones, different for whatever acts differently."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Compose, LoadImaged, RandAffined, RandFlipd, RandZoomd, ToDeviced

from hspsam_monai.errors import ConfigError
from hspsam_monai.training.fingerprint import content_of, describe
from hspsam_monai.transforms import FitToNetworkd, RandCamerad

KEYS = ["image", "label"]


def chain(size=64, zoom=1.5, device="cpu", mode="bilinear"):
    return Compose(
        [
            LoadImaged("image", reader="hspsam_monai.data.PhotoReader"),
            FitToNetworkd(size),
            ToDeviced(KEYS, torch.device(device)),
            RandFlipd(KEYS, prob=0.5),
            RandZoomd(KEYS, prob=0.5, max_zoom=zoom),
            RandAffined(KEYS, prob=0.5, rotate_range=1.0, mode=[mode, "nearest"]),
            RandCamerad(prob=0.8),
        ]
    )


def test_equal_chains_are_described_alike_whatever_their_seeds():
    assert describe(chain().set_random_state(seed=1)) == describe(chain().set_random_state(seed=2))


@pytest.mark.parametrize("change", [{"size": 96}, {"zoom": 1.6}, {"device": "cuda"}, {"mode": "nearest"}])
def test_every_argument_shows(change):
    assert describe(chain(**change)) != describe(chain())


def test_which_of_several_gpus_says_nothing():
    """Processes of one run, and runs on different ones, share features."""
    assert describe(chain(device="cuda:0")) == describe(chain(device="cuda:1")) == describe(chain(device="cuda"))


def test_another_process_says_the_same():
    code = "import test_fingerprint as t; print(repr(t.describe(t.chain())))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == repr(describe(chain()))


def test_functions_are_told_by_what_they_do():
    def shift(by):
        return lambda x: x + by

    assert describe(shift(1)) == describe(shift(1)) != describe(shift(2))
    assert describe(lambda x: x + 1) != describe(lambda x: x - 1)
    assert describe(lambda x: x.min()) != describe(lambda x: x.max())
    assert describe(functools.partial(max, 1)) != describe(functools.partial(max, 2))
    assert describe(lambda x: [i + 1 for i in x]) != describe(lambda x: [i + 2 for i in x])


def test_code_outside_the_libraries_is_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number in (1, 2):
        name = f"own_transform_{number}"
        (tmp_path / f"{name}.py").write_text(f"class Own:\n    def __call__(self, x):\n        return x * {number}\n")
        module = __import__(name)
        module.Own.__module__ = name
        found.append(describe(module.Own())[2])
    assert all(found) and found[0] != found[1]


def test_values_are_told_apart():
    values = [None, 1, 1.0, True, "1", b"1", [1], {"a": 1}, {"a": 2}, {1}, np.ones(2), torch.ones(3), torch.float16,
              torch.device("cpu"), torch.device("cuda"), slice(1, 2), Path("a")]  # fmt: skip
    seen = [repr(describe(value)) for value in values]
    assert len(set(seen)) == len(values)
    assert describe({"b", "a"}) == describe({"a", "b"})
    assert describe(np.random.RandomState(1)) == describe(np.random.RandomState(2))


def test_an_object_that_holds_itself_ends():
    class Ring:
        def __init__(self):
            self.next = self

    assert "itself" in repr(describe(Ring()))


def test_attributes_may_be_left_out():
    one, two = RandFlipd(KEYS, prob=0.5), RandFlipd(KEYS, prob=0.5)
    two.note = "other"
    assert describe(one) != describe(two) and describe(one) == describe(two, leave_out=("note",))


def test_what_cannot_be_taken_apart_is_named():
    with pytest.raises(ConfigError, match="generator in the transforms cannot be described"):
        describe(i for i in range(2))


def test_cases_are_told_by_content(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    (tmp_path / "c").write_bytes(b"two")
    a, b, c = ({"image": tmp_path / name, "label": [str(tmp_path / "a")], "case": "x"} for name in "abc")
    assert content_of(a) == content_of(b) != content_of(c)
    assert content_of({**a, "case": "y"}) != content_of(a)
    assert content_of(torch.ones(2)) == content_of(np.ones(2, np.float32)) != content_of(torch.ones(2, 1))
