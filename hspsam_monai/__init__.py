"""SAM that prompts itself: medical images in, masks out, through MONAI."""

import importlib
from types import ModuleType

__version__ = "0.1.0"

#: Rooms of the package in the order data flows through them; each imports only from those before it.
ROOMS = (
    "data",
    "transforms",
    "encoders",
    "networks",
    "training",
    "inference",
    "scores",
    "score_folders",
    "report",
    "evaluation",
)
_HELPERS = ("bundle_path", "workflow", "files", "errors")


def __getattr__(name: str) -> ModuleType:
    """Import a room on first use, so ``import hspsam_monai`` stays quick and configs need one import."""
    if name in ROOMS or name in _HELPERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
