"""Atomic writing: whole or not at all, whatever happens in between."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hspsam_monai.files import atomic_write


@pytest.fixture
def umask():
    """A umask that differs from both 0600 and the usual 0644."""
    old = os.umask(0o027)
    yield
    os.umask(old)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_writes_and_replaces(tmp_path):
    target = tmp_path / "a.txt"
    for text in ("one", "two"):
        with atomic_write(target) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text(text)
        assert target.read_text() == text
    assert leftovers(tmp_path) == ["a.txt"]


def test_long_names_fit_and_errors_name_what_was_asked_for(tmp_path):
    name = "n" * 240 + ".png"
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("done")
    assert leftovers(tmp_path) == [name]
    (tmp_path / "a.png").mkdir()
    for target in (tmp_path / "a.png", tmp_path / "none" / "a.png"):
        with pytest.raises(OSError) as caught, atomic_write(target) as temporary:
            temporary.write_text("done")
        assert caught.value.filename == str(target)
    assert leftovers(tmp_path) == ["a.png", name]


def test_files_are_flushed_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """Windows refuses to flush any other."""
    seen = []
    real = os.fsync

    def flush(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            seen.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        real(descriptor)

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(os, "fsync", flush)
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("done")
    assert seen == [os.O_RDWR]


@pytest.mark.parametrize("name", ["scan.nii.gz", "model.safetensors", "plain", ".hidden.json"])
def test_temporary_name_keeps_the_suffixes(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        assert temporary.suffixes == Path(name.lstrip(".")).suffixes
        assert temporary.name.startswith(".")
    assert leftovers(tmp_path) == [name]


def test_failure_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_the_end_keeps_the_old_file(tmp_path, monkeypatch, step):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    target = tmp_path / "a.txt"
    target.write_text("old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"), atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == ["a.txt"]


def test_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a.txt"):
        pass


def test_mode_follows_the_umask_and_a_replaced_file_keeps_its_own(tmp_path, umask):
    target = tmp_path / "a.txt"
    with atomic_write(target):
        pass
    assert target.stat().st_mode & 0o777 == 0o640
    target.chmod(0o664)
    with atomic_write(target):
        pass
    assert target.stat().st_mode & 0o777 == 0o664


def test_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_killed_writer_leaves_a_whole_file(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"\0" * 1_000_000)
    code = (
        "import sys, itertools; from hspsam_monai.files import atomic_write\n"
        "for n in itertools.count(1):\n"
        "    with atomic_write(sys.argv[1]) as t: t.write_bytes(bytes([n % 256]) * 1_000_000)\n"
        "    if n == 1: sys.stdout.write('x'); sys.stdout.flush()\n"
    )
    for wait in (0.0, 0.003, 0.011):
        process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
        process.stdout.read(1)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        content = target.read_bytes()
        assert len(content) == 1_000_000 and len(set(content)) == 1
