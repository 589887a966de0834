"""Pretrained weights and checkpoints: one catalogue, one safe loader, one writer.

Nothing else touches such files. They are read without running anything they contain, matched key by key, and
written whole or not at all.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hspsam_monai.encoders.base import Encoder
from hspsam_monai.errors import WeightsError
from hspsam_monai.files import atomic_write

#: Environment variable naming the folder in which weights are looked for first.
FOLDER_VARIABLE = "HSPSAM_WEIGHTS"
_CHUNK = 1 << 20
_WRAPPERS = ("model", "state_dict", "network", "model_state_dict")  # where training scripts put the weights
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_SHOWN = 8  # keys named in an error
#: Under this name every network of ours keeps its encoder; SAM's files have "image_encoder." or nothing.
OWN_PREFIX = "encoder."


@dataclass(frozen=True)
class WeightFile:
    """One official weight file.

    ``sha256`` is ``None`` where no hash is publicly established: such a file cannot be verified, and is
    fetched only with a hash given by the user. ``encoder`` is the name under which ``build_encoder`` makes
    its encoder.
    """

    name: str
    file_name: str
    sha256: str | None
    licence: str
    url: str
    encoder: str


_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_SAM_FILES = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
_FILES = [
    *(WeightFile(f[:9], f, sha, "Apache-2.0", _SAM_URL + f, f[:9]) for f, sha in _SAM_FILES.items()),
    WeightFile(
        name="medsam",
        file_name="medsam_vit_b.pth",
        sha256=None,  # Zenodo publishes an md5 only, which proves nothing against intent
        licence="Apache-2.0 (code; the Zenodo record of the weights is reported as CC-BY-4.0)",
        url="https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
        encoder="sam_vit_b",
    ),
    WeightFile(
        name="mobile_sam",
        file_name="mobile_sam.pt",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        licence="Apache-2.0",
        url="https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        encoder="mobile_sam",
    ),
    WeightFile(
        name="lite_medsam",
        file_name="lite_medsam.pth",
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        licence="Apache-2.0",
        url="https://drive.google.com/uc?export=download&id=18Zed-TUTsmr2zc5CHUWd5Tu13nb6vq6z",
        encoder="lite_medsam",
    ),
]
#: All known files by name.
CATALOGUE: dict[str, WeightFile] = {entry.name: entry for entry in _FILES}


def search_folders() -> list[Path]:
    """List the folders in which weights are looked for: ``$HSPSAM_WEIGHTS`` if set, then the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hspsam"
    named = os.environ.get(FOLDER_VARIABLE)
    return [Path(named).expanduser(), cache] if named else [cache]


def locate(name_or_path: str | Path) -> Path:
    """Find a weight file: as a path, then by its catalogue or file name in :func:`search_folders`.

    Raises:
        WeightsError: there is no such file; says where it was looked for and how to get it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    entry = _entry(name_or_path)
    if entry is None:
        raise WeightsError(
            f"No weights found: {str(name_or_path)!r} is neither a file nor one of {', '.join(CATALOGUE)}."
        )
    places = [folder / entry.file_name for folder in search_folders()]
    for place in places:
        if place.is_file():
            return place
    raise WeightsError(
        f"Weights {entry.name!r} not found; looked for {', '.join(map(str, places))}. Run "
        f"`hspsam weights fetch {entry.name}`, or download {entry.url} and set ${FOLDER_VARIABLE} to its "
        "folder."
    )


def _entry(name_or_path: str | Path) -> WeightFile | None:
    """Find the catalogue entry by its name or by its bare file name."""
    return next((e for e in CATALOGUE.values() if str(name_or_path) in (e.name, e.file_name)), None)


class Verification(NamedTuple):
    """What :func:`verify` found; ``verified`` is ``False`` where no hash was known to compare with."""

    path: Path
    sha256: str
    verified: bool


def verify(name_or_path: str | Path, sha256: str | None = None) -> Verification:
    """Compare a file's sha256 with ``sha256``, or else with the catalogue's.

    Raises:
        WeightsError: the file is missing or unreadable, or the hash differs.
    """
    path = locate(name_or_path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}.") from error
    found = digest.hexdigest()
    entry = _entry(name_or_path) or _entry(path.name)
    # A renamed official file is still recognised by what it holds.
    entry = entry or next((known for known in CATALOGUE.values() if known.sha256 == found), None)
    expected = sha256.lower() if sha256 else entry.sha256 if entry else None
    if expected is not None and expected != found:
        raise WeightsError(_wrong_hash(str(path), found, expected) + " Delete it and fetch it again.")
    return Verification(path, found, expected is not None)


def _wrong_hash(what: str, found: str, expected: str) -> str:
    return f"{what} has sha256 {found}, expected {expected}: damaged, changed, or another file of that name."


def fetch(
    name: str,
    folder: str | Path | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    sha256: str | None = None,
) -> Path:
    """Download an official file; only ever called because the user asked for it.

    Args:
        name: catalogue name.
        folder: where to put it; by default the first of :func:`search_folders`.
        progress: called with (bytes so far, total bytes or ``None``).
        sha256: hash to demand where the catalogue has none; where it has one, the two must agree.

    Returns:
        Its path. A file already there is verified and not downloaded again.

    Raises:
        WeightsError: unknown name, no hash to check against, no connection, wrong hash, folder not writable.
            Nothing is left behind.
    """
    entry = _entry(name)
    if entry is None:
        raise WeightsError(f"{name!r} is not in the catalogue; it has {', '.join(CATALOGUE)}.")
    if sha256 and entry.sha256 and sha256.lower() != entry.sha256:
        raise WeightsError(
            f"The catalogue knows {entry.file_name} by sha256 {entry.sha256}, not {sha256.lower()}; leave --sha256 out."
        )
    expected = (entry.sha256 or sha256 or "").lower()
    if not expected:
        raise WeightsError(
            f"No sha256 is known for {entry.file_name}, so a download cannot be checked. Give the one you "
            f"trust with --sha256, or download {entry.url} yourself."
        )
    target = (Path(folder).expanduser() if folder is not None else search_folders()[0]) / entry.file_name
    if target.is_file():
        return verify(target, expected).path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            found = _download(entry.url, temporary, progress)
            if found != expected:
                raise WeightsError(_wrong_hash(f"What {entry.url} sent", found, expected) + " It was not kept.")
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{entry.file_name} could not be fetched from {entry.url}: {error}. Try again, or download it "
            f"elsewhere and put it into {target.parent}."
        ) from error
    return target


def _download(url: str, path: Path, progress: Callable[[int, int | None], None] | None) -> str:
    """Stream ``url`` into ``path`` and return the sha256 of what came."""
    digest, done = hashlib.sha256(), 0
    # Catalogue addresses are https; the hash, not the channel, decides whether the file is kept.
    with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:  # noqa: S310
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    if total is not None and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
    return digest.hexdigest()


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


def locate_verified(source: str | Path) -> Path:
    """Find a file as :func:`locate` does; what is asked for by its catalogue name must have the right hash.

    Raises:
        WeightsError: not found, or wrong hash.
    """
    by_name = _entry(source) is not None and not Path(source).is_file()
    return verify(source).path if by_name else locate(source)


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
