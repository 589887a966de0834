"""``python -m hspsam_monai`` is the command ``hspsam``."""

from hspsam_monai.cli import main

main()
