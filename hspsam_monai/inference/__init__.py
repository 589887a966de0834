"""Inferers: an image or a volume of any size in, logits at its size out."""

from hspsam_monai.inference.image_inferer import ImageInferer, autocast_dtype

__all__ = ["ImageInferer", "autocast_dtype"]
