"""Networks: one file a paper, and the blocks they share."""

from hspsam_monai.networks.conv_pyramid import ConvPyramidSAM
from hspsam_monai.networks.hsp_sam import HSPSAM
from hspsam_monai.networks.pretrained import load_checkpoint, load_pretrained

__all__ = ["HSPSAM", "ConvPyramidSAM", "load_checkpoint", "load_pretrained"]
