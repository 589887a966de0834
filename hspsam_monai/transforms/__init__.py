"""Case -> tensor and back, as MONAI dictionary transforms."""

from hspsam_monai.transforms.camera import RandCamera, RandCamerad, RandEmptyCropd
from hspsam_monai.transforms.doubtful import DropDoubtfuld, drop_doubtful
from hspsam_monai.transforms.resize import FitToNetworkd, RequireSameSized, fit_image

__all__ = [
    "DropDoubtfuld",
    "FitToNetworkd",
    "RandCamera",
    "RandCamerad",
    "RandEmptyCropd",
    "RequireSameSized",
    "drop_doubtful",
    "fit_image",
]
