"""What a transform or a data set *is*, as text: two that are written alike are equal, whichever process made them."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hspsam_monai.data.cases import content_hash
from hspsam_monai.errors import ConfigError

#: Code of these packages is known by its version; that of all others is read.
_VERSIONED = ("builtins", "monai", "numpy", "torch", "functools", "pathlib", "enum")
#: Random states are set anew for every item and say nothing about it.
_RANDOM = (np.random.RandomState, np.random.Generator, torch.Generator)


def describe(value: Any, leave_out: tuple[str, ...] = ()) -> Any:
    """Turn an object into lists, dictionaries and texts that say everything about how it works.

    Objects are their class and their attributes, functions and classes outside MONAI, numpy and torch also the text of
    the file they stand in, so that a changed line is a change. Random states are left out. Take it before an object is
    used: some transforms remember what they drew last, which would only make the description differ needlessly.

    Args:
        value: a transform, a data set, or any part of one.
        leave_out: names of attributes of ``value`` itself that do not matter.

    Raises:
        ConfigError: something neither has attributes nor can be taken apart.
    """
    return _describe(value, leave_out, ())


def _describe(value: Any, leave_out: tuple[str, ...], path: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, str | bytes | int | float | complex):
        return repr(value)
    if isinstance(value, _RANDOM):
        return "random state"
    if id(value) in path:
        return "itself"
    inner = functools.partial(_describe, leave_out=(), path=(*path, id(value)))
    if isinstance(value, torch.Tensor | np.ndarray):
        return content_of(value)
    if isinstance(value, Mapping):
        return [[inner(key), inner(item)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(inner(item)) for item in value)
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), inner(value.co_consts)]
    if isinstance(value, types.FunctionType):
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        return [*_named(value), inner(value.__code__), inner(value.__defaults__), inner(closure)]
    if isinstance(value, types.MethodType):
        return [*_named(value.__func__), inner(value.__self__)]
    if isinstance(value, type | types.BuiltinFunctionType):
        return _named(value)
    if isinstance(value, torch.device):
        return ["device", value.type]  # which of several equal ones says nothing
    if hasattr(value, "__dict__"):
        attributes = {key: inner(item) for key, item in sorted(vars(value).items()) if key not in leave_out}
        parts = [inner(value.func), inner(value.args), inner(value.keywords)] if _is_partial(value) else []
        return [*_named(type(value)), attributes, *parts]
    try:
        return [*_named(type(value)), inner(value.__reduce_ex__(2))]
    except TypeError as error:
        raise ConfigError(
            f"A {type(value).__qualname__} in the transforms cannot be described ({error}); expected plain values, "
            "tensors, functions and objects with attributes. Leave it out, or train without stored features."
        ) from error


def _is_partial(value: Any) -> bool:
    return isinstance(value, functools.partial)


def _named(value: Any) -> list[str]:
    module = value.__module__ or "builtins"
    return [module, value.__qualname__, "" if module.split(".")[0] in _VERSIONED else _source(module)]


@functools.lru_cache(maxsize=256)
def _source(module: str) -> str:
    """Sha256 of the file a module was read from; nothing for one without a file."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    return content_hash(Path(file)) if file and Path(file).is_file() else ""


def content_of(value: Any) -> Any:
    """What a case holds: its texts, and hashes of its files, tensors and arrays; not where the files lie."""
    if isinstance(value, Mapping):
        return {str(key): content_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content_of(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        array = np.ascontiguousarray(torch.as_tensor(value).cpu().numpy())
        return hashlib.sha256(repr((array.shape, str(array.dtype))).encode() + array.tobytes()).hexdigest()
    if isinstance(value, str | Path) and Path(value).is_file():
        return content_hash(Path(value))
    return repr(value)
