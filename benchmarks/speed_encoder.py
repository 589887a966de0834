"""R1, R2: encoders against their peers, and against the matrix products of the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from common import logger
from parts import Case, Part, Row, Settings, encoder_flops, failed, footer, load
from peers import COSINE, OURS, TOLERANCE, Contender, build, packages, random_encoder, reference, refusal, variant_of
from results import markdown_table
from timing import TIMING_HEAD, Timing, interleave, race, verdict
from torch import Tensor
from work import roofline, tiny_flops, tiny_products, vit_flops, vit_products

from hspsam_monai.encoders import Encoder

MATMUL = "matrix products"
#: (device, encoder, precision, size, batch or ``None`` for any) -> at least so many times as fast as the best peer.
AIMS = {
    ("cpu", "sam_vit_b", "float32", 256, None): 1.4,
    ("cpu", "sam_vit_b", "float32", 512, None): 1.3,
    ("cpu", "sam_vit_b", "float32", 1024, None): 1.5,
    ("cpu", "mobile_sam", "float32", 512, None): 1.2,
    ("cuda", "sam_vit_b", "bfloat16", 256, 8): 1.3,
    ("cuda", "sam_vit_b", "bfloat16", 512, 8): 1.3,
}
#: The same key -> at least this share of the speed of bare matrix products.
SHARE_AIMS = {("cuda", "sam_vit_b", "bfloat16", 1024, 8): 0.5}


@lru_cache(maxsize=1)
def models(name: str, size: int, device: torch.device) -> tuple[Encoder, list[Contender], dict[str, str]]:
    """Our encoder, all contenders with its weights, and why some are absent; the last set is kept."""
    encoder = random_encoder(name, size)
    return (encoder, *build(encoder, device))


def measure(name: str, size: int, batch: int, settings: Settings) -> list[Row]:
    """Race all contenders on the same images in every precision.

    Args:
        name: encoder.
        size: side of the images in pixels.
        batch: images at a time.
        settings: of the run.

    Returns:
        One row a contender and precision; ``timing`` is ``None`` where ``note`` says why.

    Raises:
        ConfigError: the published implementation is absent, so nothing can be compared.
    """
    device = settings.device
    encoder, contenders, absent = models(name, size, device)
    image = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    published = reference(contenders, absent)
    expected, whole = published_output(published, encoder, image)
    rows: list[Row] = []
    for precision in settings.precisions:
        base = {"encoder": name, "size": size, "batch": batch, "precision": precision, "device": device.type}
        field = [c for c in contenders if precision == "bfloat16" or not c.cast]
        if settings.compile and precision == "bfloat16" and batch in settings.compile_batches:
            torch.compiler.reset()
            field += [contender.compile() for contender in field]
        warm = published if whole and precision == "float32" else None
        entries, started = _admit(field, encoder, image, expected, precision, warm)
        times, failures = _time(encoder, entries, size, batch, precision, settings)
        share = _share(name, encoder, size, batch, times)
        for contender in field:
            reason, seconds = started[contender.name]
            reason = reason or failures.get(contender.name)
            note = reason or (f"first call, with compiling, {seconds:.0f} s" if contender.compiled else "")
            rows.append({
                **base, "implementation": contender.name, "compiled": contender.compiled, "note": note,
                "timing": times.get(contender.name), "share": share.get(contender.name), "load": load(),
            })  # fmt: skip
        rows += [
            {**base, "implementation": peer, "compiled": False, "note": why, "timing": None, "share": None}
            for peer, why in absent.items()
        ]
    return rows


def published_output(contender: Contender, encoder: Encoder, image: Tensor) -> tuple[Tensor, bool]:
    """Encode in float32 by the published implementation; one by one where the batch does not fit into memory.

    Returns:
        The embedding (B, 256, h, w), and whether the batch went through as a whole, which was a warm-up too.
    """
    x = contender.input(image, encoder)
    if _bytes_needed(contender, encoder, len(image)) <= _bytes_free(image.device):
        try:
            return contender.encode(x, "float32").clone(), True
        except torch.OutOfMemoryError:
            logger.info("%s runs out of memory with %d images; encoding them one by one.", contender.name, len(x))
    return torch.cat([contender.encode(one, "float32").clone() for one in x.split(1)]), False


def _admit(
    field: Sequence[Contender],
    encoder: Encoder,
    image: Tensor,
    expected: Tensor,
    precision: str,
    warm: Contender | None = None,
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, tuple[str | None, float]]]:
    """Run every contender once, which warms it up, and admit those whose output is right.

    Args:
        field: who wants to race.
        encoder: ours.
        image: (B, 3, S, S) in [0, 1].
        expected: the published output in float32.
        precision: of the race.
        warm: the contender that gave ``expected``, if it ran the whole batch: it is not run again.

    Returns:
        Contender -> what a round of it does; and contender -> (why it is refused or ``None``, seconds of this call).
    """
    entries: dict[str, Callable[[], Tensor]] = {}
    started: dict[str, tuple[str | None, float]] = {}
    for contender in field:
        begin = time.monotonic()
        needed = _bytes_needed(contender, encoder, len(image))
        if needed > _bytes_free(image.device):
            started[contender.name] = (f"needs about {needed / 2**30:.0f} GiB", 0.0)
            continue
        try:
            x = contender.input(image, encoder)
            output = expected if contender is warm else contender.encode(x, precision)
            reason = refusal(output, expected, precision)
        except Exception as error:  # a peer or a compiler that fails costs its row, not the benchmark
            if contender.ours and not contender.compiled:
                raise
            reason = failed(error)
        started[contender.name] = (reason, time.monotonic() - begin)
        if reason is None:
            entries[contender.name] = partial(contender.encode, x, precision)
        else:
            logger.warning("%s is not timed: %s", contender.name, reason)
    return entries, started


def _time(
    encoder: Encoder, entries: dict[str, Callable[[], Tensor]], size: int, batch: int, precision: str,
    settings: Settings,
) -> tuple[dict[str, Timing], dict[str, str]]:  # fmt: skip
    """Interleave contenders and the matrix products; nothing is timed where ours was refused.

    Returns:
        The times of those that ran to the end, and why the others did not.
    """
    if OURS not in entries:
        return {}, {}
    variant = variant_of(encoder)
    shapes = tiny_products(size, batch) if variant is None else vit_products(variant, size, batch)
    products, _ = roofline(shapes, settings.device, getattr(torch, precision))
    products()  # the contenders have run once too
    failures: dict[str, str] = {}
    times = interleave(
        {**entries, MATMUL: products}, settings.device, settings.seconds,
        least=settings.least, most=settings.most, warm=settings.warm, failures=failures,
    )  # fmt: skip
    return times, failures


def _share(name: str, encoder: Encoder, size: int, batch: int, times: dict[str, Timing]) -> dict[str, float]:
    """Real work a second of each contender over that of the matrix products."""
    if MATMUL not in times:
        return {}
    variant = variant_of(encoder)
    shapes = tiny_products(size, batch) if variant is None else vit_products(variant, size, batch)
    best = sum(2 * rows * a * b for rows, a, b in shapes) / times[MATMUL].median
    work = batch * (tiny_flops(size) if variant is None else vit_flops(variant, size))
    return {contender: work / timing.median / best for contender, timing in times.items()}


def _bytes_needed(contender: Contender, encoder: Encoder, batch: int) -> float:
    """Bytes of what segment_anything cannot avoid: three matrices of all pairs of tokens at once; 0 for others."""
    variant = variant_of(encoder)
    if variant is None or not contender.name.startswith("segment_anything") or contender.cast or contender.compiled:
        return 0.0
    return 3.0 * 4 * batch * variant.heads * (encoder.image_size // 16) ** 4


def _bytes_free(device: torch.device) -> float:
    """Free memory in bytes; without limit where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(found[0]) if found else float("inf")


def cases(settings: Settings) -> list[Case]:
    """List encoders, sizes and batches, each with all its precisions and contenders."""
    passes = 3 * len(settings.precisions) * (2 if settings.compile else 1)
    return [
        Case(
            f"encoder {name}, {size} px, batch {batch}, {' and '.join(settings.precisions)}",
            settings.cost(batch * encoder_flops(name, size), passes),
            partial(measure, name, size, batch, settings),
        )
        for name in settings.encoders
        for size in settings.sizes
        for batch in settings.batches
    ]


def ratios(rows: Sequence[Row]) -> list[list[Any]]:
    """Make the lines that compare ours with the best peer, eager and compiled apart.

    A compiled line takes the fastest of ours that are compiled against the fastest peer of any kind.
    """
    lines = []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["encoder"], row["precision"], row["size"], row["batch"]), []).append(row)
    for key, members in groups.items():
        aim = aim_of(AIMS, key)
        for compiled in sorted({row["compiled"] for row in members}):
            mine = next((r for r in members if _is_ours(r) and r["compiled"] == compiled), None)
            if mine is None:
                continue
            peers = {
                r["implementation"]: r["timing"]
                for r in members
                if not _is_ours(r) and r["timing"] is not None and (compiled or not r["compiled"])
            }
            found = race(mine["timing"], peers)
            _, encoder, precision, size, batch = key
            lines.append([
                encoder, size, batch, precision, "compiled" if compiled else "eager",
                found.peer if found else "–",
                _times(found.by_median) if found else _why(mine),
                _times(found.by_minimum) if found else "–",
                verdict(found.by_median if found else None, aim),
                _share_cell(mine["share"], aim_of(SHARE_AIMS, key)),
            ])  # fmt: skip
    return lines


def aim_of(aims: dict[tuple, float], key: tuple) -> float | None:
    """Find the aim of a (device, encoder, precision, size, batch): that of the batch, or that of any batch."""
    return aims.get(key, aims.get((*key[:4], None)))


def _share_cell(share: float | None, aim: float | None) -> str | None:
    text = None if share is None else f"{share:.2f}"
    return text if aim is None else f"{text or '–'} ({verdict(share, aim)})"


def _why(mine: Row) -> str | None:
    """Say why ours has no ratio: refused, failed, or without a peer (then ``None``)."""
    note = "" if mine["timing"] is not None else mine["note"]
    return None if not note else note if note.startswith("failed") else f"refused: {note}"


def _is_ours(row: Row) -> bool:
    return row["implementation"].startswith(OURS)


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def report(rows: Sequence[Row], settings: Settings) -> str:
    """Write the ratios and, beneath them, every contender's times."""
    head = ["encoder", "px", "batch", "precision", "mode", "best peer", "peer ÷ ours", "by minima", "aim"]
    summary = markdown_table([*head, "of matmul FLOP/s"], ratios(rows))
    lines = []
    for row in rows:
        timing = row["timing"]
        rate = None if timing is None else f"{row['batch'] / timing.median:.2f}"
        lines.append([
            row["encoder"], row["size"], row["batch"], row["precision"], row["implementation"],
            *(timing.cells() if timing is not None else [None] * 4), rate,
            None if row["share"] is None else f"{row['share']:.2f}", row["note"] or "–",
        ])  # fmt: skip
    columns = ["encoder", "px", "batch", "precision", "implementation", *TIMING_HEAD, "images/s", "of matmul FLOP/s"]
    text = (
        "Same random weights and images for all; peers built for each size. A contender races only if its output is "
        f"the published one: float32 within {TOLERANCE:.0e} (relative), bfloat16 with a cosine of at least {COSINE} to "
        "float32. Each has run once before (on a GPU four times); then all take turns, with the matrix products among "
        f"them, for {settings.seconds:g} s, at least {settings.least} rounds. bfloat16 is autocast. The pixel "
        "statistics are applied inside our time, before the peers'. `peer ÷ ours` divides medians; `by minima` "
        "divides the shortest round of any peer, not only of the best, by our shortest. `of matmul FLOP/s`: "
        "FLOP/s of the encoder over those of the linear layers of one block (TinyViT: one a stage), as bare matrix "
        "products of the same precision between the contenders. The encoder's work is counted analytically on real "
        "tokens, not on padding, for every implementation alike; norms, activations and softmax count nothing. "
        "`kornia` is MobileSAM's arrangement: padded windows, batch norms not folded."
    )
    return f"{summary}\n{markdown_table([*columns, 'note'], lines)}\n{footer(rows, text, packages(settings.device))}"


PART = Part("encoder-speed", cases, report)
