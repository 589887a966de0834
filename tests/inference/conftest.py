"""A small Proxy Prompt and folders of supports."""

import numpy as np
import pytest
import torch
from PIL import Image

from hspsam_monai.networks import ProxyPrompt


@pytest.fixture
def proxy():
    """Random weights, 64 pixels, one object."""
    torch.manual_seed(0)
    small = {"image_size": 64, "value_width": 16, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 32}
    return ProxyPrompt("mobile_sam", **small).eval()


@pytest.fixture
def supports(tmp_path):
    """Write images of random pixels and the given masks, name -> (H, W) values, into a folder of supports."""

    def write(masks, grey=()):
        for part in ("images", "masks"):
            (tmp_path / "supports" / part).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for name, mask in masks.items():
            shape = mask.shape if name in grey else (*mask.shape, 3)
            image = rng.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "supports" / "images" / f"{name}.png")
            Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "supports" / "masks" / f"{name}.png")
        return tmp_path / "supports"

    return write
