"""A frozen encoder's features, computed once and kept on disk, for training only what is new.

    data set of images --(view, case)--> augmented image --frozen encoder--> one file --every epoch--> decoder

Epoch e shows view e mod V of every case, a view being what :class:`~hspsam_monai.data.SeededDataset` shows in the
epoch of that number. A file's name is the hash of everything it depends on, so that another run that would compute the
same takes it, and one that would not never does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, Subset

import hspsam_monai
from hspsam_monai.errors import ConfigError, DataError, TrainingError
from hspsam_monai.networks.stored import features_digest, pack, require_storable
from hspsam_monai.training.feature_files import LAYOUT, SUFFIX, read_item, write_item
from hspsam_monai.training.fingerprint import content_of, describe
from hspsam_monai.training.handlers import clock

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: Seconds between two lines about the filling.
_EVERY = 10.0


class FeatureDataset(Dataset):
    """Items of another data set, with the features of their images in place of these.

    Args:
        dataset: the images' data set: its items are dictionaries with an image (3, H, W) in [0, 1], H and W multiples
            of 32, and what else training needs. What changes from epoch to epoch follows its ``set_epoch``. If an item
            depends on more cases than its own, ``sources(index)`` lists the numbers of all.
        folder: where the files are; created by :meth:`fill`. Several runs may share it.
        views: V, differently augmented views of each case; 1 for data without randomness.
        dtype: in which features are stored: ``float16`` (relative error up to 2^-11, half of 0.1 %), ``bfloat16``
            (2^-9; takes larger values) or ``float32`` (none).
        keys: which values of an item are images (..., 3, H, W) to be encoded.
        keep: those of them whose pixels are needed as well; kept as ``<key>_pixels``.

    Items: for each key a dictionary of features (h, w, C), as TinyViT leaves them and the decoders compute on them, so
    that no step has to turn them; ``size``, the images' (H, W); everything else as it was,
    except values that are no tensors, texts or numbers.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        folder: str | Path,
        views: int = 4,
        dtype: str = "float16",
        keys: Sequence[str] = ("image",),
        keep: Sequence[str] = (),
    ) -> None:
        if views < 1:
            raise ConfigError(f"views is {views}; expected 1 or more.")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype of the features is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        super().__init__(data=dataset.data)
        self.dataset, self.folder, self.views, self.dtype = dataset, Path(folder), views, DTYPES[dtype]
        self.keys, self.keep = tuple(keys), tuple(keep)
        self.view = 0
        # Now, since some transforms remember what they drew; the data counts by its content.
        self._description = describe(dataset, leave_out=("data", "epoch"))
        self._paths: list[list[Path]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch comes: it shows view ``epoch`` mod V."""
        self.view = epoch % self.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item of the current view, see :meth:`read`."""
        return self.read(index, self.view)

    def read(self, index: int, view: int) -> dict[str, Any]:
        """One item of one of the V views.

        Raises:
            ConfigError: :meth:`fill` was not called.
            DataError: its file has gone or is damaged.
        """
        if self._paths is None:
            raise ConfigError("The features were not computed: add FillFeatures to the trainer's handlers.")
        return read_item(self._paths[view][index])

    def paths(self, network: nn.Module) -> list[list[Path]]:
        """The file of each view and case: ``[view][index]``, there or not."""
        general = {
            "layout": LAYOUT,
            "versions": (hspsam_monai.__version__, monai.__version__, torch.__version__),
            "network": features_digest(network),
            "dtype": str(self.dtype),
            "images": (self.keys, self.keep),
            "dataset": self._description,
        }
        start = hashlib.sha256(json.dumps(general).encode())
        sources = getattr(self.dataset, "sources", lambda index: [index])
        contents = [content_of(case) for case in self.data]
        found: list[list[Path]] = [[] for _ in range(self.views)]
        for index in range(len(self.data)):
            case = json.dumps([index, [contents[source] for source in sources(index)]]).encode()
            for view, paths in enumerate(found):
                digest = start.copy()
                digest.update(case + b" %d" % view)
                paths.append(self.folder / (digest.hexdigest() + SUFFIX))
        return found

    def fill(self, network: nn.Module, workers: int = 0) -> int:
        """Compute and store what is not there yet; afterwards items can be read.

        May be interrupted at any time: what is there stays and is taken next time. Files already there are read once
        and compared with their digest; damaged ones are made anew. In a distributed run every process computes its
        share. Images are encoded in float32, one at a time, so that features do not depend on who computed them.

        Args:
            network: the network with its weights, see :mod:`hspsam_monai.networks.stored`.
            workers: processes that load and augment.

        Returns:
            How many files this process wrote.

        Raises:
            ConfigError: the network's features cannot be stored, or ``dtype`` cannot hold them.
            TrainingError: the disk is full, or the folder cannot be written.
        """
        network = getattr(network, "module", network)
        wanted = self.paths(network)
        missing = self._missing(wanted)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if world > 1:
            dist.barrier()  # all have looked before the first writes
        self._require_storable(network, wanted, missing)
        # By place, not by position in the list: another run may have written between the processes' looks.
        mine = [(view, index) for view, index in missing if (view * len(self.data) + index) % world == rank]
        total = sum(map(len, wanted))
        if missing:
            logger.info("Features in %s: %d of %d are there.", self.folder, total - len(missing), total)
            self._compute(network, wanted, mine, len(missing), workers)
        else:
            logger.info("Features in %s: all %d are there.", self.folder, total)
        if world > 1:
            dist.barrier()
        self._paths = wanted
        return len(mine)

    def _require_storable(
        self, network: nn.Module, paths: list[list[Path]], missing: Sequence[tuple[int, int]]
    ) -> None:
        """Refuse a network whose features cannot be stored, also where another one's are there."""
        gone = set(missing)
        places = ((v, i) for v, files in enumerate(paths) for i in range(len(files)))
        there = next((paths[v][i] for v, i in places if (v, i) not in gone), None)
        if there is None:
            height, width = self.dataset[missing[0][1]][self.keys[0]].shape[-2:]
        else:
            height, width = read_item(there)["size"].tolist()
        training = network.training
        network.eval()
        try:
            require_storable(network, torch.zeros(1, 3, height, width, device=next(network.parameters()).device))
        finally:
            network.train(training)

    def _missing(self, paths: list[list[Path]]) -> list[tuple[int, int]]:
        """(view, index) of what is not there or damaged; gigabytes take minutes to read, so it tells how far it is."""
        begin = printed = time.monotonic()
        missing, done, total = [], 0, sum(map(len, paths))
        for view, files in enumerate(paths):
            for index, path in enumerate(files):
                if not _intact(path):
                    missing.append((view, index))
                done += 1
                now = time.monotonic()
                if now - printed >= _EVERY:
                    printed = now
                    left = clock((now - begin) / done * (total - done))
                    logger.info("Stored features looked through: %d/%d, %s left", done, total, left)
        return missing

    def _compute(
        self, network: nn.Module, paths: list[list[Path]], mine: list[tuple[int, int]], missing: int, workers: int
    ) -> None:
        """Compute this process' files among all that are missing."""
        device = next(network.parameters()).device
        training, before = network.training, getattr(self.dataset, "epoch", 0)
        network.eval()
        begin = printed = time.monotonic()
        done = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for view in sorted({v for v, _ in mine}):
                indices = [i for v, i in mine if v == view]
                if hasattr(self.dataset, "set_epoch"):
                    self.dataset.set_epoch(view)
                items = DataLoader(Subset(self.dataset, indices), batch_size=None, num_workers=workers)
                for index, item in zip(indices, items, strict=True):
                    size = write_item(paths[view][index], self._encode(network, item, device), self.dtype)
                    done += 1
                    if done == 1:
                        self._require_space(size, missing)
                    now = time.monotonic()
                    if now - printed >= _EVERY or done == len(mine):
                        printed, rate = now, done / max(now - begin, 1e-9)
                        left = clock((len(mine) - done) / rate)
                        logger.info("Features %d/%d, %.1f a second, %s left", done, len(mine), rate, left)
        except OSError as error:
            raise TrainingError(
                f"Features cannot be written to {self.folder} ({error}); expected a folder with room. Free some, or "
                "name another with feature_cache=FOLDER; what is written already is used again."
            ) from error
        finally:
            network.train(training)
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(before)

    def _require_space(self, size: int, missing: int) -> None:
        free, needed = shutil.disk_usage(self.folder).free, size * (missing - 1)
        logger.info("They will take %s more; %s are free.", _bytes(needed), _bytes(free))
        if needed > free:
            raise TrainingError(
                f"{self.folder} has {_bytes(free)} free, and the features need {_bytes(needed)} more ({missing} files "
                f"of {_bytes(size)}). Free some space, name another folder with feature_cache=FOLDER, or store fewer "
                f"views (feature_views, now {self.views})."
            )

    @torch.no_grad()
    def _encode(self, network: nn.Module, item: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        found = {key: value for key, value in item.items() if key not in self.keys}
        for key in self.keys:
            image = _batch(item[key], device)
            # cuDNN would round the inputs of convolutions to TF32.
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                features = pack(network.encode(image).features, network.stored)
            one = item[key].ndim == 3
            found[key] = {name: (t[0] if one else t).movedim(-3, -1) for name, t in features.items()}
            if key in self.keep:
                found[f"{key}_pixels"] = item[key]
        found["size"] = torch.tensor(item[self.keys[0]].shape[-2:])
        return found


def _batch(image: Tensor, device: torch.device) -> Tensor:
    image = torch.as_tensor(image)
    image = image.as_tensor() if hasattr(image, "as_tensor") else image
    return (image[None] if image.ndim == 3 else image).to(device)


def _intact(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        read_item(path, verify=True)
    except DataError as error:
        logger.warning("%s", error)
        return False
    return True


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class FillFeatures:
    """Handler of the trainer: before the first epoch, compute the features that are not there yet.

    Attach it after what loads weights (``Checkpointer``), since the features are those of the weights at that moment.

    Args:
        network: the network that is trained.
        datasets: every :class:`FeatureDataset` of the run, those of the validation too.
        workers: processes that load and augment meanwhile.
    """

    def __init__(self, network: nn.Module, datasets: Sequence[FeatureDataset], workers: int = 0) -> None:
        self.network, self.datasets, self.workers = network, list(datasets), workers

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Fill all."""
        for dataset in self.datasets:
            dataset.fill(self.network, self.workers)


def stored_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **options: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """``prepare_batch`` of MONAI's engines for items of :class:`FeatureDataset`.

    Args:
        batch: items, stacked; ``label`` (B, 1, H', W') may have another size than the encoded image, and its size is
            the one at which an inferer answers.
        device: where the tensors go; features become float32 there.
        non_blocking: see ``Tensor.to``.
        **options: further arguments of ``Tensor.to``.

    Returns:
        What :func:`~hspsam_monai.networks.stored.encoded_of` takes (``ImageInferer`` calls it), and the label.
    """
    label = batch["label"].to(device, non_blocking=non_blocking, **options)
    # Channels last in memory; widened only where they are used.
    moved = {name: t.to(device, non_blocking=non_blocking, **options) for name, t in batch["image"].items()}
    features = {name: t.float().movedim(-1, -3) for name, t in moved.items()}
    original = torch.tensor(label.shape[-2:]).expand(len(label), 2)
    return {
        **features,
        "size": batch["size"],
        "original": original,
    }, label  # sizes stay on the CPU, where they are read


def stored_batch_with_truth(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **options: Any
) -> tuple[dict[str, Tensor], Tensor, tuple[()], dict[str, Tensor]]:
    """:func:`stored_batch` for a network that takes the label, too (``SAMSP`` trained with corrections)."""
    image, label = stored_batch(batch, device, non_blocking, **options)
    return image, label, (), {"truth": label}
