"""What a person looks at: overlays, contact sheets, one-page HTML galleries and learning curves."""

from hspsam_monai.report.charts import learning_curve_png
from hspsam_monai.report.gallery import GalleryItem, gallery_png, worst_first
from hspsam_monai.report.html import gallery_html
from hspsam_monai.report.overlay import TRUTH_COLOUR, overlay

__all__ = [
    "TRUTH_COLOUR",
    "GalleryItem",
    "gallery_html",
    "gallery_png",
    "learning_curve_png",
    "overlay",
    "worst_first",
]
