"""Importing MONAI for a command that only looks at images: without what MONAI brings along for other work.

MONAI imports every optional package it finds as it is imported itself, whether or not anything will use it: more than
half of the time `hspsam segment` takes for one image.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

#: Optional to MONAI, which uses each in parts of its own that no network or transform of ours touches: transchex,
#: the networks of torchvision, TensorBoard's handlers, UltrasoundConfidenceMap.
UNUSED = ("transformers", "torchvision", "tensorboard", "scipy.signal")
#: Ignite asks of its optimizer class whether an object is an instance of it, when it saves one. The class brings
#: sharded training, and that brings SymPy.
_SHARDED, _SHARDED_CLASS = "torch.distributed.optim", "ZeroRedundancyOptimizer"


def import_monai(unused: Sequence[str] = UNUSED) -> bool:
    """Import MONAI and Ignite, letting them think that some packages are not installed.

    In this process MONAI's parts that use those packages stay out of order, and Ignite does not gather the state of a
    sharded optimizer: for a command of our own that needs neither, not for a library's user or a training. The packages
    themselves can be imported as ever afterwards.

    Args:
        unused: modules MONAI takes as absent.

    Returns:
        Whether it was done. Not where MONAI is imported already, or cannot do without one of them; then it is there in
        full.
    """
    if "monai" in sys.modules:
        return False
    try:
        with _absent(unused), _placeholder():
            importlib.import_module("monai.bundle")
        return True
    except ImportError:
        # A version of MONAI or Ignite that needs one of them.
        for name in [name for name in sys.modules if name.partition(".")[0] in {"monai", "ignite"}]:
            del sys.modules[name]
        importlib.import_module("monai.bundle")
        return False


@contextmanager
def _absent(names: Sequence[str]) -> Iterator[None]:
    """Modules that an import does not find, unless they are loaded already."""
    names = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextmanager
def _placeholder() -> Iterator[None]:
    """The module of sharded optimizers as one with a class that nothing is an instance of."""
    if _SHARDED in sys.modules:
        yield
        return
    module = types.ModuleType(_SHARDED)
    setattr(module, _SHARDED_CLASS, type(_SHARDED_CLASS, (), {}))
    sys.modules[_SHARDED] = module
    try:
        yield
    finally:
        del sys.modules[_SHARDED]
