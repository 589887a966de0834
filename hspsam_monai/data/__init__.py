"""Files to cases: pairing, splits, picture readers, the check before training, phantoms."""

from hspsam_monai.data.cases import case_name, find_cases
from hspsam_monai.data.check import check_dataset
from hspsam_monai.data.datasets import SeededDataset, SeededSampler, TolerantDataset
from hspsam_monai.data.few import draw_cases, few_cases
from hspsam_monai.data.images import mask_values, read_image, read_mask
from hspsam_monai.data.phantoms import phantom, write_phantoms
from hspsam_monai.data.readers import MaskReader, PhotoReader
from hspsam_monai.data.report import Finding, Report

__all__ = [
    "Finding",
    "MaskReader",
    "PhotoReader",
    "Report",
    "SeededDataset",
    "SeededSampler",
    "TolerantDataset",
    "case_name",
    "check_dataset",
    "draw_cases",
    "few_cases",
    "find_cases",
    "mask_values",
    "phantom",
    "read_image",
    "read_mask",
    "write_phantoms",
]
