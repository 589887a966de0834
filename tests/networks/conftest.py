"""Small encoders and the comparisons the network tests share."""

from functools import partial

import pytest
import torch

from hspsam_monai.encoders import ENCODERS, SamViT, sam_vit
from hspsam_monai.encoders.sam_vit import Variant


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    """SAM's ViT in small under the name ``sam_small``: four levels of width 48, windowed and global blocks."""
    monkeypatch.setitem(sam_vit.VARIANTS, "small", Variant(48, 6, 3, (1, 2, 4, 5)))
    monkeypatch.setitem(ENCODERS, "sam_small", partial(SamViT, "small"))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
