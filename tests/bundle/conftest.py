"""One small training of the bundle, shared by its tests."""

from pathlib import Path

import pytest
from monai.bundle import ConfigWorkflow

from hspsam_monai.data import write_phantoms


def configs(bundle: Path, *names: str) -> list[str]:
    return [str(bundle / "configs" / f"{name}.json") for name in names]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("bundle") / "phantoms", 6, seed=3, size=(80, 96), val_fraction=0.34)


@pytest.fixture(scope="session")
def trained(bundle, phantoms, tmp_path_factory):
    """One epoch of the shipped network, small and from random weights, through the bundle's train.json."""
    run = tmp_path_factory.mktemp("bundle") / "run"
    workflow = ConfigWorkflow(
        configs(bundle, "train", "task/polyp"), workflow_type="train", dataset_dir=str(phantoms), output_dir=str(run),
        pretrained=None, image_size=64, batch_size=2, epochs=1, precision="float32",
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return run
