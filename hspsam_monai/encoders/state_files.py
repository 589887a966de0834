"""Files of weights: one safe reader, one writer.

Nothing else touches such files. They are read without running anything they contain, and written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hspsam_monai.errors import WeightsError
from hspsam_monai.files import atomic_write

_WRAPPERS = ("model", "state_dict", "network", "model_state_dict")  # where training scripts put the weights
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_SHOWN = 8  # keys named in an error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file or checkpoint, on the CPU, running nothing the file contains.

    Takes ``.safetensors``, or anything ``torch.save`` wrote: a plain state dict, or one inside ``model``,
    ``state_dict``, ``network`` or ``model_state_dict``. Prefixes of parallel or compiled modules are removed.

    Raises:
        WeightsError: the file is missing, damaged, holds more than plain data, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path, device="cpu")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged pickle can raise anything at all
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{path} cannot be read safely as weights: it is damaged or holds more than tensors, and "
            f"nothing in it was run ({reason}). Get it again, or have its owner save the state dict alone, "
            "best as .safetensors."
        ) from error
    state = _unwrap(path, content)
    for prefix in _PREFIXES * 2:  # both may be there, in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    """Find the state dict inside what a training script stored."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        found = ", ".join(map(str, list(content)[:_SHOWN])) if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"{path} holds no named tensors, but {found or 'nothing'}; expected a state dict.")
    return tensors


def write_state(path: str | Path, state: Mapping[str, Any], *, metadata: dict[str, str] | None = None) -> Path:
    """Write a state dict or checkpoint whole or not at all; the only writer of such files.

    Args:
        path: ``.safetensors`` (tensors only), or any other name for ``torch.save``. Folders are created.
        state: tensors by name; for ``torch.save`` also plain data (numbers, texts, lists, dicts).
        metadata: texts kept in the head of a ``.safetensors`` file.

    Returns:
        The path written.

    Raises:
        WeightsError: disk full, folder not writable, or something in ``state`` cannot be stored. The old
            file is as it was and nothing is left behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            if path.suffix == ".safetensors":
                # safetensors refuses views and shared storage; copies are neither.
                tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
                save_file(tensors, temporary, metadata)
            else:
                # Through Python's file, so that a full disk is an ordinary OSError.
                with temporary.open("wb") as file:
                    torch.save(dict(state), file)
    except Exception as error:  # torch and safetensors raise kinds of their own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WeightsError(
            f"{path} could not be written: {reason}. What stood there before is unchanged; free some space "
            "or choose another folder."
        ) from error
    return path


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor in half the bytes whose numbers float16 holds exactly, such as weights that were stored so."""
    found = {}
    for key, value in state.items():
        half = value.half() if value.is_floating_point() else value
        found[key] = half if torch.equal(half.to(value.dtype), value) else value
    return found
