"""Give a freshly built network its start: SAM's weights, or those of an earlier training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from hspsam_monai.encoders.catalogue import locate_verified
from hspsam_monai.encoders.state_files import read_state
from hspsam_monai.encoders.weights import OWN_PREFIX, KeyReport, load_encoder, load_encoder_of, load_network
from hspsam_monai.errors import WeightsError

logger = logging.getLogger(__name__)


def load_pretrained(network: nn.Module, source: str | Path | Sequence[str | Path] | None) -> KeyReport | None:
    """Load SAM's weights (a catalogue name or an official file) or a whole checkpoint of this network.

    Args:
        network: a network of :mod:`hspsam_monai.networks`.
        source: catalogue name such as ``mobile_sam``; path of an official SAM-style file, of whose parts the network
            takes what its paper keeps; path of a checkpoint of the same network; or ``None`` / empty for random
            weights. Or several of these, loaded in order: the first must give all the network needs, of the others
            only the encoder is taken, so they may be checkpoints of another network on the same encoder.

    Returns:
        The key report (of several sources the last), ``None`` if nothing was loaded.

    A context that a checkpoint of Proxy Prompt holds is left out: it belongs to that training's task and classes.

    Raises:
        WeightsError: the file is missing, altered or does not fit.
    """
    first, *others = [source] if source is None or isinstance(source, str | Path) else source or [None]
    report = _load_start(network, first)
    for other in filter(None, others):
        report = load_encoder_of(network.encoder, other)
        logger.info("Loaded the encoder of %s: %s.", Path(other).name, report.summary())
    return report


def _load_start(network: nn.Module, source: str | Path | None) -> KeyReport | None:
    if not source:
        logger.warning("No pretrained weights given: a new run starts from random values.")
        return None
    path = locate_verified(source)
    state = read_state(path)
    if any(key.startswith(OWN_PREFIX) for key in state):
        if hasattr(network, "no_context"):
            state |= network.no_context()
        report = _load_whole(network, path, state)
        logger.info("Loaded %s: %s.", path.name, report.summary())
        return report
    report = load_encoder(network.encoder, path, state=state)
    used = network.load_sam(state)
    logger.info("Loaded %s: encoder %s; and %d of SAM's own keys.", path.name, report.summary(), len(used))
    return report


def load_checkpoint(network: nn.Module, path: str | Path, context: bool = True) -> KeyReport:
    """Load a trained network for use: every key must be there, nothing else may be.

    Args:
        network: a network of :mod:`hspsam_monai.networks`.
        path: a ``model.pt``.
        context: also take the context that a Proxy Prompt was stored with; without, it may be of another number of
            classes, since the weights do not depend on it.

    Raises:
        WeightsError: the file is missing, unreadable or belongs to another network or configuration.
    """
    path = Path(path)
    if not path.is_file():
        train = " Proxy Prompt is trained with hspsam train --network proxy_prompt." * hasattr(network, "set_context")
        raise WeightsError(
            f"No model at {path}; expected the model.pt of a training run or of the bundle. Name it with model=PATH "
            f"(hspsam segment --model).{train}"
        )
    state = read_state(path)
    if not context and hasattr(network, "no_context"):
        state |= network.no_context()
    report = _load_whole(network, path, state)
    logger.info("Loaded %s: %s.", path, report.summary())
    return report


def _load_whole(network: nn.Module, path: Path, state: dict[str, Tensor]) -> KeyReport:
    """Load every key; networks with parts of variable size (a stored context) make room for the file's first."""
    if hasattr(network, "fit_state"):
        network.fit_state(state)
    return load_network(network, path, state=state)
