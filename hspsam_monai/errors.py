"""Named errors. Each message says what was found, what was expected and what to do.

Every error is a :class:`HspsamError`, so one ``except`` at a face (CLI, server) turns all of them into
a plain sentence, while a programming fault still shows its traceback.
"""


class HspsamError(Exception):
    """Base of all errors a user can mend."""


class DataError(HspsamError, ValueError):
    """A file or a data set is not what the task needs (missing, unreadable, wrong size or values)."""


class TooFewCasesError(DataError):
    """A data set or a split has fewer cases than are asked for."""


class WeightsError(HspsamError, ValueError):
    """Pretrained weights or a checkpoint cannot be found, verified or matched to the network."""


class ConfigError(HspsamError, ValueError):
    """An option, a name or a combination of options is not valid."""


class TrainingError(HspsamError, RuntimeError):
    """Training cannot go on (loss or weights not finite, nothing to resume)."""


class ExportError(HspsamError, RuntimeError):
    """A network cannot be exported, or the exported file computes something else."""
