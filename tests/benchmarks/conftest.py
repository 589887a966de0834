"""Shared by the tests of the benchmarks."""

import sys
from functools import partial

import pytest

from hspsam_monai import encoders
from hspsam_monai.data import write_phantoms
from hspsam_monai.encoders import sam_vit
from hspsam_monai.encoders.sam_vit import SamViT, Variant


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


@pytest.fixture
def small(monkeypatch):
    """Names a small ViT with windowed and global blocks."""
    monkeypatch.setitem(sam_vit.VARIANTS, "small", Variant(48, 4, 3, (1, 3)))
    monkeypatch.setitem(encoders.ENCODERS, "sam_small", partial(SamViT, "small"))
    return "sam_small"
