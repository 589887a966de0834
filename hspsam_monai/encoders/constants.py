"""What depends on weights alone is computed once, not once an image.

Position encodings, attention biases, keys and values of prompts are functions of parameters and sizes. While no
gradient is asked for they are kept from one call to the next, and made again as soon as a parameter has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

#: Entries and bytes a :class:`Constants` holds: TinyViT makes about 80 entries for one input size, and images of ever
#: new sizes must not fill the memory.
CAPACITY, BYTES = 512, 2**28


class Constants:
    """Values derived from parameters, valid as long as the parameters are what they were.

    A parameter counts as changed if it lies elsewhere in memory (moved, replaced) or was written to (an optimiser's
    step, a loaded checkpoint): the value keeps its sources' memory alive, so no other tensor can take its place unseen.
    Some writes PyTorch does not count: a fused optimiser's, which comes after a pass with gradients, so such a pass
    forgets what was kept (a compiled one cannot); and those through ``.data`` or NumPy. On a CPU such writes show in a
    number looked at of every source; on other devices, where looking would stop the queue, call :meth:`forget`.

    Nothing is kept while gradients are on, while torch compiles, exports or traces or a CUDA graph is being
    captured (their tensors are not ours to keep), or of parameters made under ``inference_mode`` (their changes cannot
    be seen). Copies and pickles of the owner start empty. An owner whose parameters move forgets
    (:class:`KeepsConstants`), or their old memory would stay.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[tuple[Tensor, int, float]], Any]] = {}
        self._bytes = 0

    def forget(self) -> None:
        """Compute everything anew from now on."""
        self._kept.clear()
        self._bytes = 0

    def get(self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """Give the value of ``key``, computing it if it is not there or outdated.

        Args:
            key: what tells the values of one owner apart, such as a name and a size.
            sources: the tensors it is a function of.
            compute: makes it; a tensor or a tuple of tensors.
        """
        if _tracing():
            return compute()
        if torch.is_grad_enabled():
            self.forget()
            return compute()
        if not _may_keep(sources):
            return compute()
        device = sources[0].device.type
        key = (key, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
        found = self._kept.get(key)
        if found is not None and _same(found[0], sources):
            return found[1]
        # Looked at before, so that another thread's write meanwhile shows at the next call.
        seen = [(source.detach(), source._version, probe(source)) for source in sources]
        value = compute()
        self._drop(key)
        self._kept[key] = (seen, value)
        self._bytes += _size(value)
        while len(self._kept) > 1 and (len(self._kept) > CAPACITY or self._bytes > BYTES):
            self._drop(next(iter(self._kept), None))
        return value

    def _drop(self, key: Hashable) -> None:
        gone = self._kept.pop(key, None)
        if gone is not None:
            self._bytes -= _size(gone[1])

    def __deepcopy__(self, memo: dict) -> Constants:
        return Constants()

    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()


class KeepsConstants(nn.Module):
    """A module with ``_constants``, which forgets them when it moves or changes its number type."""

    _constants: Constants

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._constants.forget()
        return super()._apply(fn, recurse)


def _size(value: Any) -> int:
    """Bytes of a tensor, or of those in a tuple or list."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, tuple | list) else 0


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def _may_keep(sources: Sequence[Tensor]) -> bool:
    if any(source.is_cuda for source in sources) and torch.cuda.is_current_stream_capturing():
        return False
    return not any(source.is_inference() or is_fake(source) for source in sources)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers, as one who asks only for shapes makes them."""
    return tensor.is_meta or "FakeTensor" in (type(tensor).__name__, type(tensor.data).__name__)


def probe(source: Tensor) -> float:
    """One number of a tensor on the CPU, its middle one; 0 elsewhere."""
    if source.device.type != "cpu" or not source.numel():
        return 0.0
    return source.detach()[tuple(length // 2 for length in source.shape)].item()


def _same(kept: Sequence[tuple[Tensor, int, float]], sources: Sequence[Tensor]) -> bool:
    return len(kept) == len(sources) and all(
        old.data_ptr() == new.data_ptr() and version == new._version and old.dtype == new.dtype
        and old.shape == new.shape and old.device == new.device and number == probe(new)
        for (old, version, number), new in zip(kept, sources, strict=True)
    )  # fmt: skip
