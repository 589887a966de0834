"""R4, R7: what the prompt-free path adds to its encoder; one warm image and a cold start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from fresh import ask
from parts import Case, Part, Row, Settings, encoder_flops, failed, footer, load, shipped, shipped_files
from PIL import Image
from results import markdown_table
from scoring import load_network, mirror_inferer
from timing import Timing, interleave, milliseconds, verdict
from torch import Tensor, nn

from hspsam_monai.data import phantom
from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks import HSPSAM

#: The whole path over its encoder, at sizes from :data:`OVERHEAD_FROM` on.
OVERHEAD_AIM, OVERHEAD_FROM = 1.10, 512
#: Seconds from the start of the interpreter to the first mask.
COLD_AIM = 12.0
#: Stored size (H, W) of the picture of the latency rows.
PICTURE = (480, 640)
SHIPPED = "shipped model"
COLD, COMMAND = "cold start", "hspsam segment, one picture"


def networks(settings: Settings) -> dict[str, Callable[[int], nn.Module]]:
    """Name -> how to build that network for a size; the shipped one runs at any size."""
    name = settings.network_encoder
    found: dict[str, Callable[[int], nn.Module]] = {}
    if shipped(settings) is not None:
        found[SHIPPED] = lambda _: load_network(shipped(settings), shipped_files(settings))[0]
    for decoder in ("slim", "paper"):
        found[f"{name}, {decoder} decoder"] = partial(_random_network, name, decoder, settings.device)
    return found


def _random_network(encoder: str, decoder: str, device: torch.device, size: int) -> nn.Module:
    torch.manual_seed(0)
    return HSPSAM(encoder, image_size=size, decoder=decoder, adapt="full").to(device).eval()


def overhead(name: str, size: int, precision: str, settings: Settings) -> list[Row]:
    """Interleave the encoder alone, the encoder with its prompts, and the whole network on one image."""
    network = networks(settings)[name](size)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3)).to(settings.device)
    runs = {
        "encoder": lambda: network.encoder(image),
        "prompted": lambda: network.encoder(image, network.prompter.encoder_prompts()),
        "whole": lambda: network(image),
    }
    lower = precision == "bfloat16"

    def wrapped(run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.autocast(image.device.type, torch.bfloat16) if lower else nullcontext():
                return run()

        return call

    with torch.inference_mode():
        times = interleave(
            {key: wrapped(run) for key, run in runs.items()}, settings.device, settings.seconds,
            least=settings.least, most=settings.most, warm=max(1, settings.warm),
        )  # fmt: skip
    return [{"name": name, "size": size, "precision": precision, "times": times, "load": load()}]


def overhead_cases(settings: Settings) -> list[Case]:
    """List networks, sizes and precisions."""
    return [
        Case(
            f"prompt-free path of {name}, {size} px, {precision}",
            settings.cost(encoder_flops("mobile_sam" if name == SHIPPED else settings.network_encoder, size), 3),
            partial(overhead, name, size, precision, settings),
        )
        for name in networks(settings)
        for size in settings.sizes
        for precision in settings.network_precisions()
    ]


def overhead_ratio(times: dict[str, Timing], part: str = "whole") -> float:
    """Median over rounds of a part's time over the encoder's of the same round: both saw the same moment."""
    pairs = zip(times[part].seconds, times["encoder"].seconds, strict=True)
    return float(np.median([a / b for a, b in pairs]))


def overhead_report(rows: Sequence[Row], settings: Settings) -> str:
    """Write the ratios beside the aim."""
    lines = []
    for row in rows:
        times, whole = row["times"], overhead_ratio(row["times"])
        aim = OVERHEAD_AIM if row["size"] >= OVERHEAD_FROM else None
        lines.append([
            row["name"], row["size"], row["precision"],
            *(milliseconds(times[part].median) for part in ("encoder", "prompted", "whole")),
            f"{overhead_ratio(times, 'prompted'):.3f}", f"{whole:.3f}", verdict(whole, aim, at_most=True),
            len(times["whole"].seconds),
        ])  # fmt: skip
    head = ["network", "px", "precision", "encoder ms", "with prompts ms", "whole ms"]
    head += ["with prompts ÷ encoder", "whole ÷ encoder", "aim", "rounds"]
    text = (
        "One image of the network's size in memory. `encoder`: alone, without prompts, as it would run for any other "
        "decoder; `with prompts`: learned tokens join its attention; `whole`: image to logits at full resolution. "
        "Times are medians, ratios medians over rounds in which the three took turns. Networks other than the shipped "
        "model have random weights and the paper's prompts (`static`, one a class)."
    )
    return f"{markdown_table(head, lines)}\n{footer(rows, text)}"


def warm(settings: Settings) -> list[Row]:
    """Time one warm picture from memory to mask, in one pass and with mirror images, on the shipped model."""
    model = shipped(settings)
    if model is None:
        return []
    network, size, _ = load_network(model, shipped_files(settings))
    image = torch.from_numpy(phantom(0, PICTURE)[0]).permute(2, 0, 1)[None].contiguous() / 255
    runs = {}
    for precision in settings.network_precisions():
        mirrors = mirror_inferer(shipped_files(settings), precision)
        for label, inferer in (("one pass", ImageInferer(size, precision)), ("four mirror images", mirrors)):
            runs[f"{label}, {precision}"] = partial(to_mask, inferer, network, image, settings.device)
    absent: list[Row] = []
    if settings.compile:
        fast = torch.compile(network, mode="reduce-overhead", dynamic=False)
        graph = partial(to_mask, ImageInferer(size, "float32"), fast, image, settings.device)
        label = "one pass, float32, compiled" + (" with CUDA graph" if settings.device.type == "cuda" else "")
        try:
            graph()
            runs[label] = graph
        except Exception as error:  # a compiler that fails costs its row, not the benchmark
            absent = [{"what": f"warm, {label}", "timing": None, "note": failed(error)}]
    failures: dict[str, str] = {}
    times = interleave(
        runs, settings.device, settings.seconds, failures=failures,
        least=settings.latency_rounds, most=max(settings.most, settings.latency_rounds), warm=max(2, settings.warm),
    )  # fmt: skip
    absent += [{"what": f"warm, {label}", "timing": None, "note": why} for label, why in failures.items()]
    measured = [
        {"what": f"warm, {label}", "timing": timing, "size": size, "load": load()} for label, timing in times.items()
    ]
    return measured + absent


@torch.inference_mode()
def to_mask(inferer: ImageInferer, network: nn.Module, image: Tensor, device: torch.device) -> Tensor:
    """Segment (1, 3, H, W) in [0, 1] in memory; returns class indices (H, W) uint8 on the CPU."""
    return inferer(image.to(device), network).argmax(1)[0].to(torch.uint8).cpu()


def cold(settings: Settings) -> list[Row]:
    """Start fresh processes that import, load the shipped model and make a first mask."""
    model = shipped(settings)
    if model is None:
        return []
    files = [str(file) for file in shipped_files(settings)]
    try:
        starts = [ask(what="cold", model=str(model), files=files) for _ in range(settings.cold_rounds)]
    except RuntimeError as error:
        return [{"what": COLD, "timing": None, "note": failed(error)}]
    parts = {key: float(np.median([start[key] for start in starts])) for key in ("import", "load", "mask")}
    timing = Timing(tuple(start["seconds"] for start in starts))
    return [{"what": COLD, "timing": timing, "parts": parts, "load": load()}]


def command(settings: Settings) -> list[Row]:
    """Run ``hspsam segment`` on one picture: the process from its start to its end, table and gallery included."""
    model = shipped(settings)
    if model is None:
        return []
    seconds = []
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        Image.fromarray(phantom(0, PICTURE)[0]).save(picture)
        words = [sys.executable, "-m", "hspsam_monai", "segment", str(picture), str(Path(folder) / "masks")]
        for _ in range(settings.cold_rounds):
            begin = time.perf_counter()
            subprocess.run([*words, "--model", str(model)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
    return [{"what": COMMAND, "timing": Timing(tuple(seconds)), "load": load()}]


def latency_cases(settings: Settings) -> list[Case]:
    """Warm pictures, then cold starts; none without a model."""
    if shipped(settings) is None:
        return []
    return [
        Case(
            "latency of one warm image", max(settings.seconds, 0.5 * settings.latency_rounds), partial(warm, settings)
        ),
        Case(COLD, 10.0 * settings.cold_rounds, partial(cold, settings)),
        Case(COMMAND, 10.0 * settings.cold_rounds, partial(command, settings)),
    ]


def latency_report(rows: Sequence[Row], settings: Settings) -> str:
    """Write percentiles of the warm rows and the cold start beside its aim."""
    lines = []
    for row in rows:
        timing, few = row["timing"], row["what"] in (COLD, COMMAND)
        if timing is None:
            lines.append([row["what"], *[None] * 4, 0, row["note"]])
            continue
        # A 99th percentile of a few starts would be their maximum under another name.
        p50, p99 = (milliseconds(float(np.percentile(timing.seconds, q))) for q in (50, 99))
        lines.append([
            row["what"], milliseconds(timing.minimum), p50, "–" if few else p99, milliseconds(timing.maximum),
            len(timing.seconds), verdict(timing.median, COLD_AIM, at_most=True).replace(":", " s:") if few else "–",
        ])  # fmt: skip
    head = ["what", "min ms", "p50 ms", "p99 ms", "max ms", "rounds", "aim"]
    size = next((row["size"] for row in rows if "size" in row), None)
    found = next((row["parts"] for row in rows if "parts" in row), None)
    split = "" if found is None else (
        f" Cold start, medians: imports {found['import']:.1f} s, network and weights {found['load']:.1f} s, first mask "
        f"{found['mask']:.1f} s; the rest is the interpreter's start."
    )  # fmt: skip
    text = (
        f"Shipped model at its {size} pixels, one picture of {PICTURE[1]} x {PICTURE[0]} in memory to a mask of the "
        "same size in memory, float32 unless said; `four mirror images` is what the bundle does. Warm rows take turns. "
        "Cold start: a new Python process until its first mask with four mirror images; files are in the system's "
        f"cache from the second start on.{split} `{COMMAND}`: from the start of its process to the end, with the table "
        "and the gallery it writes."
    )
    return f"{markdown_table(head, lines)}\n{footer(rows, text)}"


OVERHEAD = Part("prompt-free-overhead", overhead_cases, overhead_report)
LATENCY = Part("latency", latency_cases, latency_report, "it needs the bundle's models/model.pt")
