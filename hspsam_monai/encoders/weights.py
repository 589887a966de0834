"""Pretrained weights into encoders and networks, matched key by key, with a report of every key."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from hspsam_monai.encoders.base import Encoder
from hspsam_monai.encoders.catalogue import locate_verified
from hspsam_monai.encoders.state_files import read_state
from hspsam_monai.errors import WeightsError

#: Under this name every network of ours keeps its encoder; SAM's files have "image_encoder." or nothing.
OWN_PREFIX = "encoder."
_SHOWN = 8  # keys named in an error


@dataclass(frozen=True)
class KeyReport:
    """What became of every key when a state was loaded.

    Attributes:
        loaded: keys whose values are now in the module.
        missing: keys of the module that the file does not have; they keep their values; updates of LoRA become zero.
        unexpected: keys of the file that the module does not have.
        resized: keys resampled to the module's input size, with their shape in the file and in the module.
        ignored: keys of the file that belong to other parts (prompt encoder, mask decoder).
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def summary(self) -> str:
        """Tell it in one line, for a log."""
        counts = {name: len(getattr(self, name)) for name in ("resized", "missing", "unexpected", "ignored")}
        return ", ".join([f"{len(self.loaded)} loaded", *(f"{n} {name}" for name, n in counts.items() if n)])


def load_encoder(
    encoder: Encoder, source: str | Path, *, strict: bool = True, state: dict[str, Tensor] | None = None
) -> KeyReport:
    """Load official weights, or the encoder part of a checkpoint, into an encoder.

    Args:
        encoder: any :class:`Encoder`; its ``official_state`` adapts names and sizes.
        source: a path, or a catalogue name (then the file's hash must be right).
        strict: refuse missing and unexpected keys of the encoder. A file without any LoRA parameter is accepted:
            official files have none, and the updates become the identity.
        state: what was read from ``source`` already.

    Raises:
        WeightsError: not found, wrong hash, unreadable, or keys or shapes that do not match.
    """
    path = locate_verified(source)
    state = read_state(path) if state is None else state
    prefix, ignored = encoder.checkpoint_prefix, ()
    if any(key.startswith(prefix) for key in state):
        ignored = tuple(key for key in state if not key.startswith(prefix))
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    adapted = encoder.official_state(state)
    resized = {
        key: (tuple(state[key].shape), tuple(value.shape))
        for key, value in adapted.items()
        if key in state and state[key].shape != value.shape
    }
    return _load(encoder, adapted, path, strict, KeyReport(resized=resized, ignored=ignored))


def load_encoder_of(encoder: Encoder, source: str | Path) -> KeyReport:
    """Load the encoder of a checkpoint of any of our networks, or official weights, into an encoder.

    Args:
        encoder: of the kind and input size that the checkpoint's has.
        source: as in :func:`load_encoder`. A network that does not use SAM's neck has none: where only the checkpoint
            lacks it the encoder keeps its own, which the report counts as missing; where only the encoder does, the
            checkpoint's is ignored. LoRA's updates fit an encoder with LoRA of the same rank.

    Raises:
        WeightsError: as in :func:`load_encoder`; or LoRA of another rank than the encoder's, or of an encoder without.
    """
    path = locate_verified(source)
    state = read_state(path)
    own = {key.removeprefix(OWN_PREFIX): value for key, value in state.items() if key.startswith(OWN_PREFIX)}
    if not own:
        return load_encoder(encoder, path, state=state)
    known = encoder.state_dict()
    unused = [key for key in own if key.startswith("neck.") and key not in known]
    ignored = (*(key for key in state if not key.startswith(OWN_PREFIX)), *(OWN_PREFIX + key for key in unused))
    own = {key: value for key, value in own.items() if key not in unused}
    theirs, ours = (
        {len(value) for key, value in each.items() if "lora_a" in key} for each in (own, known)
    )  # the ranks
    if theirs and theirs != ours:
        rank = max(theirs)
        raise WeightsError(
            f"The encoder of {path} was adapted by LoRA of rank {rank}; expected "
            f"{f'rank {max(ours)}' if ours else 'one without LoRA'}, as the network's own. Set network_def::adapt=lora "
            f"network_def::lora_rank={rank}, or start from a training with adapt=full."
        )
    kept = {k: v for k, v in known.items() if k.startswith("neck.") and k not in own}
    report = _load(encoder, own | kept, path, True, KeyReport(ignored=ignored))
    loaded = tuple(key for key in report.loaded if key not in kept)
    return replace(report, loaded=loaded, missing=(*report.missing, *kept))


def load_network(
    network: nn.Module, path: str | Path, *, strict: bool = True, state: dict[str, Tensor] | None = None
) -> KeyReport:
    """Load a whole network's checkpoint; values are cast to the parameters' type.

    Args:
        network: what to load into.
        path: the file.
        strict: as in :func:`load_encoder`.
        state: what was read from ``path`` already.

    Raises:
        WeightsError: unreadable, or keys or shapes that do not match.
    """
    return _load(network, read_state(path) if state is None else state, Path(path), strict, KeyReport())


def _load(module: nn.Module, state: dict[str, Tensor], path: Path, strict: bool, report: KeyReport) -> KeyReport:
    """Match ``state`` with the module, load it, and complete the report; on an error nothing is loaded."""
    own = module.state_dict()
    missing = tuple(key for key in own if key not in state)
    unexpected = tuple(key for key in state if key not in own)
    common = {key: value for key, value in state.items() if key in own}
    wrong = [key for key, value in common.items() if value.shape != own[key].shape]
    if wrong:
        key = wrong[0]
        raise WeightsError(
            f"{path} does not fit {type(module).__name__}: {key} has shape {tuple(common[key].shape)} in "
            f"the file and {tuple(own[key].shape)} in the network ({len(wrong)} such keys). Is it another "
            "variant or image size?"
        )
    needed = [key for key in missing if "lora_" not in key or any("lora_" in given for given in state)]
    if strict and needed:
        raise WeightsError(f"{path} lacks {_listing(needed)} that {type(module).__name__} needs.")
    if strict and unexpected:
        raise WeightsError(f"{path} has {_listing(unexpected)} that {type(module).__name__} does not know.")
    if not common:
        raise WeightsError(f"{path} has no key in common with {type(module).__name__}.")
    module.load_state_dict(common, strict=False)
    for key in missing:
        if "lora_b" in key:  # no update: what was trained before may not act on other weights
            own[key].zero_()
    return replace(report, loaded=tuple(common), missing=missing, unexpected=unexpected)


def _listing(keys: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{len(keys)} keys ({', '.join(keys[:_SHOWN])}{more})"
