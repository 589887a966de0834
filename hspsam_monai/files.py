"""Writing files whole or not at all: the one atomic writer behind every checkpoint, mask and table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: ``errors`` for texts that hold file names: one that is no UTF-8 (an old archive's) must not cost the whole table.
NAMES = "backslashreplace"

_STEM = 40  # characters of a name that its temporary file shows; the whole could be too long with what is added


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``; when the block ends well it becomes ``path`` in one step.

    A reader (or a crash, or a kill) sees the old file or the new one, never a part. The temporary file is
    hidden and keeps all suffixes of ``path``, since writers such as nibabel choose their format by them.

    Args:
        path: the file to create or replace. Its folder must exist. A link is followed: the file behind it is
            replaced and the link stays.

    Yields:
        An existing empty file in the same folder, to be overwritten by name.

    Raises:
        OSError: the folder is missing or read-only, or the disk is full; it names ``path``, not the temporary file.
            Whatever the block raises passes through. In every case the temporary file is gone and the old file is as it
            was.

    Example:
        >>> with atomic_write("note.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("done")

    """
    target = Path(path).resolve()
    # The temporary file lives beside the target: a rename is atomic only within one file system.
    stem, dot, suffixes = target.name.lstrip(".").partition(".")
    name = ""
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".tmp-{stem[:_STEM]}-", suffix=dot + suffixes)
        os.close(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        # mkstemp makes files 0600; a replaced file keeps its mode, a new one gets what the umask allows.
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        if error.filename in (name, temporary):
            error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2
        raise
    finally:
        temporary.unlink(missing_ok=True)  # already renamed where all went well
    _sync(target.parent)  # makes the rename itself survive a power cut


def _umask() -> int:
    # The umask can only be read by setting it; Linux also tells it without that race between threads.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), 8)
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0o022)
        os.umask(mask)
        return mask


def _sync(path: Path) -> None:
    try:
        # Windows flushes only what is open for writing; folders open for nothing but reading anywhere.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        if path.is_dir():  # Windows does not open folders; the file itself must be synced everywhere
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems refuse to sync a folder
            raise
    finally:
        os.close(descriptor)
