"""Official weight files: which there are, where they are, whether they are what they should be, fetching them."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hspsam_monai.errors import WeightsError
from hspsam_monai.files import atomic_write

#: Environment variable naming the folder in which weights are looked for first.
FOLDER_VARIABLE = "HSPSAM_WEIGHTS"
_CHUNK = 1 << 20


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


def locate_verified(source: str | Path) -> Path:
    """Find a file as :func:`locate` does; what is asked for by its catalogue name must have the right hash.

    Raises:
        WeightsError: not found, or wrong hash.
    """
    by_name = _entry(source) is not None and not Path(source).is_file()
    return verify(source).path if by_name else locate(source)


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
