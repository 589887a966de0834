"""Fixtures every room's tests share."""

import os
from pathlib import Path

import pytest

# Waiting threads soon sleep, so a busy machine does not stall the suite; read as torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

REPO = Path(__file__).resolve().parents[1]

# Two threads on two cores.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Development data and weights beside the repository; skips where they are absent."""
    path = Path(os.environ.get("HSPSAM_SHARED", REPO.parent / "shared"))
    if not (path / "weights" / "mobile_sam.pt").is_file():  # a folder of this name may be anything
        pytest.skip("development data and weights are not at hand")
    return path


@pytest.fixture(scope="session")
def bundle(repo: Path) -> Path:
    """Root of the bundle."""
    return repo / "bundle"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
