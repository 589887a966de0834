"""Masks of another size than their image never reach a network, whichever overlay trains."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hspsam_monai.errors import DataError
from tests.training.conftest import root


@pytest.mark.parametrize(
    ("split", "overlay", "task", "options"),
    [
        ("train", None, None, {}),
        ("val", None, None, {}),
        ("train", "hsp_sam_frozen", None, {"feature_views": 1}),
        ("val", "hsp_sam_frozen", None, {"feature_views": 1}),
        ("train", "proxy_prompt", None, {"supports": [1, 2], "context_supports": 2}),
        ("train", None, "few_shot", {"train_cases": 2, "draws": 4}),
        ("train", "proxy_prompt", "few_shot", {"train_cases": 3, "draws": 4}),
    ],
)
def test_a_mask_of_another_size_stops_the_run_by_name(train, phantoms, tmp_path, split, overlay, task, options):
    data = shutil.copytree(phantoms, tmp_path / "data")
    cases = json.loads((data / "splits.json").read_text())[split]
    for case in cases:
        Image.fromarray(np.full((80, 64), 255, np.uint8)).save(data / "masks" / f"{case}.png")
    with pytest.raises(Exception, match=r"\w") as caught:
        train(overlay=overlay, task=task, data=data, epochs=1, **options).start()
    error = root(caught.value)
    assert isinstance(error, DataError) and "found a mask of 64 x 80 pixels for an image of 80 x 64" in str(error)
