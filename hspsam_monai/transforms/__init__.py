"""Case -> tensor and back, as MONAI dictionary transforms."""

from hspsam_monai.transforms.camera import RandCamera, RandCamerad, RandEmptyCropd
from hspsam_monai.transforms.resize import FitToNetworkd, fit_image

__all__ = ["FitToNetworkd", "RandCamera", "RandCamerad", "RandEmptyCropd", "fit_image"]
