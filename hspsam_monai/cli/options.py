"""Names and KEY=VALUE pairs of the command line, checked against the bundle's configuration."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.errors import ConfigError

#: Configuration keys that have an option of their own.
OPTIONS = {
    "dataset_dir": "--data",
    "output_dir": "--output",
    "pretrained": "--pretrained",
    "resume": "--resume",
    "model": "--model",
    "support_dir": "--support",
}
#: Smallest values of settings that a training would only fail on later, or silently do something else.
_LEAST = {
    "image_size": 32,
    **dict.fromkeys(("batch_size", "accumulation_steps", "epochs", "val_interval"), 1),
    **dict.fromkeys(("patience", "num_workers", "seed", "warmup", "weight_decay", "power", "encoder_lr_scale"), 0),
}
_ABOVE_0 = ("lr", "ema")
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def config_path(name: str) -> Path:
    """Path of one of the bundle's configurations, such as ``train.json``."""
    return bundle_root() / "configs" / name


def overlay_names(kind: str) -> list[str]:
    """Names of the bundle's overlays; ``kind`` is ``network`` or ``task``."""
    return sorted(path.stem for path in config_path(kind).glob("*.json"))


def overlay_path(kind: str, name: str) -> Path:
    """Path of the overlay ``name``.

    Raises:
        ConfigError: there is none of this name; lists those there are.
    """
    names = overlay_names(kind)
    if name not in names:
        raise ConfigError(f"Found no {kind} {name!r}.{_close(name, names)} There are: {', '.join(names) or 'none'}.")
    return config_path(kind) / f"{name}.json"


def task_labels(task: str | None) -> dict[str, int] | None:
    """Class name -> index of a task's overlay; ``None`` without a task."""
    if task is None:
        return None
    return json.loads(overlay_path("task", task).read_text(encoding="utf-8")).get("labels")


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts.

    A value is a Python literal or ``true``, ``false``, ``null``; anything else is text. Nothing is ever evaluated:
    values that MONAI would run (``$…``) are refused.

    Raises:
        ConfigError: no ``=``, a key given twice or that has its own option, an expression.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("#", "::")
        if not equals or not key:
            raise ConfigError(f"Found {pair!r}; expected KEY=VALUE, such as epochs=20 or augmentation::camera=0.5.")
        if key in OPTIONS:
            raise ConfigError(f"{key} is set with {OPTIONS[key]}, not with KEY=VALUE.")
        if key in found:
            raise ConfigError(f"{key} is given twice; expected once.")
        found[key] = _value(text.strip())
        if any(one.startswith(("$", "%")) for one in texts_in(found[key])):
            raise ConfigError(
                f"{key}: found the expression {text!r}; expected a plain value. Expressions belong into a "
                "configuration file, run with python -m monai.bundle."
            )
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return list(value) if isinstance(value, tuple) else value  # configurations are JSON


def texts_in(value: Any) -> Iterable[str]:
    """All texts inside nested lists and dictionaries, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts_in(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from texts_in(inner)


def check_overrides(overrides: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a key that the configuration does not have and a value of another kind than its own.

    Returns:
        The overrides; whole numbers written as 1e3 or 64.0 as the integers that are expected.

    Raises:
        ConfigError: names close matches.
    """
    checked = {}
    for key, value in overrides.items():
        old: Any = config
        for depth, part in enumerate(parts := key.split("::")):
            known = list(
                map(str, old if isinstance(old, Mapping) else range(len(old)) if isinstance(old, list) else ())
            )
            arguments = depth > 0 and isinstance(old, Mapping) and "_target_" in old
            if part not in known and arguments:
                old = None  # an argument left at its default; the class itself knows it
                break
            if part not in known:
                here = "::".join(parts[:depth])
                raise ConfigError(
                    f"{key}: the configuration has no {part!r}{f' in {here}' if here else ''}."
                    f"{_close(part, known)}{'' if here else ' Settings: ' + ', '.join(_settings(config)) + '.'}"
                )
            old = old[int(part)] if isinstance(old, list) else old[part]
        _check_kind(key, value, old)
        whole = isinstance(old, int) and not isinstance(old, bool) and isinstance(value, float)
        checked[key] = int(value) if whole else value
    return checked


def check_labels(labels: Any) -> None:
    """Refuse labels that do not number all classes from the background on.

    Raises:
        ConfigError: not name -> index, or the indices are not 0 to K - 1, each once.
    """
    fits = isinstance(labels, Mapping) and all(type(index) is int for index in labels.values())
    if not fits or sorted(labels.values()) != list(range(len(labels))) or len(labels) < 2:
        raise ConfigError(
            f"labels: found {labels!r}; expected name and index of every class, background 0 and the others 1, 2, … "
            'without a gap, such as {"background": 0, "polyp": 1}.'
        )


def _check_kind(key: str, value: Any, old: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(old, bool):
        wrong = None if isinstance(value, bool) else "true or false"
    elif isinstance(old, int):
        wrong = None if number and value == int(value) else "a whole number"
    elif isinstance(old, float):
        wrong = None if number else "a number"
    elif isinstance(old, Mapping):
        wrong = None if isinstance(value, Mapping) else "a dictionary; single entries are set as KEY::NAME=VALUE"
    elif isinstance(old, list):
        wrong = None if isinstance(value, list) else f"a list, such as {old}"
    else:
        wrong = None
    least = _LEAST.get(key)
    if not wrong and number and least is not None and value < least:
        wrong = f"{least} or more"
    if not wrong and number and key in _ABOVE_0 and not (value > 0 and (key != "ema" or value < 1)):
        wrong = "a number above 0 and below 1" if key == "ema" else "a number above 0"
    if wrong:
        raise ConfigError(f"{key}: found {value!r}; expected {wrong}.")


def _settings(config: Mapping[str, Any]) -> list[str]:
    """Keys a user would set: plain values."""
    return [k for k, v in config.items() if k not in OPTIONS and isinstance(v, bool | int | float)]


def _close(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def device_setting(device: str) -> str:
    """Turn ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into what the configurations take.

    Raises:
        ConfigError: another text, or a device this machine does not have.
    """
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"device is {device!r}; expected cpu, cuda, cuda:N or mps.")
    import torch

    kind, _, index = device.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= count:
        raise ConfigError(f"device is {device!r}, but this machine has {count} of kind {kind}. Try --device cpu.")
    return f"$torch.device('{device}')"
