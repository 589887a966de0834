"""Networks: one file a paper, and the blocks they share."""

from hspsam_monai.networks.conv_pyramid import ConvPyramidSAM
from hspsam_monai.networks.hsp_sam import HSPSAM
from hspsam_monai.networks.pretrained import load_checkpoint, load_pretrained
from hspsam_monai.networks.proxy_prompt import ProxyPrompt
from hspsam_monai.networks.sam_decoder import Prompts, SAMDecoder
from hspsam_monai.networks.sam_sp import SAMSP

__all__ = [
    "HSPSAM",
    "SAMSP",
    "ConvPyramidSAM",
    "Prompts",
    "ProxyPrompt",
    "SAMDecoder",
    "load_checkpoint",
    "load_pretrained",
]
