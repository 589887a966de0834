"""How close the images that an evaluator segments are to the supports of a network prompted by examples."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Closeness:
    """Read off the network's own features, so that it costs no encoder pass.

    Args:
        network: the evaluator's network; ``None``, or one that knows no supports: there is nothing to tell.

    Attributes:
        values: after the forward pass, one similarity in (0, 1] for each image of the batch; ``None`` where there is
            nothing to tell.
    """

    def __init__(self, network: nn.Module | None) -> None:
        network = getattr(network, "module", network)  # DistributedDataParallel
        self.network = network if hasattr(network, "closeness") else None
        self.values: list[float] | None = None
        self._features: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        if self.network is not None:
            engine.add_event_handler(Events.STARTED, self._listen)
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._read)
            engine.add_event_handler(Events.COMPLETED, self._stop)

    def _listen(self, engine: Engine) -> None:
        self._stop(engine)
        self._handle = self.network.on_features(self._keep)

    def _keep(self, features: Tensor) -> None:
        # The first pass sees the image as it is, later ones its mirror images.
        if self._features is None:
            self._features = features

    def _read(self, engine: Engine) -> None:
        self.values = None if self._features is None else self.network.closeness(self._features).tolist()
        self._features = None

    def _stop(self, engine: Engine) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._features, self.values = None, None, None
