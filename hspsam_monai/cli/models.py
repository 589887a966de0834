"""Which model: a run's folder, a checkpoint file or the shipped one; with the configuration it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.cli.options import config_path, texts_in
from hspsam_monai.errors import ConfigError, WeightsError
from hspsam_monai.network_file import NETWORK_KEYS, OVERLAY

#: What runs did before these entries existed: four mirror images of the network's size, nothing was dropped.
_BEFORE = {"flips": True, "min_confidence": 0.0, "scales": [1]}
#: Shipped models: name -> file in the bundle's models, and the overlay of inference.json that describes its network.
#: MONAI Label takes every *.pt of the folder for a model of inference.json, so there may only be one.
SHIPPED: dict[str, tuple[str, str | None]] = {
    "hsp_sam": ("model.pt", None),
    "sam_sp": ("sam_sp.safetensors", "sam_sp.json"),
    "proxy_prompt": ("proxy_prompt.safetensors", "network/proxy_prompt.json"),
}
#: The one expression that an overlay of ours holds.
_HARMLESS = {"$len(@labels)"}


@dataclass(frozen=True)
class Model:
    """A checkpoint and the entries of the configuration that describe its network."""

    path: Path
    network: dict[str, Any]

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> index."""
        return self.network["labels"]


def shipped_model(name: str = "hsp_sam") -> Path:
    """Where the bundle's own model of a name of :data:`SHIPPED` is (or would be)."""
    return bundle_root() / "models" / SHIPPED[name][0]


def shipped_name(config: Mapping[str, Any]) -> str:
    """Which shipped model the network of a configuration, its ``network_def``, could start from."""
    kind = str(config["network_def"]["_target_"]).rpartition(".")[2]
    return {"ProxyPrompt": "proxy_prompt", "SAMSP": "sam_sp"}.get(kind, "hsp_sam")


def find_model(source: str | Path | None, supports: bool = False) -> Model:
    """Find a model and its configuration.

    Args:
        source: folder of a training run; a checkpoint, with the ``network.json`` beside it or else the shipped
            network's configuration; a name of :data:`SHIPPED`; ``None`` or ``shipped`` for the shipped model.
        supports: the model is to be prompted by supports: the shipped one is the Proxy Prompt.

    Raises:
        WeightsError: there is no such model.
        ConfigError: its ``network.json`` is not one a training writes, or its network takes no supports.
    """
    path = model_path(source, supports)
    name = next((name for name in SHIPPED if path.resolve() == shipped_model(name).resolve()), None)
    supports = supports or name == "proxy_prompt"
    overlay = path.parent / OVERLAY
    default = "proxy_prompt" if supports else "hsp_sam"
    network = read_overlay(overlay) if overlay.is_file() else _shipped_network(name or default)
    model = Model(path.resolve(), _BEFORE | network)
    if supports and not takes_supports(model.network):
        name = str(model.network["network_def"]["_target_"]).rpartition(".")[2]
        raise ConfigError(
            f"{path} is a model of {name}, which takes no supports; expected a Proxy Prompt. "
            "Leave --support out, or name a model trained with --network proxy_prompt."
        )
    return model


def takes_supports(config: Mapping[str, Any]) -> bool:
    """Whether the network of a configuration, its ``network_def``, is prompted by supports."""
    return str(config["network_def"]["_target_"]).endswith(".ProxyPrompt")


def model_path(source: str | Path | None, supports: bool = False) -> Path:
    """The checkpoint that :func:`find_model` would take; quick, since nothing heavy is imported.

    Raises:
        WeightsError: there is no such model.
    """
    if source is None or str(source) == "shipped":
        path = shipped_model("proxy_prompt" if supports else "hsp_sam")
    else:
        path = Path(source).expanduser()
        # Who names a model means the run's folder of that name where there is one.
        path = shipped_model(str(source)) if str(source) in SHIPPED and not path.exists() else path
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file() and supports and path == shipped_model("proxy_prompt"):
        raise WeightsError(
            f"No model at {path}: this copy ships no trained Proxy Prompt, the model that supports prompt. Train one, "
            "`hspsam train --data DATA --network proxy_prompt --output RUN` (with a few masks: and --task few_shot), "
            "and name it with --model RUN."
        )
    if not path.is_file():
        missing = path in map(shipped_model, SHIPPED)
        hint = "the shipped model is missing" if missing else f"a run's folder, its model.pt or {', '.join(SHIPPED)}"
        raise WeightsError(
            f"No model at {path}; expected {hint}. Name one with --model; `hspsam train` makes one, and a run writes "
            "model.pt after its first validation."
        )
    return path


def _shipped_network(name: str) -> dict[str, Any]:
    """Entries of the bundle's configuration that describe the network of one of its own models."""
    config: dict[str, Any] = {}
    for file in filter(None, ("inference.json", SHIPPED[name][1])):
        config |= json.loads(config_path(file).read_text(encoding="utf-8"))
    if name == "proxy_prompt":
        config["labels"] = {"background": 0, "object": 1}  # whatever the supports show
    return {key: config[key] for key in NETWORK_KEYS}


def read_overlay(path: Path) -> dict[str, Any]:
    """Read a run's ``network.json`` without trusting it: MONAI would run code that a stranger's file names.

    Raises:
        ConfigError: it is not JSON, has other keys, an expression, or builds anything but a known network.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: found {error}; expected the {OVERLAY} of a training run.") from error
    if not isinstance(config, dict) or not set(config) <= set(NETWORK_KEYS) or "network_def" not in config:
        raise ConfigError(f"{path}: found other entries than {', '.join(NETWORK_KEYS)}. It is no training run's.")
    refused = [t for t in texts_in(config) if t.startswith(("$", "%")) and t not in _HARMLESS]
    refused += [t for t in _targets(config) if not _is_network(t)]
    if refused:
        raise ConfigError(
            f"{path}: found {refused[0]!r}, which could run any code. If you wrote it, run it with "
            "python -m monai.bundle; else do not use this model."
        )
    return config


def _targets(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        own = [str(value["_target_"])] if "_target_" in value else []
        return own + [target for inner in value.values() for target in _targets(inner)]
    return [target for inner in value for target in _targets(inner)] if isinstance(value, list) else []


def _is_network(target: str) -> bool:
    # A dotted path may wander into any module that another one imports; a plain name of the room's list cannot.
    from hspsam_monai import networks

    room, _, name = target.rpartition(".")
    return room == "hspsam_monai.networks" and name in networks.__all__
