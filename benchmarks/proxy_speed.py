"""Proxy Prompt's costs: a target with a stored context over the plain encoder, and the scan's time per token.

A context is computed once, so what counts is the image after it: encoder, selective map to the stored supports, tokens,
SAM's decoder. The scan must stay linear: 16 times the tokens, 16 times the time.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product

import torch
from common import argument_parser, start_logging
from results import machine_line, markdown_table, publish
from scoring import device
from speed_network import overhead_ratio
from timing import Timing, interleave, milliseconds, verdict

from hspsam_monai.encoders import ENCODERS
from hspsam_monai.networks import ProxyPrompt
from hspsam_monai.networks.selective_scan import selective_scan

SECTION = "proxy-speed"
#: The whole image with a stored context over the plain encoder; the dearest over the cheapest token among the scans.
OVERHEAD_AIM, LINEAR_AIM = 1.25, 1.2
TOKENS = (1024, 2048, 4096, 8192, 16384)
#: Tokens of the plain recurrence, a Python step each.
NAIVE = 1024


def main(argv: list[str] | None = None) -> None:
    """Measure and print both tables."""
    parser = argument_parser("proxy_speed", __doc__, data_required=False)
    parser.add_argument("--encoders", nargs="+", default=["mobile_sam", "sam_vit_b"], choices=list(ENCODERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[384, 512], help="sides in pixels")
    parser.add_argument("--supports", nargs="+", type=int, default=[1, 4, 16], help="K")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=20.0, help="time budget of each case after its warm-up")
    args = parser.parse_args(argv)
    start_logging()
    with torch.no_grad():
        tables = [_contexts(args), _scans(args)]
    publish(SECTION, "\n\n".join([*tables, machine_line()]), args)


def _contexts(args: argparse.Namespace) -> str:
    rows = []
    for encoder, size in product(args.encoders, args.sizes):
        torch.manual_seed(0)
        network = ProxyPrompt(encoder, image_size=size).to(device()).eval()
        image = torch.rand(1, 3, size, size, device=device())
        contexts = {}
        for count in args.supports:
            masks = torch.zeros(count, size, size)
            masks[:, size // 4 : size // 2, size // 4 : size // 2] = 1
            network.set_context(torch.rand(count, 3, size, size), masks)
            contexts[count] = {name: getattr(network, name).clone() for name in network.no_context()}

        def whole(
            count: int, network: ProxyPrompt = network, image: torch.Tensor = image, kept: dict = contexts
        ) -> None:
            for name, value in kept[count].items():
                setattr(network, name, value)
            network(image)

        runs = {"encoder": partial(network.encoder, image)}
        runs |= {f"K = {count}": partial(whole, count) for count in args.supports}
        times = interleave(runs, device(), args.seconds)
        for name in list(runs)[1:]:
            ratio = overhead_ratio(times, name)
            milli = [milliseconds(times[key].median) for key in ("encoder", name)]
            aim = verdict(ratio, OVERHEAD_AIM, at_most=True) if size == 512 else "–"
            rows.append([encoder, size, name, *milli, f"{ratio:.3f}", aim, len(times[name].seconds)])
    head = ["encoder", "px", "supports in the context", "encoder ms", "whole ms", "whole ÷ encoder", "aim", "rounds"]
    return (
        f"{markdown_table(head, rows)}\nOne image, float32, one object, random weights; medians, ratios medians over "
        "rounds in which all took turns."
    )


def scan_arguments(tokens: int, width: int = 192, states: int = 8) -> list[torch.Tensor]:
    """Random arguments of one scan of the generator's width, seeded by its length."""
    generator = torch.Generator().manual_seed(tokens)
    x, b, c, delta = (
        torch.randn(1, tokens, size, generator=generator) for size in (width, states, states, width)
    )  # fmt: skip
    a = -torch.arange(1.0, states + 1).repeat(width, 1)
    return [part.to(device()) for part in (x, torch.nn.functional.softplus(delta - 2), a, b, c)]


def naive_scan(x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The recurrence as it is written, one token after the other."""
    h, outputs = x.new_zeros(x.shape[0], *a.shape), []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)


def _scans(args: argparse.Namespace) -> str:
    runs = {f"scan, {count} tokens": partial(selective_scan, *scan_arguments(count)) for count in args.tokens}
    count = min(NAIVE, *args.tokens)
    plain = scan_arguments(count)
    runs[f"plain recurrence, {count} tokens"] = partial(naive_scan, *plain)
    exact = naive_scan(*(part.double() for part in plain))
    error = float((selective_scan(*plain).double() - exact).norm() / exact.norm())
    times = interleave(runs, device(), args.seconds)
    lengths = [*args.tokens, count]
    per_token = [_nanoseconds(times[name], length) for name, length in zip(runs, lengths, strict=True)]
    ratio = max(per_token[:-1]) / min(per_token[:-1])
    rows = [
        [name, *(milliseconds(value) for value in (times[name].minimum, times[name].median)), f"{each:.0f}",
         len(times[name].seconds)]
        for name, each in zip(runs, per_token, strict=True)
    ]  # fmt: skip
    head = ["what", "min ms", "median ms", "ns a token, fastest round", "rounds"]
    return (
        f"{markdown_table(head, rows)}\nWidth 192, 8 states, float32, forward. Dearest over cheapest token among the "
        f"scans: {ratio:.2f} ({verdict(ratio, LINEAR_AIM, at_most=True)}). Relative difference of the scan to the "
        f"recurrence in float64, {count} tokens: {error:.1e}."
    )


def _nanoseconds(timing: Timing, tokens: int) -> float:
    return timing.minimum / tokens * 1e9


if __name__ == "__main__":
    main()
