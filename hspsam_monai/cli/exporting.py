"""``hspsam export``: find a model, build its network, write it as ONNX."""

from __future__ import annotations

import json
from pathlib import Path

from hspsam_monai.cli.models import find_model
from hspsam_monai.cli.options import config_path
from hspsam_monai.errors import ConfigError
from hspsam_monai.network_file import NETWORK_KEYS


def export(model: str | Path, target: str | Path) -> tuple[float, int]:
    """Write a model as ONNX, see :func:`hspsam_monai.inference.export.export_onnx`.

    Args:
        model: a run's folder, a checkpoint or ``shipped``.
        target: the file to write, ending in ``.onnx``.

    Returns:
        The largest difference of a logit from PyTorch, and the side of the images.

    Raises:
        ConfigError: a package is missing, the target is no ``.onnx`` file, or the network prompts itself as it goes.
        WeightsError: there is no such model.
        ExportError: the exported file computes something else.
    """
    from hspsam_monai.inference.export import export_onnx, require_export_packages

    require_export_packages()
    target = Path(target).expanduser()
    if target.suffix != ".onnx":
        raise ConfigError(f"The target is {target}; expected a file name that ends in .onnx.")
    found = find_model(model)
    kind = str(found.network["network_def"]["_target_"]).rpartition(".")[2]
    if kind == "ProxyPrompt" or (kind == "SAMSP" and found.network["network_def"].get("steps", 1)):
        raise ConfigError(
            f"{found.path} is a {kind} whose prompts are made of what it finds, which has no fixed graph; expected "
            "HSP-SAM, a plain decoder or SAM-SP with steps=0."
        )

    from monai.bundle import ConfigParser

    from hspsam_monai.networks import load_checkpoint

    config = json.loads(config_path("inference.json").read_text(encoding="utf-8"))
    parser = ConfigParser({key: config[key] for key in NETWORK_KEYS} | found.network)
    network = parser.get_parsed_content("network_def")
    load_checkpoint(network, found.path)
    size = parser.get_parsed_content("image_size")
    name = found.path.parent.name if found.path.name == "model.pt" else found.path.stem
    target.parent.mkdir(parents=True, exist_ok=True)
    return export_onnx(network, target, size, labels=found.labels, model=name), size
