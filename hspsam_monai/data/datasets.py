"""Data sets whose randomness depends on (seed, epoch, index) alone, and one that survives bad files."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from torch.utils.data import IterableDataset, Sampler

from hspsam_monai.data.cases import case_name
from hspsam_monai.errors import ConfigError, HspsamError

logger = logging.getLogger(__name__)


class SeededDataset(Dataset):
    """MONAI's ``Dataset`` whose random transforms are seeded from (seed, epoch, index).

    Augmentation is then independent of the number of workers and of the order in which cases are drawn, and a
    resumed run sees what the uninterrupted one would have seen.

    Args:
        data: list of case dictionaries.
        transform: MONAI ``Compose`` (random transforms inside are seeded for every case).
        seed: seed of the run.
        length: items an epoch; beyond the number of cases they come again, each time augmented anew. ``None`` for
            every case once.
    """

    def __init__(
        self, data: Sequence[dict], transform: Callable | None = None, seed: int = 0, length: int | None = None
    ) -> None:
        super().__init__(data=data, transform=transform)
        self.seed, self.length = seed, length
        self.epoch = 0

    def __len__(self) -> int:
        """Items an epoch."""
        return len(self.data) if self.length is None else self.length

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set which epoch comes; call before the loader's iterator is made."""
        self.epoch = epoch

    def _transform(self, index: int) -> Any:
        if hasattr(self.transform, "set_random_state"):
            sequence = np.random.SeedSequence((self.seed, self.epoch, index))
            self.transform.set_random_state(seed=int(sequence.generate_state(1)[0]))
        with one_thread():
            return super()._transform(index % len(self.data))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as loader workers do: the last bits of a resized picture depend on the number."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class SeededSampler(Sampler[int]):
    """Shuffled indices that depend on (seed, epoch) alone; splits them evenly over processes.

    Args:
        length: number of cases.
        seed: seed of the run.
        shuffle: keep the order if false.
        rank: this process' number.
        replicas: number of processes; every process gets the same count, the first indices are repeated to fill.
        draws: cases an epoch, all processes together, where that shall not be every case once: the first of each
            epoch's own order. ``None`` for every case.

    Raises:
        ConfigError: ``draws`` is not between 1 and ``length``.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        replicas: int = 1,
        draws: int | None = None,
    ) -> None:
        if draws is not None and not 1 <= draws <= length:
            raise ConfigError(f"draws is {draws}; expected 1 to {length}, the number of cases.")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.replicas = rank, replicas
        self.draws = length if draws is None else draws
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch comes."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Cases this process draws an epoch."""
        return math.ceil(self.draws / self.replicas)

    def __iter__(self) -> Iterator[int]:
        """This process' indices of the epoch."""
        order = list(range(self.length))
        if self.shuffle:
            seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(seed)).tolist()
        total = len(self) * self.replicas
        filled = list(islice(cycle(order[: self.draws]), total))
        return iter(filled[self.rank :: self.replicas])


class TolerantDataset(IterableDataset):
    """Cases one after another; a case that cannot be read is recorded and left out, the rest goes on.

    Args:
        data: list of case dictionaries.
        transform: what turns a case into tensors; a :class:`HspsamError` it raises marks the case as failed.

    Attributes:
        failures: (case name, reason) of every case left out, filled while iterating.
    """

    def __init__(self, data: Sequence[dict], transform: Callable | None = None) -> None:
        super().__init__()
        self.data, self.transform = list(data), transform
        self.failures: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Any]:
        """Transformed cases; use without loader workers, which would keep ``failures`` to themselves."""
        for case in self.data:
            try:
                item = case if self.transform is None else self.transform(case)
            except (HspsamError, RuntimeError) as error:
                reason = _root_reason(error)
                if reason is None:
                    raise
                logger.error("Left out %s: %s", case_name(case), reason)
                self.failures.append((case_name(case), reason))
                continue
            yield item


def _root_reason(error: BaseException) -> str | None:
    """The message of the :class:`HspsamError` behind MONAI's wrapping ``RuntimeError``; ``None`` if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HspsamError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return None
