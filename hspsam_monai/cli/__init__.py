"""``hspsam``: a thin face over the bundle's configurations.

``app`` declares the commands, each a few lines around one function that can be called from Python as well:
``workflows`` (train, evaluate, segment), ``scoring``, ``weights``, ``doctor``, ``demo``. Nothing here imports torch or
MONAI before a command needs them, so ``hspsam --help`` answers at once.
"""

import gc
import os


def prepare() -> None:
    """Set what must be set before torch and MONAI are imported; for any program that starts this way."""
    # Importing torch and MONAI makes a few million objects that live as long as the process. Looking through them again
    # and again for garbage is a sixth of the import's time.
    gc.set_threshold(50_000, 20, 100)
    # Before torch is imported: waiting OpenMP threads then sleep instead of spin, on a busy machine a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line."""
    prepare()
    from hspsam_monai.cli.app import app

    app(prog_name="hspsam")
