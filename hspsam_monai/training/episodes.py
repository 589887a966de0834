"""Episodes for Proxy Prompt: every target comes with supports drawn from the other cases of its task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.transforms import apply_transform
from torch import Tensor, nn
from torch.nn import functional as F

from hspsam_monai.data import SeededDataset
from hspsam_monai.data.cases import content_hash
from hspsam_monai.data.datasets import one_thread
from hspsam_monai.data.few import showing_all
from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.networks.stored import encoded_of
from hspsam_monai.training.feature_cache import FeatureDataset, stored_batch
from hspsam_monai.transforms import fit_image

#: Draws of one support before a mask without object is taken as it is: augmentation may crop an object away.
_TRIES = 4


class EpisodeDataset(SeededDataset):
    """Targets with supports; all randomness is a function of (seed, epoch, index).

    The target itself and byte-identical copies of it are never its support, nor are two supports of one target copies
    of each other, as long as the task has enough different cases; where it has too few, supports are repeated. The
    cases of a task are those whose ``task`` is equal or, without that key, those of one data folder
    (``kvasir/a``: kvasir).

    Args:
        data: cases with ``image``, ``label`` and ``case``, all of one split.
        transform: MONAI transform of a case: loads, brings to the network's size, augments.
        seed: seed of the run.
        supports: fewest and most supports K. Each item holds the most, so that batches stack, and says how many its
            episode has; :func:`episode_batch` hands on as many as the batch's first item says.
        support_transform: that of a support; ``None`` for ``transform``.
        length: items an epoch, see :class:`SeededDataset`.

    Items: ``image`` (3, H, W), ``label`` (1, H, W), ``support_images`` (K, 3, H, W), ``support_masks`` (K, H, W),
    ``supports`` (int), ``case``, and the names ``support_cases`` as one text.

    Raises:
        ConfigError: ``supports`` is no range of positive numbers.
        DataError: a task has no second different case.
    """

    def __init__(
        self,
        data: Sequence[dict],
        transform: Callable | None = None,
        seed: int = 0,
        supports: tuple[int, int] | list[int] = (1, 2),
        support_transform: Callable | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(data, transform, seed, length)
        low, high = supports
        if not 1 <= low <= high:
            raise ConfigError(f"supports is {tuple(supports)}; expected fewest and most, at least 1.")
        self.supports = (low, high)
        self.support_transform = transform if support_transform is None else support_transform
        self._contents = [_content(case["image"]) for case in self.data]
        self._groups: dict[str, list[int]] = {}
        for index, case in enumerate(self.data):
            self._groups.setdefault(_task(case), []).append(index)
        for task, group in self._groups.items():
            if len({self._contents[i] for i in group}) < 2:
                raise DataError(
                    f"Case {self.data[group[0]]['case']} has no other image of its task ({task or 'the data set'}) to "
                    "be its support; expected at least two different cases a task. Add cases, or leave the task out."
                )

    def candidates(self, index: int) -> list[int]:
        """Which cases may be supports of case ``index``."""
        name, content = self.data[index]["case"], self._contents[index]
        group = self._groups[_task(self.data[index])]
        return [i for i in group if self.data[i]["case"] != name and self._contents[i] != content]

    def sources(self, index: int) -> list[int]:
        """Which cases an item depends on: its own, and all that may be drawn as supports."""
        return [index, *self._groups[_task(self.data[index])]]

    def _transform(self, index: int) -> dict[str, Any]:
        target = self._target(index)
        rng = np.random.default_rng((self.seed, self.epoch, index, 1))
        index %= len(self.data)
        low, high = self.supports
        count = int(rng.integers(low, high + 1))
        order = self._different(rng.permutation(self.candidates(index)).tolist())
        images, names = [], []
        for slot in range(high):
            for attempt in range(_TRIES):
                # Another try takes the next case that no slot has used, as far as there are any.
                chosen = order[(slot + attempt * high) % len(order)]
                item = self._support(chosen, rng)
                if (item["label"] > 0).any():
                    break
            images.append(item)
            names.append(str(self.data[chosen]["case"]))
        return {
            **self._given(target, images),
            "label": _plain(target["label"]),
            "support_masks": torch.stack([_plain(item["label"])[0] for item in images]),
            "supports": count,
            "case": self.data[index]["case"],
            "support_cases": "\n".join(names),
        }

    def _given(self, target: dict[str, Any], supports: list[dict[str, Any]]) -> dict[str, Any]:
        """What the network reads of the images."""
        images = torch.stack([_plain(item["image"]) for item in supports])
        return {"image": _plain(target["image"]), "support_images": images}

    def _target(self, index: int) -> dict[str, Any]:
        return super()._transform(index)

    def _support(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        transform = self.support_transform
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(seed=int(rng.integers(2**32)))
        case = self.data[index]
        with one_thread():
            return case if transform is None else apply_transform(transform, case)

    def _different(self, order: list[int]) -> list[int]:
        """The first case of each content, in order."""
        seen: dict[str, int] = {}
        for index in order:
            seen.setdefault(self._contents[index], index)
        return list(seen.values())


class StoredEpisodeDataset(EpisodeDataset):
    """Episodes of a frozen encoder's stored features: every view of a case is encoded once, whatever it is used for.

    A target shows the view that the epoch's number says, a support any view, drawn with it.

    Args:
        features: of the images of one split, with their pixels kept (``keep=("image",)``): the support encoder reads
            them. Its ``fill`` is called before the first epoch (:class:`FillFeatures`).
        seed: seed of the run.
        supports: fewest and most supports K, see :class:`EpisodeDataset`.
        length: items an epoch.

    Items: those of :class:`EpisodeDataset`, with features (h, w, C) and (K, h, w, C) by name in ``image`` and
    ``support_features``, and ``size``, the images' (H, W).

    Raises:
        ConfigError: ``supports`` is no range of positive numbers, or the pixels are not kept.
        DataError: a task has no second different case.
    """

    def __init__(
        self,
        features: FeatureDataset,
        seed: int = 0,
        supports: tuple[int, int] | list[int] = (1, 2),
        length: int | None = None,
    ) -> None:
        if features.keys != ("image",) or features.keep != ("image",):
            raise ConfigError("Stored episodes need features of 'image' with its pixels: keys and keep of ['image'].")
        super().__init__(features.data, None, seed, supports, length=length)
        self.features = features

    def fill(self, network: nn.Module, workers: int = 0) -> int:
        """Compute the features that are not there yet, see :meth:`FeatureDataset.fill`."""
        return self.features.fill(network, workers)

    def _target(self, index: int) -> dict[str, Any]:
        return self.features.read(index % len(self.data), self.epoch % self.features.views)

    def _support(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.features.read(index, int(rng.integers(self.features.views)))

    def _given(self, target: dict[str, Any], supports: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "image": target["image"],
            "size": target["size"],
            "support_images": torch.stack([item["image_pixels"] for item in supports]),
            "support_features": {
                name: torch.stack([item["image"][name] for item in supports]) for name in target["image"]
            },
        }


def episode_batch(
    batch: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **options: Any
) -> tuple[Tensor | dict[str, Tensor], Tensor, tuple[Tensor, ...], dict[str, Any]]:
    """``prepare_batch`` of MONAI's ``SupervisedTrainer``: image, label, and the supports as the network's arguments.

    Args:
        batch: items of :class:`EpisodeDataset` or :class:`StoredEpisodeDataset`, stacked; items without supports pass
            without.
        device: where the tensors go.
        non_blocking: see ``Tensor.to``.
        **options: further arguments of ``Tensor.to``.

    Returns:
        (B, 3, H, W), (B, 1, H, W), ((B, K, 3, H, W), (B, K, H, W)), {}; K is what the first item says. Of stored
        features: in place of the image what :func:`stored_batch` gives, and ``support_encoded`` in the last.
    """
    if "support_images" not in batch:
        image, label = (batch[key].to(device, non_blocking=non_blocking, **options) for key in ("image", "label"))
        return image, label, (), {}
    count = int(batch["supports"][0])
    images, masks = (
        batch[key][:, :count].to(device, non_blocking=non_blocking, **options)
        for key in ("support_images", "support_masks")
    )
    if "support_features" in batch:
        image, label = stored_batch(batch, device, non_blocking, **options)
        flat = {name: t[:, :count].flatten(0, 1) for name, t in batch["support_features"].items()}
        encoded, _ = stored_batch({**batch, "image": flat}, device, non_blocking, **options)
        return image, label, (images, masks), {"support_encoded": encoded_of(encoded)}
    image, label = (batch[key].to(device, non_blocking=non_blocking, **options) for key in ("image", "label"))
    return image, label, (images, masks), {}


def held_out_episodes(
    network: nn.Module, data: Sequence[dict], transform: Callable, supports: int = 15, seed: int = 0
) -> Dataset:
    """Validation on the training cases alone, where there are no others.

    A network that takes supports segments each case with the other cases as its supports, so the figure is held out
    from the context (not from the generator's weights). Any other network segments what it was trained on: its figure
    only shows that training goes on. Neither may choose an epoch.

    Args:
        network: the network that is trained.
        data: the training cases.
        transform: loads a case and brings it to the network's size, without randomness.
        supports: most supports a case; all others where there are fewer.
        seed: of their draw.
    """
    if not hasattr(network, "set_context"):
        return Dataset(list(data), transform)
    count = max(1, min(supports, len(data) - 1))
    return EpisodeDataset(data, transform, seed, (count, count))


class SetContext:
    """Handler of the validation engine: before each validation, give the network the context it is validated with.

    The supports are the same in every epoch and read when the handler is attached, so that faults show before anything
    is trained. ``model.pt`` then holds the context beside the weights.

    Args:
        network: the network that is validated, with ``set_context`` and ``num_classes``.
        data: cases to draw the supports from; never the validation cases.
        transform: loads one and brings it to tensors ``image`` (3, H, W) and ``label`` (1, H, W), without randomness,
            at the size it is stored in. Kept are at most twice the network's ``image_size`` a side; no object is lost.
        supports: how many are drawn, so that every class is shown; all where there are fewer.
        seed: of the draw.

    Raises:
        DataError: a class that no support shows, and what the network refuses of supports (on attaching).
    """

    def __init__(
        self, network: nn.Module, data: Sequence[dict], transform: Callable, supports: int = 16, seed: int = 0
    ) -> None:
        self.network, self.data, self.transform = network, list(data), transform
        self.supports, self.seed = supports, seed
        self._loaded: tuple[list[Tensor], list[Tensor]] | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator and read the supports."""
        if self._loaded is None:
            self._loaded = self._load()
            getattr(self._network, "check_supports", lambda *_: None)(*self._loaded)
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the context; the supports are read once."""
        if self._loaded is None:
            self._loaded = self._load()
        self._network.set_context(*self._loaded)

    @property
    def _network(self) -> nn.Module:
        return getattr(self.network, "module", self.network)

    def _load(self) -> tuple[list[Tensor], list[Tensor]]:
        read: dict[int, tuple[Tensor, Tensor]] = {}
        met: set[int] = {0}
        most = 2 * self._network.image_size if hasattr(self._network, "image_size") else None

        def shown(index: int) -> set[int]:
            with one_thread():
                item = apply_transform(self.transform, self.data[index])
            label = _plain(item["label"])[0]
            found = {int(value) for value in label.unique()}
            if found != {0} and (len(read) < self.supports or found - met):  # no other can be chosen
                read[index] = _at_most(_plain(item["image"]), label, most)
            met.update(found)
            return found

        order = np.random.default_rng(self.seed).permutation(len(self.data)).tolist()
        chosen, missing = showing_all(order, shown, self.supports, self._network.num_classes)
        if missing:
            raise DataError(
                f"Of {len(self.data)} training cases, none of the {len(chosen)} taken as supports shows class "
                f"{min(missing)}; expected every class in at least one. Take more (context_supports), add cases that "
                "show it, or leave the class out of the labels."
            )
        return [read[index][0] for index in chosen], [read[index][1] for index in chosen]


def _at_most(image: Tensor, label: Tensor, side: int | None) -> tuple[Tensor, Tensor]:
    """A support, image (3, H, W) and label (H, W), within ``side`` pixels; a class that would go keeps what it touches.

    Sixteen photographs of twelve megapixels would hold two gigabytes for as long as the training goes on.
    """
    if side is None or max(label.shape) <= side:
        return image, label
    size, given = (side, side), label[None, None].float()
    small = F.interpolate(given, size, mode="nearest-exact")[0, 0]
    for value in given.unique().tolist():
        if value and not (small == value).any():
            small[F.adaptive_max_pool2d((given == value).float(), size)[0, 0] > 0] = value
    return fit_image(image[None], side)[0], small.to(label.dtype)


def _task(case: dict[str, Any]) -> str:
    return str(case["task"]) if "task" in case else str(case["case"]).rpartition("/")[0]


def _content(image: Any) -> str:
    """What tells copies: the bytes of a file, or of a tensor or an array."""
    if isinstance(image, str | Path):
        return content_hash(Path(image))
    array = np.ascontiguousarray(image)
    return hashlib.sha256(repr((array.shape, array.dtype)).encode() + array.tobytes()).hexdigest()


def _plain(x: Any) -> Tensor:
    x = torch.as_tensor(x)
    return x.as_tensor() if hasattr(x, "as_tensor") else x
