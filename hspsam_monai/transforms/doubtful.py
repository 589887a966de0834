"""What the network is not sure of goes back to the background."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy.ndimage import generate_binary_structure, label, mean
from torch import Tensor

from hspsam_monai.errors import ConfigError
from hspsam_monai.transforms.resize import plain


def drop_doubtful(logits: Tensor, min_confidence: float) -> Tensor:
    """Give connected components of low confidence back to the background.

    A network that has seen an object in nearly every image draws something in empty ones too, but half-heartedly.
    The confidence of a component is the mean over its pixels of the probability of its class, so it lies in
    (1/K, 1]; pixels that touch by a corner are connected, those of different classes are not.

    Args:
        logits: (K, ...) of one image or volume, background first; of any temperature that softmax turns into the
            probabilities meant.
        min_confidence: least confidence of a component that stays; 0 keeps all.

    Returns:
        Logits of the same shape, type and device (and meta data). In dropped components those of the background and
        of the winning class have changed places, so that argmax gives 0 and the probabilities still sum to 1. The
        input is left as it is and returned itself if nothing is dropped.

    Raises:
        ConfigError: ``min_confidence`` is outside [0, 1).
    """
    if not 0 <= min_confidence < 1:
        raise ConfigError(f"min_confidence is {min_confidence!r}; expected a number from 0 (keep all) to below 1.")
    if min_confidence == 0:
        return logits
    probability, winner = plain(logits).float().softmax(0).max(0)
    winner_array, probability_array = winner.cpu().numpy(), probability.cpu().numpy()
    doubtful = np.zeros(winner_array.shape, dtype=bool)
    touching = generate_binary_structure(winner_array.ndim, winner_array.ndim)
    for value in np.unique(winner_array[winner_array > 0]):
        components, count = label(winner_array == value, touching)
        confidence = np.asarray(mean(probability_array, components, np.arange(1, count + 1)))
        # Component 0 is what is not of this class.
        doubtful |= np.concatenate([[False], confidence < min_confidence])[components]
    if not doubtful.any():
        return logits
    where = torch.from_numpy(doubtful).to(winner.device)
    # Scatter needs the winner's channel of dropped pixels; elsewhere background changes places with itself.
    index = torch.where(where, winner, torch.zeros_like(winner))[None]
    result = logits.clone()
    values = plain(result)  # the same memory, without the meta data's bookkeeping
    background, own = values[:1].clone(), values.gather(0, index)
    values[:1] = own
    values.scatter_(0, index, torch.where(where[None], background, own))
    return result


class DropDoubtfuld(MapTransform):
    """:func:`drop_doubtful` on entries of a dictionary, after the network and before ``AsDiscreted``.

    Args:
        keys: logits (K, ...) each.
        min_confidence: least mean probability of a component that stays, in [0, 1); 0 keeps all. Half-hearted
            components of two classes lie between 0.5 and about 0.7.
        allow_missing_keys: see MONAI.

    Raises:
        ConfigError: ``min_confidence`` is outside [0, 1).
    """

    def __init__(self, keys: KeysCollection, min_confidence: float = 0.65, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= min_confidence < 1:
            raise ConfigError(f"min_confidence is {min_confidence!r}; expected a number from 0 (keep all) to below 1.")
        self.min_confidence = min_confidence

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Drop what is doubtful in one case."""
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = drop_doubtful(data[key], self.min_confidence)
        return data
