"""Inferers: an image or a volume of any size in, logits at its size out."""

from hspsam_monai.inference.image_inferer import ImageInferer, autocast_dtype
from hspsam_monai.inference.mask_files import PALETTE, SaveMaskd, write_mask_png

__all__ = ["PALETTE", "ImageInferer", "SaveMaskd", "autocast_dtype", "write_mask_png"]
