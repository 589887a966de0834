"""``hspsam doctor``: what is installed, which device, what would fail and what to do about it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table
from rich.text import Text

import hspsam_monai
from hspsam_monai.cli.console import explain, out, say

#: Package -> module that must be importable.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "monai": "monai",
    "numpy": "numpy",
    "segment-anything": "segment_anything",
    "kornia": "kornia",
    "pytorch-ignite": "ignite",
    "pillow": "PIL",
    "nibabel": "nibabel",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "tensorboard": "tensorboard",
    "tifffile": "tifffile",
}
#: Extra of pyproject.toml -> modules, and what is missing without them.
EXTRAS = {
    "export": (("onnx", "onnxscript", "onnxruntime"), "export to ONNX"),
}
_GIB = 1 << 30
_MIN_MEMORY = 3  # GiB: what a training at 256 pixels takes on a CPU
_MIN_DISK = 1


@dataclass(frozen=True)
class Line:
    """One thing looked at.

    Args:
        what: its name.
        found: what was found.
        level: ``ok``, ``note`` (works, with less) or ``broken`` (essential).
        mend: what to do.
    """

    what: str
    found: str
    level: str = "ok"
    mend: str = ""


def doctor() -> bool:
    """Look at everything, print it, and say whether the essential parts work."""
    lines: list[Line] = []
    for look in (_python, _packages, _device, _machine, _bundle, _weights, _model, _extras):
        lines += _guarded(look)
    marks = {"ok": ("✓", "green"), "note": ("!", "yellow"), "broken": ("✗", "bold red")}
    table = Table("", "what", "found", show_edge=False, box=None, padding=(0, 1))
    for line in lines:
        mark, style = marks[line.level]
        table.add_row(Text(mark, style), line.what, Text(line.found, style if line.level != "ok" else ""))
    out.print(table)
    for line in lines:
        if line.mend:
            say(f"{marks[line.level][0]} {line.what}: {line.mend}", marks[line.level][1])
    broken = [line.what for line in lines if line.level == "broken"]
    say(f"Broken: {', '.join(broken)}." if broken else "Everything essential works.", "bold red" if broken else "green")
    return not broken


def _guarded(look: Callable[[], Iterator[Line]]) -> list[Line]:
    """A look that fails is itself a finding; the others go on."""
    lines: list[Line] = []
    try:
        lines.extend(look())
    except Exception as error:
        plain = explain(error)
        text = plain[0] if plain else f"{type(error).__name__}: {error}"
        lines.append(Line(look.__name__.strip("_"), text, "broken", "Mend this first; then run doctor again."))
    return lines


def _python() -> Iterator[Line]:
    new = sys.version_info >= (3, 11)
    yield Line(
        "python", platform.python_version(), "ok" if new else "broken", "" if new else "Use Python 3.11 or newer."
    )
    yield Line("hspsam_monai", hspsam_monai.__version__)


def _packages() -> Iterator[Line]:
    for package, module in NEEDED.items():
        try:
            importlib.import_module(module)
            yield Line(package, version(package))
        except PackageNotFoundError:
            yield Line(package, "installed, version unknown")
        except Exception as error:  # a broken binary wheel can raise anything
            mend = f"Install it: pip install '{package}', or `make setup` in the source folder."
            yield Line(package, f"cannot be imported: {error}", "broken", mend)


def _device() -> Iterator[Line]:
    import torch

    from hspsam_monai.inference import autocast_dtype

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        free, total = torch.cuda.mem_get_info()
        yield Line("device", f"cuda: {', '.join(names)}; {free / _GIB:.0f} of {total / _GIB:.0f} GiB free")
        device = torch.device("cuda")
    else:
        why = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device or driver"
        yield Line("device", f"cpu ({why})")
        device = torch.device("cpu")
    low = autocast_dtype(device, "auto") is not None
    yield Line(
        "precision",
        "float32 for masks; training in bfloat16 (the device computes in it)"
        if low
        else "float32 (the device has no native bfloat16; float16 is never used, SAM turns to NaN in it)",
    )
    layer = torch.nn.Conv2d(3, 8, 3, device=device)
    total = layer(torch.ones(1, 3, 32, 32, device=device)).sum()
    total.backward()
    works = bool(torch.isfinite(total)) and layer.weight.grad is not None
    yield Line("computing", "a convolution and its gradient" if works else "not finite", "ok" if works else "broken")


def _machine() -> Iterator[Line]:
    import torch

    policy = os.environ.get("OMP_WAIT_POLICY", "not set").lower()
    spin = os.environ.get("GOMP_SPINCOUNT")
    policy += f" after {spin} rounds" if spin else ""
    yield Line("cores", f"{os.cpu_count()}; {torch.get_num_threads()} threads, waiting threads {policy}")
    memory = available_memory()
    if memory is not None:
        low = memory < _MIN_MEMORY * _GIB
        mend = "Close other programs, or train with batch_size=2 image_size=192." if low else ""
        yield Line("memory free", f"{memory / _GIB:.1f} GiB", "note" if low else "ok", mend)
    disk = shutil.disk_usage(Path.cwd()).free
    low = disk < _MIN_DISK * _GIB
    yield Line("disk free here", f"{disk / _GIB:.1f} GiB", "note" if low else "ok", "Free some space." if low else "")
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    yield Line("temporary files", tempfile.gettempdir())


def available_memory() -> int | None:
    """Bytes this process can still take: the machine's free memory or the container's limit; None if unknown."""
    free: list[int] = []
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free.append(int(rows["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        free.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no container, or no limit ("max")
    return min(free)


def _bundle() -> Iterator[Line]:
    from hspsam_monai.bundle_path import bundle_root
    from hspsam_monai.cli.options import overlay_names

    root = bundle_root()
    for name in ("train", "evaluate", "inference", "metadata"):
        json.loads((root / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    yield Line("bundle", str(root))
    yield Line("networks", ", ".join(overlay_names("network")))
    yield Line("tasks", ", ".join(overlay_names("task")))


def _weights() -> Iterator[Line]:
    from hspsam_monai.encoders.catalogue import CATALOGUE, locate, verify
    from hspsam_monai.errors import WeightsError

    found = 0
    for name in CATALOGUE:
        try:
            path = locate(name)
        except WeightsError:
            continue
        found += 1
        try:
            state = "verified" if verify(name).verified else "no official hash is known"
            yield Line(f"weights {name}", f"{path}, {state}")
        except WeightsError as error:
            yield Line(f"weights {name}", str(error), "note", f"Delete it; `hspsam weights fetch {name}`.")
    if not found:
        mend = "To train from SAM's weights: `hspsam weights fetch mobile_sam`. Segmenting needs none."
        yield Line("weights", "none found", "note", mend)


def _model() -> Iterator[Line]:
    from hspsam_monai.cli.models import find_model, shipped_model

    path = shipped_model()
    if not path.is_file():
        mend = "`hspsam segment` and `evaluate` need --model; the demo starts from SAM's weights or random ones."
        yield Line("shipped model", f"not at {path}", "note", mend)
        return
    from monai.bundle import ConfigParser

    from hspsam_monai.networks import load_checkpoint

    model = find_model(None)
    parser = ConfigParser(dict(model.network))
    report = load_checkpoint(parser.get_parsed_content("network_def"), path)
    classes = ", ".join(model.labels)
    yield Line("shipped model", f"{report.summary()}; {model.network['image_size']} pixels; classes {classes}")


def _extras() -> Iterator[Line]:
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            mend = f"For {purpose}: pip install 'hspsam_monai[{extra}]'."
            yield Line(f"extra {extra}", f"without {', '.join(missing)}", "note", mend)
        else:
            yield Line(f"extra {extra}", ", ".join(modules))
    sam2 = find_spec("transformers") is not None
    yield Line("transformers", version("transformers") if sam2 else "not installed")
