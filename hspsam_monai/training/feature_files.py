"""One item of a data set with its features, as one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.files import atomic_write
from hspsam_monai.transforms.resize import plain

#: Changes with the layout of the files, so that files of another layout are not taken.
LAYOUT = 2
SUFFIX = ".safetensors"


def pack_item(item: Mapping[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of one item to store, and what else is to be known of it.

    Masks and other whole numbers from 0 to 255 become uint8; other floating-point tensors become ``dtype``. Each comes
    back in its own type, features excepted. Numbers and texts are kept, anything else (meta data) is not.

    Args:
        item: its values are tensors, dictionaries of tensors (features by name), numbers or texts.
        dtype: in which features are stored.

    Raises:
        ConfigError: a value does not fit ``dtype``.
    """
    tensors: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    others = {key: value for key, value in item.items() if isinstance(value, str | int | float)}
    for key, value in item.items():
        if isinstance(value, Mapping):
            tensors |= {f"{key}/{name}": _cast(part, dtype, f"{key}/{name}") for name, part in value.items()}
        elif isinstance(value, Tensor):
            types[key] = str(value.dtype).removeprefix("torch.")
            value = plain(value).detach().cpu()  # noqa: PLW2901
            small = value.to(torch.uint8)
            exact = torch.equal(small.to(value.dtype), value)
            tensors[key] = small if exact else _cast(value, dtype, key) if value.is_floating_point() else value
    return {k: v.contiguous() for k, v in tensors.items()}, {"types": types, "plain": others}


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = value.detach().cpu().to(dtype)
    if not stored.isfinite().all():
        raise ConfigError(
            f"{name} holds values up to {float(value.abs().max()):.4g}, which {dtype} cannot hold; expected finite "
            "features. Store them as bfloat16 or float32 (feature_dtype)."
        )
    return stored


def unpack_item(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> dict[str, Any]:
    """The item :func:`pack_item` was given; features still in the type they are stored in."""
    item: dict[str, Any] = dict(others["plain"])
    for key, value in tensors.items():
        outer, slash, name = key.partition("/")
        if slash:
            item.setdefault(outer, {})[name] = value
        else:
            item[key] = value.to(getattr(torch, others["types"][key]))
    return item


def write_item(path: Path, item: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Write one item, whole or not at all; returns the number of bytes.

    Raises:
        ConfigError: see :func:`pack_item`.
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors, others = pack_item(item, dtype)
    # One entry, since safetensors writes several in any order, and equal items should give equal files.
    entry = json.dumps({**others, "digest": _digest(tensors, others)})
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"item": entry})
        return temporary.stat().st_size


def read_item(path: Path, verify: bool = False) -> dict[str, Any]:
    """Read one item.

    Args:
        path: a file of :func:`write_item`.
        verify: also compare the content with its digest; without, only the file's structure is checked.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            others = json.loads((file.metadata() or {})["item"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if verify and others["digest"] != _digest(tensors, others):
            raise ValueError("its content does not match its digest")
        return unpack_item(tensors, others)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: found {error}; expected stored features. Go on with --resume, which makes damaged files anew."
        ) from error


def _digest(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([others["types"], others["plain"]]).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
