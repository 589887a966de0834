"""A wheel carries the whole bundle, and what it is told to carry can be carried; make needs nothing but Python."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_takes_every_file_of_the_bundle_to_its_place():
    data_files = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "data-files"
    ]
    taken = {}
    for folder, patterns in data_files.items():
        for pattern in patterns:
            found = list(ROOT.glob(pattern))
            assert found, f"{pattern} matches nothing"
            for path in found:
                # setuptools refuses a folder among the files, and then there is no wheel at all.
                assert path.is_file(), f"{pattern} matches {path.relative_to(ROOT)}, which is not a file"
                taken[path] = PurePosixPath(folder) / path.name
    wanted = {p for p in (ROOT / "bundle").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    if (ROOT / ".git").exists():  # TensorRT and servers leave files there that are none of the bundle's
        listed = subprocess.run(["git", "ls-files", "bundle"], cwd=ROOT, capture_output=True, text=True, check=True)
        own = {ROOT / line for line in listed.stdout.splitlines()}
        wanted, taken = wanted & own, {path: place for path, place in taken.items() if path in own}
    assert set(taken) == wanted
    for path, place in taken.items():
        assert place == "share/hspsam_monai" / PurePosixPath(path.relative_to(ROOT).as_posix())


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", ["setup", "constraints"])
def test_make_installs_the_tools_it_calls(target, tmp_path):
    """Without a .venv, everything but the system's own is called from the one that is made first."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    # What a `make test` around this one has set is not for the inner one.
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON"}}
    done = subprocess.run(
        ["make", "-n", target], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    commands = [line.split()[0] for line in done.stdout.replace("\\\n", " ").splitlines()]
    assert commands[:2] == ["python3", ".venv/bin/python"] and ".venv/bin/uv" in commands[2:]
    assert set(commands) <= {"python3", "touch", ".venv/bin/python", ".venv/bin/uv"}
