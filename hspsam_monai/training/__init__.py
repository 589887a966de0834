"""What MONAI's trainer lacks: the papers' loss and schedule, exact resume, finite guard, average of what is trained."""

from hspsam_monai.training.averaging import MovingAverage
from hspsam_monai.training.checkpoints import Checkpointer
from hspsam_monai.training.distillation import SelfDistillation
from hspsam_monai.training.episodes import (
    EpisodeDataset,
    SetContext,
    StoredEpisodeDataset,
    episode_batch,
    held_out_episodes,
)
from hspsam_monai.training.feature_cache import (
    FeatureDataset,
    FillFeatures,
    stored_batch,
    stored_batch_with_truth,
)
from hspsam_monai.training.handlers import (
    Attach,
    EpochSeeds,
    FiniteGuard,
    Progress,
    TensorBoard,
    Validate,
    log_file,
    of_this_process,
)
from hspsam_monai.training.losses import DiceCE
from hspsam_monai.training.output_folder import check_output
from hspsam_monai.training.record import environment, write_record
from hspsam_monai.training.schedule import parameter_groups, warmup_poly

__all__ = [
    "Attach",
    "Checkpointer",
    "DiceCE",
    "EpisodeDataset",
    "EpochSeeds",
    "FeatureDataset",
    "FillFeatures",
    "FiniteGuard",
    "MovingAverage",
    "Progress",
    "SelfDistillation",
    "SetContext",
    "StoredEpisodeDataset",
    "TensorBoard",
    "Validate",
    "check_output",
    "environment",
    "episode_batch",
    "held_out_episodes",
    "log_file",
    "of_this_process",
    "parameter_groups",
    "stored_batch",
    "stored_batch_with_truth",
    "warmup_poly",
    "write_record",
]
