"""ONNX: a trained network as one file, checked against PyTorch before it gets its name."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hspsam_monai
from hspsam_monai.encoders.lora import merge_lora
from hspsam_monai.errors import ConfigError, ExportError
from hspsam_monai.files import atomic_write

#: Largest accepted difference of a logit between onnxruntime and PyTorch, both in float32 on the CPU.
TOLERANCE = 1e-4
#: Batch sizes of the check; the graph is made with batch 2.
CHECKED_BATCHES = (1, 3)
#: protobuf's limit of one file, in bytes.
_LARGEST = 2**31 - 1
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_export_packages() -> None:
    """Refuse early where the extra ``export`` is missing.

    Raises:
        ConfigError: names the packages and the command that installs them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX export needs {', '.join(missing)}, not installed here. Install the extra: pip install "
            "'hspsam_monai[export]'."
        )


def export_onnx(
    network: nn.Module,
    path: str | Path,
    image_size: int,
    *,
    labels: Mapping[str, int] | None = None,
    model: str = "",
    tolerance: float = TOLERANCE,
) -> float:
    """Write a network as ONNX: input ``image`` (B, 3, S, S) in [0, 1], output ``pred`` logits (B, K, S, S), float32.

    B is free, S is ``image_size``: windows and positions depend on it. LoRA is merged. The network itself is left as
    it is (a copy is exported, in evaluation mode, on the CPU). The file's metadata hold ``model``, ``network``,
    ``classes`` (JSON, name -> index), ``image_size``, ``input``, ``output`` and ``hspsam_monai`` (version).

    Args:
        network: one tensor in, one tensor out in evaluation mode.
        path: the file to write, whole or not at all.
        image_size: S, a multiple of 32.
        labels: class name -> index.
        model: name of the model, for the metadata.
        tolerance: largest accepted absolute difference of a logit.

    Returns:
        The largest absolute difference from PyTorch on random images, batch 1 and 3.

    Raises:
        ConfigError: a package is missing, the folder does not exist, or the network is too large for one file.
        ExportError: PyTorch cannot capture the network, or onnxruntime computes something else than PyTorch. Then no
            file is written, and an older one of the name stays.
    """
    require_export_packages()
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder; make it first.")
    size = sum(p.numel() * 4 for p in network.parameters())
    if size >= _LARGEST:
        raise ConfigError(f"The network has {size / 2**30:.1f} GiB of weights; one ONNX file holds less than 2 GiB.")
    network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    merge_lora(network)
    program = _capture(network, image_size)
    graph = program.model
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # PyTorch notes source files there: paths of this machine, and a tenth of the size
    graph.producer_name = "hspsam_monai"
    graph.metadata_props.clear()
    graph.metadata_props.update(_metadata(network, image_size, labels, model))
    with atomic_write(path) as part:
        program.save(part, external_data=False)
        worst = max(largest_difference(network, part, random_images(n, image_size)) for n in CHECKED_BATCHES)
        if not worst <= tolerance:
            raise ExportError(
                f"{path}: onnxruntime's logits differ from PyTorch's by up to {worst:.2e}; accepted: {tolerance:.0e}. "
                "Nothing was written. Another version of torch, onnxscript or onnxruntime may help."
            )
    return worst


def session(path: str | Path) -> Any:
    """Open an ONNX file in onnxruntime on the CPU, with PyTorch's number of threads, which sleep while they wait."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def largest_difference(network: nn.Module, path: str | Path, image: Tensor) -> float:
    """Largest absolute difference between an ONNX file's ``pred`` and the network's logits for (B, 3, S, S) images."""
    found = session(path).run(["pred"], {"image": image.numpy()})[0]
    return float(np.abs(found - network(image).numpy()).max())


def random_images(batch: int, image_size: int) -> Tensor:
    """(B, 3, S, S) in [0, 1], the same in every run."""
    return torch.rand(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _capture(network: nn.Module, image_size: int) -> Any:
    """torch.export with a free batch, then ONNX. Two steps: PyTorch's own one silently falls back to a fixed batch."""
    image = random_images(2, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside PyTorch, nothing a user can act on
        try:
            batch = torch.export.Dim("batch", min=1)
            exported = torch.export.export(network, (image,), dynamic_shapes=({0: batch},))
            names = {"input_names": ["image"], "output_names": ["pred"], "dynamic_shapes": ({0: "batch"},)}
            return torch.onnx.export(exported, (image,), dynamo=True, verbose=False, **names)
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            raise ExportError(
                f"{type(network).__name__} cannot be exported at {image_size} pixels: {type(error).__name__}: {line}"
            ) from error


def _metadata(network: nn.Module, image_size: int, labels: Mapping[str, int] | None, model: str) -> dict[str, str]:
    classes = labels or {str(k): k for k in range(getattr(network, "num_classes", 0))}
    return {
        "model": model,
        "network": type(network).__name__,
        "classes": json.dumps(dict(classes)),
        "image_size": str(image_size),
        "input": "image (B, 3, H, W): RGB in [0, 1], resized bilinearly with antialiasing, aspect ratio not kept",
        "output": "pred (B, K, H, W): logits; argmax over K is the mask (doubtful components still in it)",
        "hspsam_monai": hspsam_monai.__version__,
    }


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of an ONNX file, as :func:`export_onnx` writes them."""
    import onnx

    return {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
