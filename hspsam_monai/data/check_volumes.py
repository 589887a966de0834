"""NIfTI headers of one case: readable, one grid, one place in the patient."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from hspsam_monai.data.decode import FileFault


def check_volume_case(image: Path, labels: list[Path], tolerance: float) -> list[FileFault]:
    """Compare the headers of a volume and its labels; voxels are not read.

    Args:
        image: NIfTI volume.
        labels: its NIfTI labels, possibly none.
        tolerance: largest accepted difference of an affine's entry, in mm (or mm per voxel).

    Returns:
        The faults, none if all is well.
    """
    faults: list[FileFault] = []
    reference = _header(image, faults)
    for label in labels:
        header = _header(label, faults)
        if header is None or reference is None:
            continue
        if header[0] != reference[0]:
            faults.append(
                FileFault(
                    label,
                    "size_mismatch",
                    f"shape {header[0]}",
                    f"{reference[0]} as its image",
                    "Resample it.",
                )
            )
        elif not np.allclose(header[1], reference[1], rtol=0, atol=tolerance):
            worst = float(np.abs(header[1] - reference[1]).max())
            faults.append(
                FileFault(
                    label,
                    "affine_mismatch",
                    f"an affine that differs by up to {worst:.4g}",
                    f"that of its image within {tolerance:g}",
                    "The label lies elsewhere in the patient: resample it, or correct its affine.",
                )
            )
    return faults


def _header(path: Path, faults: list[FileFault]) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Shape and affine of a NIfTI file; None after noting a fault."""
    try:
        if not path.is_file():
            raise FileFault(path, "missing", "no such file", "a NIfTI volume", "Copy the data set again.")
        if path.stat().st_size == 0:
            raise FileFault(path, "zero_bytes", "an empty file (zero bytes)", "a NIfTI volume", "Copy it again.")
        image = nib.load(path)
        shape, affine = tuple(int(n) for n in image.shape), np.asarray(image.affine, dtype=np.float64)
        if not np.isfinite(affine).all():
            raise FileFault(path, "nan", "an affine that is not finite", "a position in mm", "Mend the header.")
    except FileFault as fault:
        faults.append(fault)
        return None
    except Exception as error:  # nibabel raises ImageFileError, HeaderDataError, EOFError, OSError, zlib.error …
        found = f"a header that cannot be read ({type(error).__name__}: {error})"
        faults.append(FileFault(path, "unreadable", found, "a NIfTI volume", "Copy or convert it again."))
        return None
    return shape, affine
