"""Where the bundle is: its configurations must work from any current folder."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

from hspsam_monai.errors import ConfigError

_MARK = Path("configs") / "metadata.json"


def bundle_root() -> Path:
    """Folder of the bundle.

    Looked for in this order: ``$HSPSAM_BUNDLE``; the bundle whose configuration is being run by MONAI (a copy keeps
    its own model); ``bundle/`` beside the package (source checkout); the folders a wheel installs.

    Raises:
        ConfigError: none of these holds ``configs/metadata.json``.
    """
    named = os.environ.get("HSPSAM_BUNDLE")
    candidates = [
        *([Path(named)] if named else []),
        *_running(),
        Path(__file__).resolve().parents[1] / "bundle",
        # Where a wheel puts it: in an environment, a user's folder (--user), a folder of one's own (--target).
        *(
            Path(base) / "share" / "hspsam_monai" / "bundle"
            for base in (sys.prefix, site.getuserbase(), Path(__file__).resolve().parents[1])
        ),
    ]
    for folder in candidates:
        if (folder / _MARK).is_file():
            return folder.resolve()
    looked = ", ".join(str(folder) for folder in candidates)
    raise ConfigError(f"The bundle was not found (looked in {looked}). Set HSPSAM_BUNDLE to the folder of configs/.")


def _running() -> list[Path]:
    if "monai.bundle" not in sys.modules:  # nothing of MONAI is imported just to ask
        return []
    from hspsam_monai.workflow import running_workflow

    workflow = running_workflow()
    return [] if workflow is None else [Path(workflow.config_root_path).resolve().parent]
