"""Which MONAI workflow is running this step: expressions in a configuration cannot name their own parser."""

from __future__ import annotations

import inspect

from monai.bundle import ConfigWorkflow


def running_workflow() -> ConfigWorkflow | None:
    """The innermost :class:`ConfigWorkflow` among the callers, however it was started; ``None`` outside one."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return owner
        frame = frame.f_back
    return None
