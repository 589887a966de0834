"""A wheel carries the whole bundle, and what it is told to carry can be carried."""

import tomllib
from pathlib import Path, PurePosixPath

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
    assert set(taken) == wanted
    for path, place in taken.items():
        assert place == "share/hspsam_monai" / PurePosixPath(path.relative_to(ROOT).as_posix())
