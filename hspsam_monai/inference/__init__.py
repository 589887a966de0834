"""Inferers: an image of any size in, logits at its size out; export and TensorRT."""

from hspsam_monai.inference.closeness import Closeness
from hspsam_monai.inference.export import export_onnx
from hspsam_monai.inference.image_inferer import ImageInferer, autocast_dtype
from hspsam_monai.inference.mask_files import PALETTE, SaveMaskd, write_mask_png
from hspsam_monai.inference.supports import give_context, read_supports, support_labels
from hspsam_monai.inference.tensorrt import compile_encoder

__all__ = [
    "PALETTE",
    "Closeness",
    "ImageInferer",
    "SaveMaskd",
    "autocast_dtype",
    "compile_encoder",
    "export_onnx",
    "give_context",
    "read_supports",
    "support_labels",
    "write_mask_png",
]
