"""A label belongs to its image: equal sizes, or a sentence that names the case."""

import pytest
import torch
from monai.data import MetaTensor

from hspsam_monai.errors import DataError
from hspsam_monai.transforms import RequireSameSized


def test_a_label_of_its_images_size_passes_unchanged():
    case = {"image": MetaTensor(torch.rand(3, 5, 7)), "label": torch.ones(1, 5, 7), "case": "a"}
    assert RequireSameSized()(case) == case


@pytest.mark.parametrize("size", [(7, 5), (10, 14), (5, 6)])
def test_another_size_is_refused_by_name(size):
    case = {"image": torch.rand(3, 5, 7), "label": torch.ones(1, *size), "case": "b"}
    with pytest.raises(DataError, match=f"b: found a mask of {size[1]} x {size[0]} pixels for an image of 7 x 5;"):
        RequireSameSized()(case)
