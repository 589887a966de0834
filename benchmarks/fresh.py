"""What the speed benchmark runs in a process of its own: one peak of memory, or one cold start.

``python benchmarks/fresh.py '{"what": "memory", ...}'`` prints one line of JSON. Nothing heavy is imported before it is
needed: the imports are a part of a cold start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Marks the line of the answer among what libraries print.
_MARK = "FRESH "


def ask(**question: Any) -> dict[str, Any]:
    """Run this file in a new interpreter.

    Args:
        **question: ``what`` (``memory`` or ``cold``) and what that function takes; plain values.

    Returns:
        Its answer, and ``seconds`` from the start of the process until the answer was there.

    Raises:
        RuntimeError: the process ended without an answer; with the last line it wrote.
    """
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, __file__, json.dumps(question)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        last = ""
        for line in process.stdout or ():
            if line.startswith(_MARK):
                answer = json.loads(line.removeprefix(_MARK))
                return {**answer, "seconds": time.perf_counter() - begin}
            last = line.strip() or last
    raise RuntimeError(f"process ended with {process.returncode}: {last}")


def exact_float32() -> None:
    """Keep float32 what it says on a GPU: torch's default lets convolutions, though no products, run in TF32.

    The peers' convolutions would, ours are products: then their outputs differ by more than a race allows.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def memory(
    kind: str, name: str, size: int, batch: int, precision: str, implementation: str = ""
) -> dict[str, float | str | None]:
    """Measure the peak memory of one pass of an encoder or of two steps of a training.

    Args:
        kind: ``encoder`` or ``training``.
        name: of the encoder, or of the entry of :data:`speed_training.TRAINED`.
        size: side of the images in pixels.
        batch: images at a time.
        precision: ``float32`` or ``bfloat16``.
        implementation: of the encoder.

    Returns:
        ``bytes``: on a GPU everything allocated, weights included; on a CPU resident memory above that after
        building. ``None`` where the system does not tell, and where the implementation is absent; then with ``note``.
    """
    from scoring import device

    exact_float32()
    if kind == "encoder":
        run = _encoder(name, implementation, size, batch, precision)
        if isinstance(run, str):
            return {"bytes": None, "note": run}
    else:
        from speed_training import TRAINED, images, step

        image, label = images(size, batch, device())
        trainee = TRAINED[name](image)
        optimizer = trainee.optimizer()

        def run() -> None:
            for _ in range(2):  # AdamW's moments exist from the second step on
                step(trainee, optimizer, label, precision)

    return {"bytes": peak_bytes(run, device().type)}


def _encoder(name: str, implementation: str, size: int, batch: int, precision: str) -> Callable[[], Any] | str:
    """Build one implementation; what a pass of it does, or why it is absent."""
    import torch
    from peers import build, random_encoder
    from scoring import device

    encoder = random_encoder(name, size)
    contenders, absent = build(encoder, device(), only=implementation)
    if not contenders:
        return absent[implementation]
    contender = contenders[0]
    encoder.to(device())
    x = contender.input(torch.rand(batch, 3, size, size).to(device()), encoder)
    del contenders
    if not contender.ours:
        del encoder
    return lambda: contender.encode(x, precision)


def peak_bytes(run: Callable[[], Any], device_type: str) -> float | None:
    """Run and return the peak of memory, see :func:`memory`."""
    import gc

    gc.collect()
    if device_type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())
    _return_free_pages()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, KeyError):
        return None


def _return_free_pages() -> None:
    """Give what building left behind back to the system; else it would hide a part of the peak."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _status(key: str) -> float:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return 1024.0 * int(line.split()[1])
    raise KeyError(key)


def cold(model: str, files: list[str]) -> dict[str, float]:
    """Import, load the shipped network, segment a first picture, started as ``hspsam segment`` is; seconds of each.

    Args:
        model: checkpoint.
        files: configurations that describe the network.
    """
    begin = time.perf_counter()
    from hspsam_monai.cli import prepare
    from hspsam_monai.cli.lean import import_monai

    prepare()
    import_monai()
    import torch
    from monai.bundle import ConfigParser

    from hspsam_monai.data import phantom
    from hspsam_monai.inference import ImageInferer
    from hspsam_monai.networks import load_checkpoint

    imported = time.perf_counter()
    exact_float32()
    parser = ConfigParser()
    parser.read_config(files)
    network = parser.get_parsed_content("network_def")
    load_checkpoint(network, model)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    loaded = time.perf_counter()
    image = torch.from_numpy(phantom(0, (480, 640))[0]).permute(2, 0, 1)[None] / 255
    inferer = ImageInferer(
        parser.get_parsed_content("image_size"), "float32", flips=True, scales=parser.get_parsed_content("scales")
    )
    with torch.inference_mode():
        inferer(image.to(device), network).argmax(1).to(torch.uint8).cpu()
    return {"import": imported - begin, "load": loaded - imported, "mask": time.perf_counter() - loaded}


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    function = {"memory": memory, "cold": cold}[question.pop("what")]
    print(_MARK + json.dumps(function(**question)), flush=True)
