"""Interleaved timing: all contenders of a case take turns in one process, so that the machine's moods hit all alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from common import logger

from hspsam_monai.errors import ConfigError
from hspsam_monai.training.handlers import clock

#: No case is measured more often, however quick it is.
MOST_ROUNDS = 200


class Timing(NamedTuple):
    """Seconds of one contender, one entry a round, in the order measured."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """Fastest round in seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median round in seconds."""
        return statistics.median(self.seconds)

    @property
    def maximum(self) -> float:
        """Slowest round in seconds; with few rounds the honest spread."""
        return max(self.seconds)

    def cells(self) -> list[str]:
        """Minimum, median and maximum in milliseconds, and the number of rounds, for a table."""
        return [*(milliseconds(s) for s in (self.minimum, self.median, self.maximum)), str(len(self.seconds))]


#: Heads of the columns of :meth:`Timing.cells`.
TIMING_HEAD = ["min ms", "median ms", "max ms", "rounds"]


def milliseconds(seconds: float) -> str:
    """Write seconds as milliseconds with about three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Time one call. On a GPU by events around an empty queue, so that neither earlier nor unfinished work counts.

    Args:
        run: what is timed.
        device: where it works.

    Returns:
        Seconds.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    *,
    least: int = 3,
    most: int = MOST_ROUNDS,
    warm: int = 1,
    failures: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time several contenders in turn, A B C A B C ..., until a time budget is used up.

    Args:
        runs: contender -> what one round of it does.
        device: where they work.
        seconds: budget of the rounds after the warm-up; a round that has begun is finished.
        least: rounds that are made even if they exceed the budget.
        most: rounds that are never exceeded.
        warm: rounds before the clock starts.
        failures: takes contender -> why, of those that raise; they leave the race and the others go on. Without it, the
            first that raises ends the race.

    Returns:
        Contender -> its times, all of one length; without those in ``failures``.

    Raises:
        ConfigError: ``least`` is below 1 or above ``most``.
    """
    if not 1 <= least <= most:
        raise ConfigError(f"least is {least} and most {most} rounds; expected 1 <= least <= most.")
    times: dict[str, list[float]] = {name: [] for name in runs}

    def turn(measured: bool) -> None:
        for name in list(times):
            try:
                took = seconds_of(runs[name], device)
            except Exception as error:
                if failures is None:
                    raise
                logger.warning("%s leaves the race: %s", name, failed(error))
                failures[name] = failed(error)
                del times[name]
                continue
            if measured:
                times[name].append(took)

    for _ in range(warm):
        turn(measured=False)
    begin = time.monotonic()
    for done in range(most):
        if not times or (done >= least and time.monotonic() - begin >= seconds):
            break
        turn(measured=True)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def failed(error: Exception) -> str:
    """Say in a table why a row has no figure."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}{f' ({first[0][:80]})' if first else ''}"


class Race(NamedTuple):
    """The peer of the lowest median; lowest median and lowest minimum of all peers over ours: above 1 ours is faster.

    The two ratios may be those of two peers: each is the strictest there is.
    """

    peer: str
    by_median: float
    by_minimum: float


def race(ours: Timing | None, peers: Mapping[str, Timing]) -> Race | None:
    """Compare ours with the best of its peers; ``None`` if either side was not measured."""
    if ours is None or not peers:
        return None
    best = min(peers, key=lambda name: peers[name].median)
    shortest = min(timing.minimum for timing in peers.values())
    return Race(best, peers[best].median / ours.median, shortest / ours.minimum)


def verdict(value: float | None, aim: float | None, *, at_most: bool = False) -> str:
    """Put a value beside its aim: ``≥ 1.4: reached``, ``≥ 1.4: missed`` or ``–`` without one of them."""
    if aim is None:
        return "–"
    sign = "≤" if at_most else "≥"
    if value is None:
        return f"{sign} {aim:g}: not measured"
    return f"{sign} {aim:g}: {'reached' if (value <= aim if at_most else value >= aim) else 'missed'}"


def load() -> float | None:
    """Processes that want a core, averaged over the last minute; ``None`` where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Progress:
    """Tells what is being measured and how long the rest will take.

    Args:
        costs: expected seconds of every case, in order. Only their proportions matter once some are done.
    """

    def __init__(self, costs: list[float]) -> None:
        self._costs, self._done = costs, 0
        self._begin = time.monotonic()

    def begin(self, label: str) -> str:
        """Announce the next case; returns the line that was logged."""
        line = f"{self._done + 1} of {len(self._costs)}: {label}; about {clock(self.left())} left"
        logger.info("%s", line)
        self._done += 1
        return line

    def left(self) -> float:
        """Expected seconds until the end, by the pace so far."""
        past = sum(self._costs[: self._done])
        pace = (time.monotonic() - self._begin) / past if past else 1.0
        return pace * sum(self._costs[self._done :])
